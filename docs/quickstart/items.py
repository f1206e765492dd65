"""A list in a text file, as an MCP server to try petool-lite with: python items.py FILE"""

import sys
from pathlib import Path

from mcp.server import MCPServer

file = Path(sys.argv[1])
server = MCPServer("items")


@server.tool()
def add_item(text: str) -> str:
    """Add an item to the list"""
    with file.open("a") as stream:
        stream.write(f"{text}\n")
    return f"{file.name} has {len(file.read_text().splitlines())} items"


@server.tool()
def open_items() -> str:
    """Items of the list"""
    return file.read_text() if file.exists() else "nothing"


server.run("stdio")
