"""Tools of real MCP servers, over stdio and over HTTP: called, run, remembered; and servers that misbehave."""

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import wait_until
from support_serve import Server

from petool_lite.data.mcp import Servers
from petool_lite.errors import PetoolError
from petool_lite.models import embedded_gguf
from petool_lite.serve.routes import OfferedTools

pytest.importorskip("mcp")

PROGRAM = """
import os, sys, time
from pathlib import Path
from mcp.server.mcpserver import MCPServer

names, port = Path(sys.argv[1]), sys.argv[2]
server = MCPServer("my files")

def echo(word: str) -> str:
    return f"heard {word}"

def fail(word: str) -> str:
    raise ValueError("no such word")

def hang(word: str) -> str:
    time.sleep(60)

def die(word: str) -> str:
    os._exit(3)

def flood(word: str) -> str:
    return "flood " * 100_000

def forget(word: str) -> str:
    server.remove_tool("echo")

for name in names.read_text().split():
    kind, _, number = name.partition("-")
    for index in range(int(number or 1)):
        server.add_tool(globals()[kind], name=f"{kind}{index or ''}", description="says what it heard")
if port == "0":
    server.run("stdio")
server.run("streamable-http", host="127.0.0.1", port=int(port))
"""


class Program:
    """A server's program, and the tools that it offers, which may change."""

    def __init__(self, folder: Path) -> None:
        self.names, self.file = folder / "names", folder / "server.py"
        self.file.write_text(PROGRAM)
        self.offer("echo")

    def offer(self, names: str) -> "Program":
        self.names.write_text(names)
        return self

    @property
    def command(self) -> str:
        return shlex.join([sys.executable, str(self.file), str(self.names), "0"])

    @contextmanager
    def http(self) -> Iterator[str]:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        line = [sys.executable, self.file, self.names, str(port)]
        process = subprocess.Popen(line, stderr=subprocess.DEVNULL)
        try:
            wait_until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0, "the server listens")
            yield f"http://127.0.0.1:{port}/mcp"
        finally:
            process.kill()
            process.wait()


@pytest.fixture
def program(tmp_path) -> Program:
    return Program(tmp_path)


def test_a_call_is_run_when_the_user_says_so_and_its_result_remembered(program, tmp_path, command) -> None:
    own = {"env": os.environ | {"XDG_DATA_HOME": str(tmp_path)}, "inline": True}
    line = ["call", "Say oak.", "--model", embedded_gguf(), "--context", "2048", "--required", "--user", "ann"]
    with program.http() as url:
        line += ["--mcp", f"web={url}", "--run"]
        said, no, silent = (command(*line, input=answer, **own) for answer in ("y\n", "n\n", ""))
        whole = json.loads(command(*line, "--mcp", program.command, "--yes", "--json", **own).stdout)
    made, result = said.stdout.splitlines()
    word = json.loads(made)["arguments"]["word"]
    assert json.loads(made)["name"] == "web__echo"
    assert (said.returncode, result) == (0, f"heard {word}"), said.stderr
    assert f"run {json.loads(made)['name']} " in said.stderr
    assert (no.returncode, no.stdout.count("\n"), "not run" in no.stderr) == (0, 1, True)
    assert (silent.returncode, "nobody said" in silent.stderr) == (2, True)
    assert whole["result"] == {"text": f"heard {whole['call']['arguments']['word']}", "failed": False}
    kept = json.loads(command("history", "list", "--json", **own).stdout)
    assert [item["result"] for item in kept] == [result, None, None, whole["result"]["text"]]
    shown = json.loads(command("history", "show", whole["id"], "--json", **own).stdout)
    assert [tool["function"]["name"] for tool in shown["tools"]] == ["web__echo", "my-files__echo"]


def test_what_a_tool_may_do(program, monkeypatch) -> None:
    """Over HTTP, where it can change its tools amid; what stdio shows is below."""
    program.offer("echo fail hang die flood forget")
    with program.http() as url:
        servers = Servers([url], run_s=3)
        named = [tool["function"]["name"].removeprefix("my-files__") for tool in servers.tools()]
        assert named == ["echo", "fail", "hang", "die", "flood", "forget"]
        assert servers.run("my-files__echo", {"word": "oak"}).text == "heard oak"
        wrong = servers.run("my-files__fail", {"word": "oak"})
        assert (wrong.failed, "Error executing tool fail" in wrong.text) == (True, True)
        flood = servers.run("my-files__flood", {"word": ""}).text
        assert (len(flood) < 70_000, flood[-22:]) == (True, "... [600,000 characters]"[-22:])
        with pytest.raises(PetoolError, match="did not answer within 3 s"):
            servers.run("my-files__hang", {"word": ""})
        servers.run("my-files__forget", {"word": ""})
        assert servers.run("my-files__echo", {"word": "oak"}).failed, "the tool is gone"
        with monkeypatch.context() as short, pytest.raises(PetoolError, match="more than 100 bytes"):
            short.setattr("petool_lite.data.mcp._ANSWER", 100)
            Servers([url]).tools()
        with pytest.raises(PetoolError) as died:
            servers.run("my-files__die", {"word": ""})
        assert "\n" not in died.value.message


def test_a_server_does_not_get_our_keys(monkeypatch) -> None:
    for name in ("PETOOL_LITE_API_KEY", "PETOOL_LITE_ENDPOINT_KEY", "A_SERVERS_OWN"):
        monkeypatch.setenv(name, name.lower())
    line = "sh -c 'echo [$PETOOL_LITE_API_KEY$PETOOL_LITE_ENDPOINT_KEY] $A_SERVERS_OWN >&2'"
    with pytest.raises(PetoolError) as told:
        Servers([line]).tools()
    assert told.value.hint == "it said last: [] a_servers_own"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["no-such-program"], "No such file"),
        (["sh -c 'echo bad key >&2'"], "Connection closed"),
        (["sleep 60"], "within 2 s"),
        pytest.param(["cat /dev/zero"], "within 2 s", marks=pytest.mark.slow),
        (["http://127.0.0.1:9/mcp"], "connection"),
        ([" "], "--mcp is empty"),
        (["echo", "echo"], "two MCP servers call themselves my-files"),
        (["echo-1001"], "offers more than 1,000 tools"),
        ([""], "offers no tools"),
    ],
)
def test_a_server_that_cannot_be_asked_is_one_line(program, given, said, capfd) -> None:
    known = [program.offer(text).command if text in ("echo", "echo-1001", "") else text for text in given]
    started = time.monotonic()
    with pytest.raises(PetoolError, match=said) as found:
        Servers(known, list_s=2 if "sleep" in str(given) or said == "within 2 s" else 30).tools()
    assert "\n" not in found.value.message + found.value.hint
    assert ("bad key" in str(given)) == (found.value.hint == "it said last: bad key")
    assert time.monotonic() - started < 20
    assert capfd.readouterr().err == ""


def test_a_running_server_offers_them_and_follows_their_changes(program, capfd) -> None:
    with Server("--mcp", program.command) as server:
        ask = {"messages": [{"role": "user", "content": "Say oak."}], "tool_choice": "required"}
        code, answer = server.post(ask)
        assert (code, answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"]) == (200, "my-files__echo")
        own = {"function": {"name": "own.tool", "parameters": {}}}
        answer = server.post(ask | {"tools": [own]})[1]
        assert answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "own.tool"
    offered = OfferedTools([program.command], fresh_s=0)

    def names() -> list[str]:
        return [tool["function"]["name"] for tool in offered.current()]

    assert names() == ["my-files__echo"]
    program.offer("echo fail")
    wait_until(lambda: names() == ["my-files__echo", "my-files__fail"], "the new tools are offered")
    program.file.write_text("")
    wait_until(lambda: "its tools of before are still offered" in capfd.readouterr().err, "that is said")
    assert len(names()) == 2
