"""The server as its clients meet it: the official client, streams, limits, a crash of the engine."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from petool_lite.bench.serve_load import engine
from support import wait_until

from petool_lite.inference.worker import Pieces
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
        found = engine(self.process.pid)
        assert found, "no worker"
        return found

    def holds(self, requests: int) -> None:
        """Wait until it has so many requests and has done with them what it can while its engine is stopped."""
        wait_until(lambda: self.get("/health")[1]["requests"] == requests, f"{requests} requests")
        wait_until(lambda: all(asleep(self.process.pid) for _ in range(20)), "no thread of the server runs")

    def end(self) -> int:
        self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(100)
        finally:
            self.process.kill()
            self.process.stderr.close()


@pytest.fixture(scope="module")
def server():
    running = Server("--queue", "1")
    yield running
    running.end()


@pytest.fixture(scope="module")
def client(server):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=250)  # pragma: allowlist secret


def test_the_official_client_gets_a_tool_call(client) -> None:
    model = client.models.list().data[0].id
    history = [{"instruction": "q", "tool_call": {"tool_name": "x", "parameters": {}}, "rating": 1}]
    reply = client.chat.completions.create(
        model=model, messages=ASK, tools=TOOLS, user="ann", extra_body={"history": history}
    )
    choice = reply.choices[0]
    call = choice.message.tool_calls[0].function
    assert choice.finish_reason == "tool_calls"
    assert call.name in ("get_weather", 'odd "name" {}')
    assert isinstance(json.loads(call.arguments), dict)
    assert reply.usage.prompt_tokens > 50
    again = client.chat.completions.create(
        model=model, messages=ASK, tools=TOOLS, user="ann", extra_body={"history": history}
    )
    assert again.usage.prompt_tokens_details.cached_tokens > 0.7 * again.usage.prompt_tokens
    assert again.choices[0].message.tool_calls[0].function == call


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


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"{", 400, "not JSON"),
        ({"messages": ASK}, 400, "give tools"),
        ({"messages": ASK, "tools": TOOLS, "tool_choice": "none"}, 400, "give tools"),
        ({"messages": [], "tools": TOOLS}, 400, "role user"),
        ({"messages": ASK, "tools": [{"type": "function"}]}, 400, "tools[0].function.name"),
        ({"messages": ASK, "tools": TOOLS, "history": [{}]}, 400, "history[0]"),
        ({"messages": [{"role": "user", "content": "x " * 9000}], "tools": TOOLS}, 400, "exceed the context of 2,048"),
        (b" " * (4 * 2**20 + 1), 413, "exceeds"),
    ],
)
def test_what_cannot_be_served_is_said(server, body, status, said) -> None:
    code, answer = server.post(body)
    assert (code, said in answer["error"]["message"]) == (status, True), answer


def test_pages_of_other_sites_get_nothing(server) -> None:
    body = {"messages": ASK, "tools": TOOLS}
    assert server.post(body, content_type="text/plain")[0] == 415
    assert server.get("/v1/models", Host="evil.example")[0] == 400


def test_a_full_queue_turns_requests_away_and_health_still_answers(server) -> None:
    os.kill(server.engine(), signal.SIGSTOP)  # a request that takes as long as we like
    answers = []
    body = {"messages": ASK, "tools": TOOLS}
    threads = [threading.Thread(target=lambda: answers.append(server.post(body)[0])) for _ in range(2)]
    try:
        for thread in threads:
            thread.start()
        server.holds(2)
        code, answer = server.post(body)
        assert (code, answer["error"]["type"]) == (429, "rate_limit_error")
    finally:
        os.kill(server.engine(), signal.SIGCONT)
        for thread in threads:
            thread.join()
    assert answers == [200, 200]


def test_a_crash_of_the_engine_costs_one_request(server) -> None:
    pid = server.engine()
    os.kill(pid, signal.SIGSTOP)
    answers = []
    body = {"messages": ASK, "tools": TOOLS}
    thread = threading.Thread(target=lambda: answers.append(server.post(body)))
    thread.start()
    server.holds(1)
    os.kill(pid, signal.SIGKILL)
    thread.join()
    assert answers[0][0] == 500
    assert answers[0][1]["error"]["type"] == "engine_error"
    assert server.post(body)[0] == 200
    assert server.engine() != pid


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


def test_a_reply_is_cut_into_name_and_arguments_wherever_its_tokens_end() -> None:
    for name, arguments in (("t", {}), ('odd", "parameters": {"x": "y"}', {"a": ', "parameters": ', "b": "日本 👋"})):
        call = {"tool_name": name, "parameters": arguments}
        raw = json.dumps(call, ensure_ascii=False).encode()
        for step in (1, 2, 7, 1000):
            pieces = Pieces()
            ends = [*range(step, len(raw), step), len(raw)]
            found = [piece for end in ends for piece in pieces.grown(raw[:end].decode("utf-8", "replace"))]
            assert found[0] == {"name": name}
            assert json.loads("".join(piece["arguments"] for piece in found[1:])) == arguments
