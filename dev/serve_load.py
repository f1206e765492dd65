"""Load on `serve`: many clients for minutes, then the engine killed under them.

    python dev/serve_load.py MODEL.gguf [SECONDS] [CLIENTS] [KILLS]

Prints a table and, last, a JSON line. A request is lost if it ends with no HTTP status; after 429 (the queue is full)
a client waits. Memory is the sum over the server's processes.
"""

import itertools
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
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from petool_lite.console import print_json, print_table
from petool_lite.data.files import load_dataset
from petool_lite.data.openai import entry_messages, tool_json

_PATIENCE = 120  # seconds a client waits for one answer
_RETRY_S = 0.5  # after a 429; the server asks for 5 s, which would leave it idle at times
_EVERY_S = 2.0  # between two looks at the memory


@dataclass
class Tally:
    """What came back: counts by status ("lost" for none), seconds of the good ones, memory in MiB over time."""

    statuses: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, status: str, seconds: float) -> None:
        """Count one answer."""
        with self.lock:
            self.statuses[status] += 1
            if status == "200":
                self.seconds.append(seconds)


def bodies() -> list[bytes]:
    """Requests made from entries that no training saw."""
    found = []
    for entry in load_dataset("demo:test:20").entries:
        body = {"messages": entry_messages(entry), "tools": [tool_json(tool) for tool in entry.tools], "max_tokens": 64}
        found.append(json.dumps(body).encode())
    return found


@contextmanager
def server(model: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running `petool-lite serve` and its address; ended at the end."""
    line = [sys.executable, "-m", "petool_lite", "serve", "--model", str(model), "--port", "0"]
    process = subprocess.Popen([*line, "--context", "2048"], stderr=subprocess.PIPE, text=True)
    said = process.stderr.readline()
    address = re.search(r"http://\S+/v1", said)
    assert address, f"the server did not start: {said}{process.stderr.read()}"
    threading.Thread(target=process.stderr.read, daemon=True).start()
    try:
        yield process, f"{address.group()}/chat/completions"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)


def ask(address: str, body: bytes) -> str:
    """One request: its status and, for a failure, its kind."""
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=_PATIENCE) as answer:
            json.load(answer)
            return str(answer.status)
    except urllib.error.HTTPError as error:
        return f"{error.code} {json.load(error)['error']['type']}"
    except (OSError, ValueError):
        return "lost"


def client(address: str, requests: list[bytes], first: int, end: float, tally: Tally) -> None:
    """Ask one request after the other until `end`, on time.monotonic's clock."""
    for number in itertools.count(first):
        if (started := time.monotonic()) >= end:
            return
        status = ask(address, requests[number % len(requests)])
        tally.add(status, time.monotonic() - started)
        if status.startswith("429"):
            time.sleep(_RETRY_S)


def children(pid: int) -> list[int]:
    """Processes that `pid` has started and that run; the last one is the worker that holds the model."""
    return [int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()]


def own_mib(pid: int) -> float:
    """Memory of a process and its children that is no file's, in MiB; the mapped model is not counted."""
    texts = [Path(f"/proc/{each}/status").read_text() for each in (pid, *children(pid))]
    found = [re.search(r"RssAnon:\s+(\d+) kB", text) for text in texts]
    return sum(int(each[1]) for each in found if each) / 1024


def load(process: subprocess.Popen[str], address: str, seconds: float, clients: int, kills: int) -> Tally:
    """Run `clients` for `seconds`, with the engine killed `kills` times, evenly spread."""
    tally, requests, started = Tally(), bodies(), time.monotonic()
    end = started + seconds
    threads = [threading.Thread(target=client, args=(address, requests, n, end, tally)) for n in range(clients)]
    for thread in threads:
        thread.start()
    killed = 0
    while time.monotonic() < end:
        time.sleep(min(_EVERY_S, max(0.0, end - time.monotonic())))
        try:
            tally.memory.append(own_mib(process.pid))
            due = kills and time.monotonic() - started > (killed + 0.5) * seconds / kills
            if due and killed < kills and (workers := children(process.pid)):
                os.kill(workers[-1], signal.SIGKILL)
                killed += 1
        except (FileNotFoundError, ProcessLookupError):
            continue  # a worker that is just being replaced
    for thread in threads:
        thread.join()
    tally.statuses["engine killed by this test"] = killed
    return tally


def facts(tally: Tally, seconds: float) -> dict[str, Any]:
    """The figures of one phase."""
    times, memory = sorted(tally.seconds) or [0.0], tally.memory or [0.0]
    early = memory[len(memory) // 6 : len(memory) // 3] or memory
    return {
        **{name: count for name, count in sorted(tally.statuses.items())},
        "lost": tally.statuses["lost"],
        "answers a second": round(len(tally.seconds) / seconds, 2),
        "median seconds": round(times[len(times) // 2], 2),
        "longest seconds": round(times[-1], 2),
        "MiB early": round(sum(early) / len(early), 1),
        "MiB at the end": round(memory[-1], 1),
    }


def main(arguments: list[str]) -> None:
    """Both phases against servers of their own."""
    if not arguments or arguments[0].startswith("-"):
        sys.exit("usage: python dev/serve_load.py MODEL.gguf [SECONDS] [CLIENTS] [KILLS]")
    seconds, clients, kills = (int(value) for value in [*arguments[1:4], *("120", "50", "10")[len(arguments) - 1 :]])
    phases = {}
    for name, count in (("load", 0), ("load and kills", kills)):
        with server(Path(arguments[0])) as (process, address):
            phases[name] = facts(load(process, address, seconds, clients, count), seconds)
            phases[name]["status of one more"] = ask(address, bodies()[0])
    names = sorted({key for found in phases.values() for key in found})
    rows = [[name, *(str(found.get(name, 0)) for found in phases.values())] for name in names]
    print_table(f"{clients} clients for {seconds} s each, queue 8", ["", *phases], rows)
    print_json({"clients": clients, "seconds": seconds, **phases})


if __name__ == "__main__":
    main(sys.argv[1:])
