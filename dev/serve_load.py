"""Load on `serve`: many clients for minutes, then the engine killed under them; or one slot, many slots and a peer.

    python dev/serve_load.py MODEL.gguf [SECONDS] [CLIENTS] [KILLS]
    python dev/serve_load.py compare MODEL.gguf [SECONDS] [CLIENTS] [ROUNDS]

Both print a table and, last, a JSON line. `compare` runs three servers in turn, as many rounds as asked: `serve` with
one slot, with as many slots as there are clients, and llama.cpp's own server (xllamacpp) with as many. Prompts have
1,000 tokens, of which all but the query are the same user's. A request is lost if it ends with no HTTP status;
after 429 (the queue is full) a client waits. Memory is the sum over the server's processes.
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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from petool_lite.console import print_json, print_table
from petool_lite.data.entries import Call
from petool_lite.data.files import load_dataset
from petool_lite.data.openai import entry_messages, tool_json
from petool_lite.inference.llama import LlamaModel
from petool_lite.inference.settings import default_threads
from petool_lite.prompt.render import Layout, prompt_ids

_PATIENCE = 120  # seconds a client waits for one answer
_RETRY_S = 0.5  # after a 429; the server asks for 5 s, which would leave it idle at times
_EVERY_S = 2.0  # between two looks at the memory


@dataclass
class Tally:
    """What came back: counts by status ("lost" for none), seconds of the good ones, memory in MiB over time."""

    statuses: Counter[str] = field(default_factory=Counter)
    replies: dict[bytes, Any] = field(default_factory=dict)  # the call or the text, by request
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


def long_bodies(model: Path, tokens: int = 1000) -> list[bytes]:
    """Requests of one user with prompts of about `tokens` tokens: they differ in the query, which comes last."""
    entries = [entry for entry in load_dataset("demo:test:60").entries if entry.answer]
    base, found = replace(entries[0], tools=(), history=()), list[bytes]()
    with LlamaModel(model, vocab_only=True) as head:
        for entry in entries:
            more = {tool.name: tool for tool in (*base.tools, *entry.tools)}
            larger = replace(base, tools=tuple(more.values()), history=(*base.history, *entry.history))
            fitting = prompt_ids(head.chat(), larger, Layout("petool", tokens), 0)
            if fitting is None or fitting.history_dropped:
                break
            base = larger
    offered = {tool.name for tool in base.tools}
    asked = [item for item in load_dataset("demo:test:1000").entries if isinstance(item.answer, Call)]
    queries = {entry.query for entry in asked if entry.answer.name in offered}
    for number in range(12):
        for query in sorted(queries):
            messages = entry_messages(replace(base, query=f"{query} ({number + 1})"))
            body = {"messages": messages, "tools": [tool_json(tool) for tool in base.tools]}
            found.append(json.dumps(body | {"max_tokens": 64, "temperature": 0}).encode())
    return found


@contextmanager
def server(model: Path, *options: str, line: tuple[str, ...] = ()) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running `petool-lite serve`, or another server that says its address likewise; ended at the end."""
    own = ("-m", "petool_lite", "serve", "--model", str(model), "--port", "0", "--context", "2048")
    process = subprocess.Popen([sys.executable, *(line or own), *options], stderr=subprocess.PIPE, text=True)
    said = process.stderr.readline()
    address = re.search(r"http://\S+/v1", said)
    assert address, f"the server did not start: {said}{process.stderr.read()}"
    threading.Thread(target=process.stderr.read, daemon=True).start()
    try:
        yield process, f"{address.group()}/chat/completions"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)


def peer(model: Path, slots: int) -> None:
    """llama.cpp's own server, until it gets a signal."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.offline = str(model), 2048 * slots, slots, True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = default_threads()
    params.use_jinja, params.verbosity = True, 0
    running = xllamacpp.Server(params)
    print(f"{running.listening_address}/v1", file=sys.stderr, flush=True)
    signal.pause()


def ask(address: str, body: bytes, tally: "Tally | None" = None) -> str:
    """One request: its status and, for a failure, its kind; the answer goes into the `tally`."""
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=_PATIENCE) as answer:
            message = json.load(answer)["choices"][0]["message"]
            if tally:
                made = [item["function"] for item in message.get("tool_calls") or ()]
                tally.replies[body] = [(one["name"], json.loads(one["arguments"])) for one in made] or message[
                    "content"
                ]
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
        status = ask(address, requests[number % len(requests)], tally)
        tally.add(status, time.monotonic() - started)
        if status.startswith("429"):
            time.sleep(_RETRY_S)


def family(pid: int) -> list[psutil.Process]:
    """A process and those that it has started and that run; the last one is the worker that holds the model."""
    own = psutil.Process(pid)
    return [own, *own.children()]


def own_mib(pid: int) -> float:
    """Memory of a process and its children that is no file's, in MiB; the mapped model is not counted."""
    return sum(each.memory_info().rss - each.memory_info().shared for each in family(pid)) / 2**20


def load(process: subprocess.Popen[str], address: str, seconds: float, clients: int, kills: int) -> Tally:
    """Run `clients` for `seconds`, with the engine killed `kills` times, evenly spread."""
    tally, requests, started = Tally(), bodies(), time.monotonic()
    end = started + seconds
    asking = threading.Thread(target=ask_all, args=(address, requests, clients, end, tally))
    asking.start()
    killed = 0
    while time.monotonic() < end:
        time.sleep(min(_EVERY_S, max(0.0, end - time.monotonic())))
        try:
            tally.memory.append(own_mib(process.pid))
            due = kills and time.monotonic() - started > (killed + 0.5) * seconds / kills
            if due and killed < kills and (workers := family(process.pid)[1:]):
                workers[-1].kill()
                killed += 1
        except psutil.NoSuchProcess:
            continue  # a worker that is just being replaced
    asking.join()
    tally.statuses["engine killed by this test"] = killed
    return tally


def cpu_seconds(pid: int) -> float:
    """CPU time that a process and its children have used."""
    return sum(sum(each.cpu_times()[:2]) for each in family(pid))


def ask_all(address: str, requests: list[bytes], clients: int, end: float, tally: Tally, apart: int = 1) -> None:
    """Run `clients` until `end`, each beginning `apart` requests after the one before."""
    threads = [threading.Thread(target=client, args=(address, requests, apart * n, end, tally)) for n in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def compare(model: Path, seconds: int, clients: int, rounds: int) -> None:
    """Replies a minute of one slot, many slots and the peer, in turns so that other load falls on all alike."""
    requests, own = long_bodies(model), ("--queue", str(clients))
    kinds = {
        "one slot": {"options": (*own, "--slots", "1")},
        f"{clients} slots": {"options": (*own, "--slots", str(clients))},
        f"xllamacpp, {clients} slots": {"line": (__file__, "peer", str(model), str(clients))},
    }
    tallies, used, took = {name: Tally() for name in kinds}, Counter[str](), Counter[str]()
    for _ in range(rounds):
        for name, how in kinds.items():
            with server(model, *how.get("options", ()), line=how.get("line", ())) as (process, address):
                for span, tally in ((5, Tally()), (seconds, tallies[name])):
                    before, started = cpu_seconds(process.pid), time.monotonic()
                    ask_all(address, requests, clients, started + span, tally, apart=7)
                used[name] += cpu_seconds(process.pid) - before
                took[name] += time.monotonic() - started
    one, rows = tallies["one slot"], {}
    for name, tally in tallies.items():
        both = [tally.replies[body] == one.replies[body] for body in tally.replies if body in one.replies]
        count = len(tally.seconds)
        rows[name] = {
            "replies a minute": round(60 * count / took[name], 1),
            "CPU seconds a reply": round(used[name] / max(1, count), 3),
            "median seconds": round(sorted(tally.seconds or [0.0])[count // 2], 2),
            "replies as of one slot": f"{sum(both)} of {len(both)}",
            "not answered": sum(tally.statuses.values()) - count,
        }
    print_table(
        f"{clients} clients, {rounds} rounds of {seconds} s, load {os.getloadavg()[0]:.1f}",
        ["", *rows],
        [[key, *(str(row[key]) for row in rows.values())] for key in next(iter(rows.values()))],
    )
    print_json({"clients": clients, "seconds": seconds, "rounds": rounds, "load": os.getloadavg(), **rows})


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
    """Both phases against servers of their own, or the comparison."""
    if arguments[:1] == ["peer"]:
        return peer(Path(arguments[1]), int(arguments[2]))
    if arguments[:1] == ["compare"] and len(arguments) > 1:
        given = [*arguments[2:], *("60", "8", "2")[len(arguments) - 2 :]]
        return compare(Path(arguments[1]), *(int(value) for value in given))
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
