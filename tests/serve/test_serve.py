"""The server as its clients meet it: the official client, streams, limits, a crash of the engine."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from support import wait_until
from support_serve import ASK, SLOW, TOOLS, Server, asking

from petool_lite.models import embedded_gguf

ODD = {"type": "function", "function": {"name": "t", "parameters": {"properties": {"a": {"type": "inetger"}}}}}


@pytest.fixture(scope="module")
def server():
    with Server("--slots", 2, "--queue", 1) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=250)  # pragma: allowlist secret


def test_the_official_client_gets_a_tool_call_for_a_whole_conversation(client) -> None:
    model = client.models.list().data[0].id
    call = {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
    used = [{"role": "user", "content": "Rome?"}, {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "liked"}]  # fmt: skip
    ask = {"model": model, "messages": used + ASK, "tools": TOOLS, "user": "ann", "store": False}
    ask |= {"parallel_tool_calls": True, "seed": 1}
    reply = client.chat.completions.create(**ask)
    choice = reply.choices[0]
    call = choice.message.tool_calls[0].function
    assert choice.finish_reason == "tool_calls"
    assert call.name in ("get_weather", 'odd "name" {}')
    assert isinstance(json.loads(call.arguments), dict)
    assert reply.usage.prompt_tokens > 50
    assert reply.petool_lite["unused"] == ["parallel_tool_calls", "seed"]
    again = client.chat.completions.create(**ask)
    assert again.usage.prompt_tokens_details.cached_tokens > 0.7 * again.usage.prompt_tokens
    assert again.choices[0].message.tool_calls[0].function == call


def test_responses_are_the_same_call_whole_and_streamed(client) -> None:
    flat = [{"type": "function", **tool["function"], "strict": False} for tool in TOOLS]
    before = [{"type": "function_call", "call_id": "1", "name": "get_weather", "arguments": '{"city": "Rome"}'},
              {"type": "function_call_output", "call_id": "1", "output": "liked"}]  # fmt: skip
    question = {"role": "user", "content": [{"type": "input_text", "text": ASK[0]["content"]}]}
    ask = {"model": "any", "tools": flat, "input": [{"role": "user", "content": "Rome?"}, *before, question]}
    allowed = [{"type": "function", "name": "get_weather"}]
    ask["tool_choice"] = {"type": "allowed_tools", "mode": "required", "tools": allowed}
    whole = client.responses.create(**ask, instructions="Be brief.")
    (item,) = whole.output
    assert (whole.status, item.type, item.name) == ("completed", "function_call", "get_weather")
    assert whole.usage.input_tokens > 50
    with client.responses.stream(**ask, instructions="Be brief.") as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert (final.output[0].name, final.output[0].arguments) == (item.name, item.arguments)
    assert kinds[:3] == ["response.created", "response.in_progress", "response.output_item.added"]
    assert kinds[-3:] == ["response.function_call_arguments.done", "response.output_item.done", "response.completed"]
    cut = client.responses.create(**ask, max_output_tokens=1)
    assert (cut.status, cut.incomplete_details.reason, cut.output) == ("incomplete", "max_output_tokens", [])


def test_an_unsure_call_is_a_question_whole_and_streamed(server, client) -> None:
    body = {"messages": ASK, "tools": TOOLS, "at_least": 0.999999}
    answer = server.post(body)[1]
    told, choice = answer["petool_lite"], answer["choices"][0]
    assert (told["status"], choice["finish_reason"], len(told["candidates"])) == ("ask", "stop", 2)
    assert choice["message"]["content"].startswith("Which tool do you mean: ")
    ask = {"model": "m", "messages": ASK, "tools": TOOLS, "extra_body": {"at_least": 0.999999}}
    with client.chat.completions.stream(**ask) as stream:
        message = stream.get_final_completion().choices[0].message
    assert (message.content, message.tool_calls) == (choice["message"]["content"], None)


def test_a_request_that_cannot_be_served_is_said_by_the_server(server) -> None:
    for body, status, said in (
        ({"messages": ASK, "tools": [ODD]}, 400, "the tool t: parameters.properties.a.type"),
        ({"messages": [{"role": "user", "content": "x " * 9000}], "tools": TOOLS}, 400, "exceed the context of 2,048"),
        (b" " * (4 * 2**20 + 1), 413, "exceeds"),
    ):
        code, answer = server.post(body)
        assert (code, said in answer["error"]["message"]) == (status, True), answer
    assert server.post({}, **{"Content-Type": "text/plain"})[0] == 415, "pages of other sites get nothing"


def test_a_full_queue_turns_requests_away_and_a_crash_costs_what_runs(server) -> None:
    body, pid = {"messages": ASK, "tools": TOOLS}, server.engine()
    os.kill(pid, signal.SIGSTOP)  # requests that take as long as we like
    with asking(server, *[body] * 3) as answers:
        server.holds(3)
        code, answer = server.post(body)
        os.kill(pid, signal.SIGCONT)
    assert (code, answer["error"]["type"]) == (429, "rate_limit_error")
    assert [code for code, _ in answers] == [200, 200, 200]
    os.kill(pid, signal.SIGSTOP)
    with asking(server, *[body] * 3) as answers:
        server.holds(3)
        os.kill(pid, signal.SIGKILL)
    assert sorted(code for code, _ in answers) == [200, 500, 500]
    assert {answer["error"]["type"] for code, answer in answers if code == 500} == {"engine_error"}
    assert server.post(body)[0] == 200
    assert server.engine() != pid


def test_an_api_key_is_asked_for_and_a_slow_request_is_ended(command) -> None:
    refused = command("serve", "--model", embedded_gguf(), "--host", "0.0.0.0", "--port", "0")
    assert (refused.returncode, "no API key is set" in refused.stderr) == (2, True)
    with Server("--timeout", 1, PETOOL_LITE_API_KEY="secret") as server:  # pragma: allowlist secret
        body = {"messages": ASK, "tools": TOOLS}
        assert server.post(body)[0] == 401
        assert [server.post(body, key="wrong")[0], server.get("/health")[0]] == [401, 200]
        assert [server.get("/v1/history?user=x", key)[0] for key in ("", "secret")] == [401, 200]
        assert "#" not in server.page, "a key of the user's is not printed"
        os.kill(server.engine(), signal.SIGSTOP)
        code, answer = server.post(body, key="secret")
        assert (code, answer["error"]["type"]) == (504, "timeout")
        assert server.end() == 0  # Ctrl-C ends it cleanly


def test_it_stops_at_once_while_a_request_runs() -> None:
    server = Server("--slots", 2)
    pid = server.engine()
    with asking(server, *[SLOW | {"stream": False}] * 3) as answers:
        server.has(3)  # two run and one waits
        server.process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        assert server.process.wait(30) == 143
        assert time.monotonic() - started < 2
    assert {code for code, _ in answers} <= {500, 503}
    assert "Traceback" not in server.said
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "no orphan", 5)
