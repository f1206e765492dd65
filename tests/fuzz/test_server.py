"""Requests of any content: an answer or a refusal from the server, never a 500, and nothing of them in its log."""

import json
import re
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support_fuzz import cases, deep, scalar, text, value
from support_serve import Server

from petool_lite.serve.requests import Refusal, read_chat

TOOLS = [{"type": "function", "function": {"name": "get", "parameters": {"properties": {"a": {"type": "string"}}}}}]
ASK = [{"role": "user", "content": "secretwordofthequery"}]
message = st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "tool"]), "content": value})
schema = st.fixed_dictionaries({}, optional={"properties": value, "required": value, "type": value})
tool = st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": text, "parameters": schema})})
body = st.fixed_dictionaries(
    {},
    optional={
        "messages": st.one_of(value, st.just(ASK), st.lists(st.one_of(value, message), max_size=3)),
        "tools": st.one_of(value, st.just(TOOLS), st.lists(st.one_of(value, tool), max_size=2)),
        "tool_choice": st.one_of(value, st.fixed_dictionaries({"function": value})),
        **dict.fromkeys(("max_tokens", "n", "stream"), scalar),
        **dict.fromkeys(("user", "history", "stream_options"), value),
    },
)
head = text.map(lambda t: f"GET /{t} HTTP/1.1\r\nHost: {t}\r\n\r\n".encode("utf-8", "ignore"))


@cases(500)
@given(found=body)
def test_any_body_is_understood_or_refused(found) -> None:
    try:
        asked = read_chat(found)
    except Refusal as refusal:
        assert refusal.status == 400
        return
    assert isinstance(asked.request.entry.query, str)


@pytest.fixture(scope="module")
def server():
    with Server("--context", 1024) as running:
        yield running


def exchange(port: int, raw: bytes, more: bool = False) -> bytes:
    """What the server says to these bytes, whatever they are."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(raw)
        if not more:
            connection.shutdown(socket.SHUT_WR)
        said = b""
        try:
            while part := connection.recv(65536):
                said += part
        except ConnectionResetError:
            pass
        return said


def post(port: int, raw: bytes) -> tuple[int, bytes]:
    start = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    said = exchange(port, start + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(raw) + raw, True)
    return int(said.split()[1]) if said.startswith(b"HTTP/1.1 ") else 0, said


SMALL = {"max_tokens": 2}


@cases(60)
@given(found=body)
def test_any_body_gets_an_answer_from_the_server(server, found) -> None:
    status, said = post(server.port, json.dumps(found | SMALL).encode())
    assert status in (200, 400), said


@cases(60)
@given(raw=st.one_of(st.binary(max_size=200), head))
def test_any_bytes_leave_the_server_well(server, raw) -> None:
    said = exchange(server.port, raw)
    assert not said or said.startswith(b"HTTP/1.1 "), said
    assert not re.match(rb"HTTP/1.1 5", said), said


HUGE = [
    {"messages": [{"role": "user", "content": "\ud800"}], "tools": []}, {"tools": TOOLS * 1000},
    {"history": [deep(60)] * 50}, {"messages": [{"role": "user", "content": "a " * 500_000}]}, {"max_tokens": 10**30},
]  # fmt: skip


def test_a_hostile_body_is_refused(server) -> None:
    asked = [json.dumps({"messages": ASK, "tools": TOOLS} | more).encode() for more in HUGE]
    for raw in (json.dumps(deep(200)).encode(), b"[" * 100_000, b"\xff\xfe{}", *asked):
        status, said = post(server.port, raw)
        assert status == 400, (raw[:99], said)


def test_the_log_tells_nothing_of_requests(server) -> None:
    assert post(server.port, json.dumps({"messages": ASK, "tools": TOOLS} | SMALL).encode())[0] == 200
    assert server.process.poll() is None
    assert "secretwordofthequery" not in server.said
    assert "Traceback" not in server.said
