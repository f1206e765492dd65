"""Interactions for the tests of the memory."""

from dataclasses import replace

from petool_lite.data.entries import Call, Entry, Tool
from petool_lite.memory.store import Record, record_of

WORD = {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}
TOOLS = tuple(Tool(name, "Find a word", WORD) for name in ("acme.find", "bolt__find", "crow_find", "crow_list"))
ENTRY = Entry("e", "Find oak.", TOOLS)


def made(number: int, user: str = "ann", name: str = "acme.find", verdict: str | None = None, **more) -> Record:
    call = Call(name, {"word": f"w{number}"})
    entry = replace(ENTRY, query=more.pop("query", f"Find w{number}."), **more)
    return replace(record_of(f"{user}-{number}", user, entry, call), time=float(number), verdict=verdict)
