"""A shopping list in a text file, as an MCP server to try petool-lite with: python items.py FILE"""

import sys
from pathlib import Path

from mcp.server import MCPServer

file = Path(sys.argv[1])
server = MCPServer("items")


@server.tool()
def add_item(item: str) -> str:
    """Put an item on the shopping list"""
    with file.open("a") as stream:
        stream.write(f"{item}\n")
    return f"{file.name}: {', '.join(file.read_text().splitlines())}"


@server.tool()
def show_list() -> str:
    """Show the shopping list"""
    return file.read_text() if file.exists() else "nothing"


server.run("stdio")
