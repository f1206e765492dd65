"""The server as its clients meet it: the official client, streams, limits, a crash of the engine."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from support import wait_until

from petool_lite.models import embedded_gguf

CITY = {"type": "string", "description": "where"}
SCHEMA = {"type": "object", "properties": {"city": CITY, "days": {"type": "integer"}}, "required": ["city"]}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": 'odd "name" {}', "description": "", "parameters": {}}},
]
ASK = [{"role": "user", "content": "How is the weather in Oslo?"}]


def asleep(pid: int) -> bool:
    """Whether every thread of a process waits for something just now; one that waits for a core is not asleep."""
    states = [path.read_text().rpartition(")")[2].split()[0] for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    time.sleep(0.005)  # longer than Python lets a thread run when another one wants to
    return set(states) == {"S"}


class Server:
    def __init__(self, *arguments: str, **variables: str) -> None:
        line = [sys.executable, "-m", "petool_lite", "serve", "--model", str(embedded_gguf()), "--port", "0"]
        self.process = subprocess.Popen(
            [*line, "--context", "2048", *arguments], stderr=subprocess.PIPE, text=True, env=os.environ | variables
        )
        said = self.process.stderr.readline()
        found = re.search(r"http://\S+/v1", said)
        assert found, said + self.process.stderr.read()
        self.url = found.group()

    def post(self, body: object, key: str = "", content_type: str = "application/json") -> tuple[int, dict]:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": content_type} | ({"Authorization": f"Bearer {key}"} if key else {})
        return self.send(urllib.request.Request(f"{self.url}/chat/completions", raw, headers))

    def get(self, path: str, **headers: str) -> tuple[int, dict]:
        return self.send(urllib.request.Request(self.url.removesuffix("/v1") + path, headers=headers))

    def send(self, request: urllib.request.Request) -> tuple[int, dict]:
        try:
            with urllib.request.urlopen(request, timeout=250) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            text = error.read()
            return error.code, json.loads(text) if text.startswith(b"{") else {}

    def engine(self) -> int:
        """The process id of the engine's worker."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        pids = [int(pid) for file in tasks for pid in file.read_text().split()]
        (found,) = [pid for pid in pids if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
        return found

    def holds(self, requests: int) -> None:
        """Wait until it has so many requests and has done with them what it can while its engine is stopped."""
        wait_until(lambda: self.get("/health")[1]["requests"] == requests, f"{requests} requests")
        wait_until(lambda: all(asleep(self.process.pid) for _ in range(20)), "no thread of the server runs")

    def end(self, how: int = signal.SIGINT) -> int:
        self.process.send_signal(how)
        try:
            return self.process.wait(100)
        finally:
            self.process.kill()
            self.process.stderr.close()


@pytest.fixture(scope="module")
def server():
    running = Server("--slots", "2", "--queue", "1")
    yield running
    running.end()


@pytest.fixture(scope="module")
def client(server):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=250)  # pragma: allowlist secret


def test_the_official_client_gets_a_tool_call_for_a_whole_conversation(client) -> None:
    model = client.models.list().data[0].id
    call = {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
    used = [{"role": "user", "content": "Rome?"}, {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "liked"}]  # fmt: skip
    ask = {
        "model": model,
        "messages": used + ASK,
        "tools": TOOLS,
        "user": "ann",
        "store": False,
        "parallel_tool_calls": True,
        "seed": 1,
    }
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
    rows = [{"instruction": "Rome?", "rating": 1,
             "tool_call": {"tool_name": "get_weather", "parameters": {"city": "Rome"}}}]  # fmt: skip
    plain = client.chat.completions.create(**ask | {"messages": ASK}, extra_body={"history": rows})
    assert plain.usage.prompt_tokens == reply.usage.prompt_tokens, "both say the same history"
    result = [*ASK, {"role": "assistant", "tool_calls": [{**TOOL_CALL}]},
              {"role": "tool", "tool_call_id": "2", "content": "It rains."}]  # fmt: skip
    assert client.chat.completions.create(**ask | {"messages": result}).choices[0].finish_reason == "tool_calls"


TOOL_CALL = {"id": "2", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}


@pytest.mark.parametrize("name", ["get_weather", 'odd "name" {}'])
def test_a_named_tool_choice_is_kept_and_streams_to_the_same_call(client, name) -> None:
    choice = {"type": "function", "function": {"name": name}}
    options = {"model": "any", "messages": ASK, "tools": TOOLS, "tool_choice": choice}
    whole = client.chat.completions.create(**options).choices[0].message.tool_calls[0].function
    assert whole.name == name
    names, pieces, ends, usage = [], [], [], None
    for chunk in client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **options):
        usage = chunk.usage or usage
        for item in chunk.choices:
            ends += [item.finish_reason] if item.finish_reason else []
            for part in item.delta.tool_calls or []:
                names += [part.function.name] if part.function.name else []
                pieces.append(part.function.arguments or "")
    assert (names, "".join(pieces), ends) == ([name], whole.arguments, ["tool_calls"])
    assert usage.completion_tokens > 5
    if name == "get_weather":
        assert set(json.loads(whole.arguments)) <= {"city", "days"}


def test_responses_are_the_same_call_whole_and_streamed(client) -> None:
    flat = [{"type": "function", **tool["function"], "strict": False} for tool in TOOLS]
    before = [{"type": "function_call", "call_id": "1", "name": "get_weather", "arguments": '{"city": "Rome"}'},
              {"type": "function_call_output", "call_id": "1", "output": "liked"}]  # fmt: skip
    question = {"role": "user", "content": [{"type": "input_text", "text": ASK[0]["content"]}]}
    ask = {"model": "any", "tools": flat, "input": [{"role": "user", "content": "Rome?"}, *before, question]}
    ask["tool_choice"] = {
        "type": "allowed_tools",
        "mode": "required",
        "tools": [{"type": "function", "name": "get_weather"}],
    }
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
    status, answer = server.post(body)
    told, choice = answer["petool_lite"], answer["choices"][0]
    assert (status, told["status"], choice["finish_reason"]) == (200, "ask", "stop")
    assert choice["message"]["content"].startswith("Which tool do you mean: ")
    assert {item["name"] for item in told["candidates"]} == {tool["function"]["name"] for tool in TOOLS}
    ask = {"model": "m", "messages": ASK, "tools": TOOLS, "stream": True}
    pieces = [
        chunk.choices[0].delta for chunk in client.chat.completions.create(**ask, extra_body={"at_least": 0.999999})
    ]
    assert "".join(piece.content or "" for piece in pieces) == choice["message"]["content"]
    assert not any(piece.tool_calls for piece in pieces)
    sure = server.post(body | {"at_least": 0.000001})[1]
    assert sure["petool_lite"]["status"] == "call"
    assert sure["choices"][0]["message"]["tool_calls"]
    assert server.post(body | {"at_least": 2})[1]["error"]["param"] == "at_least"


@pytest.mark.parametrize("limit", [1, 6, 24])
def test_a_stream_that_is_cut_ends_as_one_that_is_not(server, limit) -> None:
    body = {"messages": ASK, "tools": TOOLS[:1], "stream": True, "max_tokens": limit}
    request = urllib.request.Request(
        f"{server.url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=100) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in answer.read().decode().split("\n\n") if line]
    chunks = [json.loads(line)["choices"][0] for line in lines[:-1]]
    assert (chunks[0]["delta"]["role"], chunks[-1]["finish_reason"], lines[-1]) == ("assistant", "length", "[DONE]")
    code, whole = server.post(body | {"stream": False})
    assert (code, whole["choices"][0]["finish_reason"]) == (200, "length")


def test_a_request_that_cannot_be_served_is_said_by_the_server(server) -> None:
    for body, status, said in (
        (b"{", 400, "not JSON"),
        ({"messages": ASK}, 400, "tools: expected at least one"),
        ({"messages": ASK, "tools": TOOLS, "tool_choice": "none"}, 400, "tool_choice none"),
        ({"messages": ASK, "tools": [ODD]}, 400, "the tool t: parameters.properties.a.type"),
        ({"messages": [{"role": "user", "content": "x " * 9000}], "tools": TOOLS}, 400, "exceed the context of 2,048"),
        (b" " * (4 * 2**20 + 1), 413, "exceeds"),
    ):
        code, answer = server.post(body)
        assert (code, said in answer["error"]["message"]) == (status, True), answer


ODD = {"type": "function", "function": {"name": "t", "parameters": {"properties": {"a": {"type": "inetger"}}}}}


def test_pages_of_other_sites_get_nothing(server) -> None:
    body = {"messages": ASK, "tools": TOOLS}
    assert server.post(body, content_type="text/plain")[0] == 415
    assert server.get("/v1/models", Host="evil.example")[0] == 400


def test_a_full_queue_turns_requests_away_and_health_still_answers(server) -> None:
    os.kill(server.engine(), signal.SIGSTOP)  # a request that takes as long as we like
    answers = []
    body = {"messages": ASK, "tools": TOOLS}
    threads = [threading.Thread(target=lambda: answers.append(server.post(body)[0])) for _ in range(3)]
    try:
        for thread in threads:
            thread.start()
        server.holds(3)
        code, answer = server.post(body)
        assert (code, answer["error"]["type"]) == (429, "rate_limit_error")
    finally:
        os.kill(server.engine(), signal.SIGCONT)
        for thread in threads:
            thread.join()
    assert answers == [200, 200, 200]


def test_a_crash_of_the_engine_costs_what_runs_and_what_waits_is_answered(server) -> None:
    pid = server.engine()
    os.kill(pid, signal.SIGSTOP)
    answers = []
    body = {"messages": ASK, "tools": TOOLS}
    threads = [threading.Thread(target=lambda: answers.append(server.post(body))) for _ in range(3)]
    for thread in threads:
        thread.start()
    server.holds(3)
    os.kill(pid, signal.SIGKILL)
    for thread in threads:
        thread.join()
    assert sorted(code for code, _ in answers) == [200, 500, 500]
    assert answers[0][1]["error"]["type"] == "engine_error"
    assert server.post(body)[0] == 200
    assert server.engine() != pid


LONG = {"type": "object", "properties": {f"t{n}": {"type": "string"} for n in range(12)},
        "required": [f"t{n}" for n in range(12)]}  # fmt: skip
SLOW = {"messages": ASK, "tools": [{"function": {"name": f"note_{n}", "parameters": LONG}} for n in range(8)],
        "max_tokens": -1, "stream": True}  # fmt: skip


def test_a_client_that_leaves_costs_nobody_time(server) -> None:
    """Two while their prompts are read or their replies decoded, one while it waits."""
    port, raw = int(server.url.split(":")[-1].split("/")[0]), json.dumps(SLOW).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"  # noqa: E501
    pid = server.engine()
    for seconds in (0.3, 3.0):
        clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
        for one in clients:
            one.sendall(head.encode() + raw)
        wait_until(lambda: server.get("/health")[1]["requests"] == 3, "they are there")
        time.sleep(seconds)
        for one in clients:
            one.close()
        started = time.monotonic()
        wait_until(lambda: server.get("/health")[1]["requests"] == 0, "they are gone")
        assert time.monotonic() - started < 3
    assert server.post({"messages": ASK, "tools": TOOLS})[0] == 200
    assert server.engine() == pid, "the engine was told, not killed"


def test_an_api_key_is_asked_for_and_a_slow_request_is_ended(command) -> None:
    refused = command("serve", "--model", embedded_gguf(), "--host", "0.0.0.0", "--port", "0")
    assert (refused.returncode, "no API key is set" in refused.stderr) == (2, True)
    server = Server("--timeout", "1", PETOOL_LITE_API_KEY="secret")
    try:
        body = {"messages": ASK, "tools": TOOLS}
        assert server.post(body)[0] == 401
        assert server.post(body, key="wrong")[0] == 401
        assert server.get("/v1/models")[0] == 401
        assert server.get("/health")[0] == 200
        os.kill(server.engine(), signal.SIGSTOP)
        code, answer = server.post(body, key="secret")
        assert (code, answer["error"]["type"]) == (504, "timeout")
    finally:
        assert server.end() == 0  # Ctrl-C ends it cleanly


@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_it_stops_at_once_while_a_request_runs(how, code) -> None:
    server = Server("--slots", "2")
    pid, answers = server.engine(), []
    threads = [threading.Thread(target=lambda: answers.append(server.post(SLOW | {"stream": False}))) for _ in range(3)]
    for thread in threads:
        thread.start()
    wait_until(lambda: server.get("/health")[1]["requests"] == 3, "two run and one waits")
    server.process.send_signal(how)
    started = time.monotonic()
    rest = server.process.stderr.read()
    assert server.process.wait(30) == code
    assert time.monotonic() - started < 2
    for thread in threads:
        thread.join()
    assert {code for code, _ in answers} <= {500, 503}
    assert "Traceback" not in rest
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "no orphan", 5)
    server.end()
