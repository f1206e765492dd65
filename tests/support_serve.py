"""Our own server in a process of its own, what its clients send, and what they see; and llama.cpp's in this one."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
from support import wait_until

from petool_lite.models import embedded_gguf

CITY = {"type": "string", "description": "where"}
SCHEMA = {"type": "object", "properties": {"city": CITY, "days": {"type": "integer"}}, "required": ["city"]}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": 'odd "name" {}', "description": "", "parameters": {}}},
]
ASK = [{"role": "user", "content": "How is the weather in Oslo?"}]
LONG = {"properties": {f"t{n}": {"type": "string"} for n in range(12)}, "required": [f"t{n}" for n in range(12)]}
SLOW = {"messages": ASK, "tools": [{"function": {"name": f"note_{n}", "parameters": LONG}} for n in range(8)],
        "max_tokens": -1, "stream": True}  # fmt: skip


def asleep(pid: int) -> bool:
    """Whether every thread of a process waits for something just now; one that waits for a core is not asleep."""
    states = [path.read_text().rpartition(")")[2].split()[0] for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    time.sleep(0.005)  # longer than Python lets a thread run when another one wants to
    return set(states) == {"S"}


class Server:
    """`petool-lite serve` with a model, the embedded one unless told, and these options and environment variables."""

    def __init__(self, *arguments: object, model: Path | None = None, **variables: str) -> None:
        self.log = Path(tempfile.mkdtemp(), "said")
        line = [sys.executable, "-m", "petool_lite", "serve", "--model", model or embedded_gguf(), "--port", 0]
        with self.log.open("w") as log:
            line = [*map(str, [*line, "--context", 2048, *arguments])]
            self.process = subprocess.Popen(line, stderr=log, env=os.environ | variables)
        wait_until(lambda: "to try it" in self.said or self.process.poll() is not None, "the server is ready")
        found = re.search(r"(http://\S+:(\d+)/v1)[^$]*to try it: (\S+)", self.said)
        assert found, self.said
        self.url, self.port, self.page = found[1], int(found[2]), found[3]

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def said(self) -> str:
        return self.log.read_text()

    def post(self, body: object, key: str = "", path: str = "/v1/chat/completions", **headers: str) -> tuple[int, dict]:
        return self.get(path, key, body if isinstance(body, bytes) else json.dumps(body).encode(), **headers)

    def get(self, path: str, key: str = "", raw: bytes | None = None, **headers: str) -> tuple[int, dict]:
        own = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {}) | headers
        url, method = self.url.removesuffix("/v1") + path, "GET" if raw is None else "POST"
        answer = httpx.request(method, url, content=raw, headers=own, timeout=250)
        return answer.status_code, answer.json() if answer.content.startswith(b"{") else {}

    def engine(self) -> int:
        """The process id of the engine's worker."""
        started = psutil.Process(self.process.pid).children()
        (found,) = [child.pid for child in started if "spawn_main" in str(child.cmdline())]
        return found

    def has(self, requests: int, seconds: float = 250.0) -> None:
        """Wait until it has so many requests."""
        wait_until(lambda: self.get("/health")[1]["requests"] == requests, f"{requests} requests", seconds)

    def holds(self, requests: int) -> None:
        """Wait until it has so many requests and has done with them what it can while its engine is stopped."""
        self.has(requests)
        wait_until(lambda: all(asleep(self.process.pid) for _ in range(20)), "no thread of the server runs")

    def end(self, how: int = signal.SIGINT) -> int:
        with self:
            self.process.send_signal(how)
            return self.process.wait(100)


@contextmanager
def asking(server: Server, *bodies: object) -> Iterator[list[tuple[int, dict]]]:
    """Clients that ask at once; their answers are there when the block is left, none of those that were cut off."""
    answers: list[tuple[int, dict]] = []
    with ThreadPoolExecutor(len(bodies)) as pool:
        asked = [pool.submit(server.post, body) for body in bodies]
        yield answers
    answers += [item.result() for item in asked if not item.exception()]
