"""Requests of any content: an answer or a refusal from the server, never a 500, and nothing of them in its log."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient
from support_fuzz import cases, deep, scalar, some, text, value
from support_memory import made
from support_serve import Server

from petool_lite.memory.store import Store
from petool_lite.serve.routes import application

TOOLS = [{"type": "function", "function": {"name": "get", "parameters": {"properties": {"a": {"type": "string"}}}}}]
ASK = [{"role": "user", "content": "secretwordofthequery"}]
message = st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "tool"]), "content": value})
schema = some(properties=value, required=value, type=value)
tool = st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": text, "parameters": schema})})
body = some(
    messages=st.one_of(value, st.just(ASK), st.lists(st.one_of(value, message), max_size=3)),
    tools=st.one_of(value, st.just(TOOLS), st.lists(st.one_of(value, tool), max_size=2)),
    tool_choice=st.one_of(value, st.fixed_dictionaries({"function": value})),
    **dict.fromkeys(("max_tokens", "n", "stream"), scalar),
    **dict.fromkeys(("user", "history", "stream_options"), value),
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


identity = st.one_of(scalar, st.sampled_from(["ann-1", "chatcmpl-ann-1", "resp_ann-1", "ann-1' OR '1'='1"]))
verdict = st.one_of(value, st.sampled_from(["liked", "disliked"]))
rating = some(id=identity, verdict=verdict, user=st.one_of(value, st.sampled_from(["ann", "bob", "../ann", "ann' --"])))


@pytest.fixture(scope="module")
def rater(tmp_path_factory):
    """The application, its engine left out, over a store with a call of ann's; and the store."""
    settings = SimpleNamespace(model=Path("m"), api_key=None, host="127.0.0.1", max_mb=1)
    store = Store(tmp_path_factory.mktemp("rated") / "memory.sqlite")
    store.add([made(1)])
    web = application(SimpleNamespace(settings=settings), store)
    with TestClient(web, "http://127.0.0.1", raise_server_exceptions=True) as client:
        yield client, store


@cases(60)
@given(found=st.one_of(rating, value, st.binary(max_size=40)), kind=st.sampled_from(["application/json"] * 9 + ["t/x"]))
def test_any_feedback_is_taken_for_its_own_user_or_refused(rater, found, kind) -> None:
    client, store = rater
    before = store.records()[0]
    raw = found if isinstance(found, bytes) else json.dumps(found).encode()
    answer = client.post("/v1/feedback", content=raw, headers={"Content-Type": kind})
    assert answer.status_code in (200, 400, 404, 415), answer.text
    after = store.records()
    if answer.status_code == 200:
        assert found.get("user", "ann") in ("ann", None)
        assert found["id"].endswith("ann-1")
        before = replace(before, verdict=found["verdict"])
    else:
        assert answer.json()["error"]["message"]
    assert after == [before]
