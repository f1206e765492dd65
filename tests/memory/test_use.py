"""Call, rate, call again, train: over the command line, a running server and files."""

import json

import pytest
from support_memory import ENTRY, TOOLS, made
from support_serve import Server

from petool_lite.data.answers import with_rejected
from petool_lite.data.entries import Call
from petool_lite.data.files import load_dataset, raw_rows, source_sha256
from petool_lite.data.openai import entry_line
from petool_lite.errors import PetoolError
from petool_lite.memory.lines import openai_line, read_line
from petool_lite.memory.store import Store, record_of
from petool_lite.models import embedded_gguf

ASK = {"messages": [{"role": "user", "content": "Find oak."}], "tools": entry_line(ENTRY)["tools"], "max_tokens": 40}


@pytest.fixture
def place(tmp_path, monkeypatch) -> Store:
    """A store of this test's own, also for the processes that it starts."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    return Store()


def test_a_call_that_was_rated_bears_on_the_next(place, tmp_path, command) -> None:
    (tmp_path / "request.json").write_text(json.dumps({"query": "Find oak.", "tools": ASK["tools"]}))
    line = ["call", "--model", embedded_gguf(), "--request", tmp_path / "request.json", "--required", "--explain"]
    line += ["--context", "2048", "--json", "--user", "ann"]
    first = command(*line, inline=True)
    reply = json.loads(first.stdout)
    assert f"kept as {reply['id']}" in first.stderr
    rated = json.loads(command("rate", "last", "disliked", "--user", "ann", "--json").stdout)
    assert (rated["id"], rated["verdict"], rated["answer"]) == (reply["id"], "disliked", reply["call"])
    assert 0 < rated["confidence"] <= 1
    for options, disliked in ((["--no-store"], 0), ([], 1)):
        again = json.loads(command(*line, *options, inline=True).stdout)
        candidates = {item["name"]: item["disliked"] for item in again["candidates"]}
        assert candidates[reply["call"]["name"]] == disliked
        assert (again["id"] is None) == (disliked == 0)
    shown = json.loads(command("history", "show", again["id"], "--json").stdout)
    assert (shown["query"], shown["verdict"], shown["tools"]) == ("Find oak.", None, ASK["tools"])
    assert len(json.loads(command("history", "list", "--json").stdout)) == 2
    for words in (["rate", reply["id"], "liked", "--user", "bob"], ["history", "show", reply["id"], "--user", "bob"]):
        refused = command(*words)
        assert (refused.returncode, len(refused.stderr.splitlines())) == (1, 2), "one line and a hint"
        assert f"no call {reply['id']} of bob is remembered" in refused.stderr


def test_a_server_keeps_tells_and_rates(place) -> None:
    def post(path: str, key: str = "secret", **body) -> tuple[int, dict]:
        return server.post(body, key, f"/v1/{path}")

    def tokens(user: str | None, **more) -> int:
        return post("chat/completions", **ASK, user=user, **more)[1]["usage"]["prompt_tokens"]

    with Server(PETOOL_LITE_API_KEY="secret") as server:  # pragma: allowlist secret
        code, reply = post("chat/completions", **ASK, user="ann", tool_choice="required")
        assert code == 200
        plain = tokens(None)
        assert tokens("bob", store=False) == tokens("ann", store=False) == tokens("bob") == plain
        assert tokens("ann") > plain, "her first call is told"
        asked = post("chat/completions", **ASK, user="eve", at_least=1.0)[1]
        assert (asked["petool_lite"]["status"], place.records("eve")) == ("ask", []), "a question is no call"
        assert [item.user for item in place.records()] == ["ann", "bob", "ann"]
        assert post("feedback", id=reply["id"], verdict="liked") == (
            200, {"object": "feedback", "id": reply["id"], "verdict": "liked"},
        )  # fmt: skip
        (first,) = [item for item in place.records("ann") if item.verdict]
        assert 0 < first.confidence <= 1
        assert (first.verdict, first.id) == ("liked", reply["id"].removeprefix("chatcmpl-"))
        assert first.called == reply["choices"][0]["message"]["tool_calls"][0]["function"]["name"]
        assert post("feedback", key="wrong", id=reply["id"], verdict="liked")[0] == 401


def test_what_is_exported_is_imported_and_conversations_are_too(place, tmp_path, command) -> None:
    turns = ({"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."})
    kept = [made(n, verdict=("liked", "disliked", None)[n % 3], turns=turns[: n % 2 * 2]) for n in range(6)]
    kept.append(record_of("t", "bob", ENTRY, "No tool fits.", 0.5))
    place.add(kept)
    assert [read_line(openai_line(item), 0) for item in kept] == [[item] for item in kept]
    lines, out = command("history", "export", "--format", "openai").stdout, tmp_path / "out.jsonl"
    out.write_text(lines)
    assert json.loads(command("history", "import", out, "--json").stdout) == {"added": 0, "known": 7}
    place.forget("ann")
    assert json.loads(command("history", "import", out, "--json").stdout) == {"added": 6, "known": 1}
    assert place.records() == sorted(kept, key=lambda item: item.time)
    call = {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "a.b", "arguments": "{}"}}]}
    rated = [{"role": "user", "content": "Hi."}, call, {"role": "tool", "tool_call_id": "1", "content": "disliked"}]
    out.write_text(json.dumps({"messages": [*rated, {"role": "user", "content": "And?"}, call], "tools": [
        {"function": {"name": "a.b"}}]}))  # fmt: skip
    assert "line 1, user: expected whose line it is" in command("history", "import", out).stderr
    assert command("history", "import", out, "--user", "eve").stdout == "2 added, 0 were there\n"
    assert [(item.query, item.verdict) for item in place.records("eve")] == [("Hi.", "disliked"), ("And?", None)]


def test_rated_calls_are_training_data(place) -> None:
    place.add([made(n, verdict="liked") for n in range(4)] + [made(n, "bob", verdict="liked") for n in range(5)])
    with pytest.raises(PetoolError, match=r"history:ann has 4 liked calls of 4, 10 would do"):
        load_dataset("history:ann")
    asked = {"query": "Find elm."}
    place.add([made(20, name="bolt__find", verdict="disliked", **asked), made(21, verdict="liked", **asked)])
    entries = load_dataset("history:*").entries
    assert (len(entries), sum(entry.answer is not None for entry in entries)) == (10, 10)
    last = next(entry for entry in entries if entry.id == "ann-21")
    assert (last.answer, last.rejected) == (Call("acme.find", {"word": "w21"}), Call("bolt__find", {"word": "w20"}))
    assert [item.verdict for item in last.history] == ["liked"] * 4 + ["disliked"], "what came before, no one else's"
    assert [entry.id for entry in with_rejected(entries, 0) if entry.rejected == last.rejected] == ["ann-21"]
    before = source_sha256("history:*")
    place.find("ann-0", verdict="disliked")
    place.add([made(30, name="crow_list", verdict="liked")])
    assert source_sha256("history:*") != before
    assert len(load_dataset("history:* + 2 * demo:test:3").entries) == 16
    assert len(raw_rows("simulated:8:history:*")) == 8
    assert {tool.name for tool in TOOLS} == {tool.name for tool in last.tools}
