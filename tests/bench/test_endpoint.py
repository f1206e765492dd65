"""Models behind OpenAI's API: two real servers, and one that does whatever real ones do on a bad day."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from email.utils import formatdate
from typing import Any

import pytest
from support_bench import answering, called, rows_of

from petool_lite.bench.engines import Task
from petool_lite.bench.run import bench
from petool_lite.bench.variants import endpoint_variant
from petool_lite.data.entries import Call
from petool_lite.data.files import load_dataset
from petool_lite.errors import PetoolError
from petool_lite.inference import endpoint

SECRET = "not-a-real-key-0123456789"  # pragma: allowlist secret
Deed = tuple[int, dict[str, str], bytes]  # status, headers, body; a status of 0 closes the connection


@dataclass
class Moody:
    """What it does with the next requests, the last deed for all after, and what it was asked."""

    url: str = ""
    deeds: list[Callable[[dict[str, Any]], Deed]] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)


def right(body: dict[str, Any]) -> Deed:
    """The right call of the demo entry that is asked about, if tools are offered."""
    by_query = {entry.query: entry.answer for entry in load_dataset("demo:test:60").entries}
    answer = by_query[body["messages"][-1]["content"].rpartition("\n\n")[2]]
    if not isinstance(answer, Call):
        return reply(answer)
    named = {tool["function"]["name"] for tool in body["tools"]}
    name = answer.name if answer.name in named else answer.name.replace(".", "_")
    return reply(None, [{"function": {"name": name, "arguments": json.dumps(dict(answer.arguments))}}])


def reply(text: str | None, calls: list | None = None, finish: str = "stop", prompt: int = 900) -> Deed:
    usage = {"prompt_tokens": prompt, "completion_tokens": 7}
    choice = {"message": {"content": text, "tool_calls": calls}, "finish_reason": finish}
    return 200, {}, json.dumps({"choices": [choice], "usage": usage}).encode()


def refuse(status: int, said: str, **headers: str) -> Callable[[dict[str, Any]], Deed]:
    return lambda body: (status, headers, json.dumps({"error": {"message": said}}).encode())


@pytest.fixture
def moody() -> Iterator[Moody]:
    found = Moody()

    def answer(path, headers, raw) -> Deed:
        found.asked.append(json.loads(raw))
        found.keys.append(headers.get("Authorization"))
        return (found.deeds.pop(0) if len(found.deeds) > 1 else found.deeds[0])(found.asked[-1])

    with answering(answer) as address:
        found.url = f"{address}/v1"
        yield found


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """Seconds that were waited between tries, without waiting."""
    found: list[float] = []
    monkeypatch.setattr(endpoint.time, "sleep", found.append)
    return found


def run(moody: Moody, folder, count: int = 4, requests: int = 0, data: str = "demo:test:60", **changes):
    variant = replace(endpoint_variant(moody.url, "some/model:7b", requests), batch=1, **changes)
    return bench([variant], Task(load_dataset(data), 64, count), folder)


def rows(folder) -> list[dict[str, Any]]:
    return sorted(rows_of(folder / "results-some-model-7b.jsonl"), key=lambda row: row["index"])


def test_tools_are_sent_and_their_calls_scored_and_the_key_is_nowhere(moody, waits, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(endpoint.KEY, SECRET)
    said: list[str] = []
    moody.deeds = [refuse(500, f"bad key {SECRET}"), right]
    variant, task = endpoint_variant(moody.url, "some/model:7b", 0), Task(load_dataset("demo:test:60"), 64, 12)
    (found,) = bench([variant], task, tmp_path, lambda text, *_: said.append(text))["variants"]
    assert (found["n"], found["joint_acc"], found["engine"]) == (12, 100.0, "endpoint")
    assert found["model"] == f"some/model:7b at {moody.url}"
    assert {row["prompt_tokens"] for row in rows(tmp_path)} == {900}
    assert set(moody.keys) == {f"Bearer {SECRET}"}
    assert moody.asked[0]["model"] == "some/model:7b"
    assert moody.asked[0]["tools"]
    assert any("12 requests to http" in line and "tokens of prompts" in line for line in said)
    assert all(SECRET not in file.read_text() for file in tmp_path.iterdir() if file.is_file())
    assert SECRET not in "".join(said)


def test_what_a_server_does_not_take_is_left_out_and_its_names_are_mapped_back(moody, waits, tmp_path) -> None:
    refusals = {
        "chat_template_kwargs": "Unrecognized request argument supplied: chat_template_kwargs",
        "max_tokens": "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.",
        "temperature": "Unsupported value: 'temperature' does not support 0",
    }

    def picky(body: dict[str, Any]) -> Deed:
        said = [told for key, told in refusals.items() if key in body]
        if any("." in tool["function"]["name"] for tool in body["tools"]):
            said.append("Invalid 'tools[0].function.name': string does not match pattern")
        return refuse(400, said[0])(body) if said else right(body)

    moody.deeds = [picky]
    assert run(moody, tmp_path)["variants"][0]["joint_acc"] == 100.0
    assert "." in rows(tmp_path)[0]["reply"], "the name as the data has it"
    assert len(moody.asked) == 4 + 4, "each refusal once"
    assert moody.asked[-1]["max_completion_tokens"] == 64
    assert rows(tmp_path)[3]["without"] == ["chat_template_kwargs", "free names", "max_tokens", "temperature"]


def test_passing_failures_are_tried_again_when_the_server_says(moody, waits, tmp_path) -> None:
    soon = formatdate(endpoint.time.time() + 30, usegmt=True)
    moody.deeds = [
        refuse(429, "slow down", **{"Retry-After": "7"}), refuse(503, "busy", **{"Retry-After": soon}),
        lambda body: (0, {}, b""), lambda body: (200, {"Content-Length": "9999"}, b'{"choices": ['),
        lambda body: (200, {}, b"not json"), right,
    ]  # fmt: skip
    assert run(moody, tmp_path, 1)["variants"][0]["joint_acc"] == 100.0
    assert waits[0] == 7
    assert 20 < waits[1] <= 31
    assert waits[2:] == [4, 8, 16]


@pytest.mark.parametrize(
    ("deed", "said", "requests"),
    [
        (lambda body: (200, {}, b"<!doctype html><p>Welcome</p>"), "answers with a web page", 1),
        (refuse(401, "Incorrect API key"), "status 401: Incorrect API key", 1),
        (lambda body: (302, {"Location": "http://127.0.0.1:9/"}, b""), "status 302", 1),
        (refuse(429, "You exceeded: insufficient_quota"), "status 429: You exceeded", 1),
        (refuse(429, "later", **{"Retry-After": "86400"}), "it asks to wait 86,400 s", 3),
        (lambda body: (502, {}, b"<html>Bad Gateway</html>"), "status 502 and a web page", 18),
        (lambda body: (200, {}, b'{"error": "overloaded"}'), "an answer without a choice: overloaded", 18),
        (lambda body: (0, {}, b""), "no answer", 18),
        (lambda body: reply("Hm?", prompt=3), "its template leaves out the tools", 3),
        (refuse(400, "I take no tools at all"), "status 400: I take no tools at all", 3),
    ],
)
def test_an_endpoint_that_cannot_go_on_is_one_line(moody, waits, tmp_path, deed, said, requests) -> None:
    moody.deeds = [right, deed]
    with pytest.raises(PetoolError) as error:
        run(moody, tmp_path, 8, 99)
    assert said in error.value.message
    assert "\n" not in error.value.message
    assert error.value.hint
    assert len(moody.asked) == 1 + requests
    assert next(row["status"] for row in rows(tmp_path)) == "ok"
    assert {row["status"] for row in rows(tmp_path)[1:]} == {"engine_error"}
    moody.deeds = [right]
    asked = len(moody.asked)
    assert run(moody, tmp_path, 8)["variants"][0]["n"] == 8
    assert len(moody.asked) == asked + 7, "what was answered is not asked again"


def test_a_cap_on_requests_and_side_by_side_one_that_cannot_go_on_ends_all(moody, tmp_path) -> None:
    moody.deeds = [right, refuse(401, "revoked"), right]
    with pytest.raises(PetoolError, match="revoked"):
        bench([endpoint_variant(moody.url, "m", 0)], Task(load_dataset("demo:test:60"), 64, 40), tmp_path / "many")
    assert len(moody.asked) < 20
    moody.deeds = [right]
    with pytest.raises(PetoolError, match="stopped after 2 requests"):
        run(moody, tmp_path, 4, 2)
    assert [row["status"] for row in rows(tmp_path)] == ["ok", "ok", "engine_error"]
    moody.url = moody.url.replace("127.0.0.1", "localhost")
    with pytest.raises(PetoolError, match="another model"):
        run(moody, tmp_path)


def test_the_models_own_faults_are_wrong_answers(moody, tmp_path) -> None:
    name = called(1)[0].answer.name
    bad = [{"function": {"name": name, "arguments": '{"city": '}}]
    moody.deeds = [
        lambda body: reply(None, bad), lambda body: reply("thinking", finish="length"), lambda body: reply(""),
        lambda body: reply("<think>which one?</think>\nNo tool fits."),
    ]  # fmt: skip
    (found,) = run(moody, tmp_path)["variants"]
    assert (found["n"], found["engine_errors"]) == (4, 0)
    assert [row["failure"] for row in rows(tmp_path)] == ["bad_json", None, "no_call", None]
    assert rows(tmp_path)[3]["reply"] == "No tool fits."


def test_the_published_prompt_as_messages(moody, waits, tmp_path, open_entries) -> None:
    """A system message that the template does not know is folded into the query's turn; a long one loses history."""

    def small(body: dict[str, Any]) -> Deed:
        if body["messages"][0]["role"] == "system":
            return refuse(500, "Conversation roles must alternate user/assistant/user/assistant/...")(body)
        length = len(body["messages"][0]["content"])
        if length > 9000:
            return refuse(400, "This model's maximum context length is 2048 tokens")(body)
        return reply('{"tool_name": "x", "parameters": {}}', prompt=length // 4 if length % 2 else 500)

    moody.deeds = [small]
    run(moody, tmp_path, 12, 999, str(open_entries))
    assert len(moody.asked[-1]["messages"]) == 1
    assert "tools" not in moody.asked[-1]
    found = rows(tmp_path)
    assert any(row["history_dropped"] for row in found)
    assert {"ok"} <= {row["status"] for row in found}
    cut = [row for row in found if row["status"] == "engine_error"]
    assert all("it cuts prompts" in row["error"] for row in cut)
