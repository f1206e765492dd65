"""Answers of any content from an MCP server: tools, a result, or a PetoolError of one line."""

import json

import anyio
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support_fuzz import cases, deep, scalar, some, text, value

from petool_lite.data.mcp import Servers
from petool_lite.errors import PetoolError
from petool_lite.inference.request import request_entry

pytest.importorskip("mcp")


class Process:
    """A server that answers the questions one after the other by a script, and ends where nothing more is asked."""

    def __init__(self, script: list) -> None:
        self.script, self.lines, self.returncode, self.pid = script, [], None, 0
        self.stdin = self.stdout = self

    async def send(self, raw: bytes) -> None:
        asked = json.loads(raw)
        if "id" in asked and self.script:
            said, head = self.script.pop(0), {"jsonrpc": "2.0", "id": asked["id"]}
            self.lines.append((said if isinstance(said, bytes) else json.dumps(head | said).encode()) + b"\n")

    async def receive(self) -> bytes:
        for _ in range(50):
            if self.lines:
                return self.lines.pop(0)
            await anyio.sleep(0)
        raise anyio.EndOfStream

    async def aclose(self) -> None:
        self.returncode = 0


def answered(*results: st.SearchStrategy) -> st.SearchStrategy:
    """A reply with one of some results, a failure, or bytes."""
    failed = st.fixed_dictionaries({"error": st.one_of(value, some(code=scalar, message=scalar, data=value))})
    raw = st.one_of(st.binary(max_size=60), value.map(lambda item: json.dumps(item).encode()))
    return st.one_of(st.fixed_dictionaries({"result": st.one_of(*results, value)}), failed, raw)


NO = {"error": {"code": -32601, "message": "no"}}
KNOWN = {"protocolVersion": "2025-06-18", "capabilities": {}, "serverInfo": {"name": "s", "version": "1"}}
START = [NO, {"result": KNOWN}]  # how a server of before 2026 begins
ONE = {"result": {"tools": [{"name": "t", "inputSchema": {"type": "object"}}]}}
DEEP = {"result": {"tools": [{"name": "t", "inputSchema": {"a": deep(90)}}]}}
begun = some(protocolVersion=text, capabilities=value, serverInfo=some(name=text, version=text))
more = {"description": scalar, "annotations": value}
schema = st.one_of(value, some(type=st.just("object"), properties=value))
tool = st.fixed_dictionaries({"name": text, "inputSchema": schema}, optional=more)
listed = answered(some(tools=st.lists(st.one_of(tool, value), max_size=3), nextCursor=scalar))
kinds = st.sampled_from(["text", "image", "resource", "odd"])
block = some(type=kinds, text=scalar, data=text, mimeType=text, resource=value)
ran = answered(some(content=st.one_of(st.lists(block, max_size=3), value), isError=scalar, structuredContent=value))
started = st.one_of(st.tuples(*map(st.just, START)), st.tuples(answered(value), answered(begun, st.just(KNOWN))))


@cases(40)
@given(start=started, told=st.lists(listed, min_size=1, max_size=2), made=ran)
@example(start=START, told=[ONE], made={"result": {"content": [{"type": "text", "text": "\x1b[2J" * 99_999}]}})
@example(start=START, told=[DEEP], made=b"[" * 99_999)
def test_any_answer_of_a_server_is_read_or_refused(monkeypatch, start, told, made) -> None:
    script = [*start, *told]

    async def spawned(**_: object) -> Process:
        return Process(script)

    monkeypatch.setattr("mcp.client.stdio._create_platform_compatible_process", spawned)
    try:
        servers = Servers(["any"])
        offered = servers.tools()
        script[:] = [*START, made]
        assert len(servers.run(offered[0]["function"]["name"], {}).text.encode()) < 270_000
        request_entry("q", json.loads(json.dumps(offered)))
    except PetoolError as error:
        assert "\n" not in error.message + error.hint
