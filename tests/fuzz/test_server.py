"""Requests of any content: an answer or a refusal from the server, never a 500, and nothing of them in its log."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support_fuzz import cases, deep, scalar, text, value
from support_serve import Server

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
SMALL = {"max_tokens": 2}


@pytest.fixture(scope="module")
def server():
    with Server("--context", 1024) as running:
        yield running


@cases(60)
@given(found=body)
def test_any_body_gets_an_answer_from_the_server(server, found) -> None:
    status, said = server.post(found | SMALL)
    assert status in (200, 400), said


def test_a_hostile_body_is_refused_and_the_log_tells_nothing_of_requests(server) -> None:
    asked = {"messages": ASK, "tools": TOOLS}
    huge = [{"messages": [{"role": "user", "content": "\ud800"}], "tools": []}, {"tools": TOOLS * 1000},
            {"history": [deep(60)] * 50}, {"messages": [{"role": "user", "content": "a " * 500_000}]},
            {"max_tokens": 10**30}]  # fmt: skip
    for body in (deep(200), b"[" * 100_000, b"\xff\xfe{}", *(asked | more for more in huge)):
        assert server.post(body)[0] == 400, str(body)[:99]
    assert server.post(asked | SMALL)[0] == 200
    assert server.process.poll() is None
    assert "secretwordofthequery" not in server.said
    assert "Traceback" not in server.said
