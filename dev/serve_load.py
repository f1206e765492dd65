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
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
from cpu_steps import peer

from petool_lite.console import print_json, print_table
from petool_lite.data.entries import Call, Entry
from petool_lite.data.files import load_dataset
from petool_lite.data.openai import entry_messages, tool_json
from petool_lite.inference.llama import LlamaModel
from petool_lite.prompt.render import Chat, Layout, prompt_ids

_PATIENCE = 120  # seconds a client waits for one answer
_RETRY_S = 0.5  # after a 429; the server asks for 5 s, which would leave it idle at times


@dataclass
class Tally:
    """What came back: statuses ("lost" for none), the call or the text by request, and seconds of the good ones."""

    statuses: list[str] = field(default_factory=list)
    replies: dict[bytes, Any] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)


def body_of(entry: Entry, **more: Any) -> bytes:
    """A request of at most 64 tokens made from an entry."""
    body = {"messages": entry_messages(entry), "tools": [tool_json(tool) for tool in entry.tools], "max_tokens": 64}
    return json.dumps(body | more).encode()


def grown(chat: Chat, entries: Sequence[Entry], tokens: int) -> Entry:
    """The first entry with tools and history of the others, as long as its petool prompt has at most `tokens`."""
    base = replace(entries[0], published=None)
    for entry in entries[1:]:
        tools = {tool.name: tool for tool in (*base.tools, *entry.tools)}
        larger = replace(base, tools=tuple(tools.values()), history=(*base.history, *entry.history))
        whole = prompt_ids(chat, larger, Layout("petool", 1 << 20))  # in less room descriptions would be cut
        base = larger if whole and len(whole.ids) <= tokens else base
    return base


def long_bodies(model: Path) -> list[bytes]:
    """Requests of one user with prompts of about 1,000 tokens: they differ in the query, which comes last."""
    entries = [entry for entry in load_dataset("demo:test:1000").entries if isinstance(entry.answer, Call)]
    with LlamaModel(model, vocab_only=True) as head:
        base = grown(head.chat(), entries[:60], 1000)
    offered = {tool.name for tool in base.tools}
    queries = sorted({entry.query for entry in entries if entry.answer.name in offered})
    asked = (f"{query} ({number})" for number in range(1, 13) for query in queries)
    return [body_of(replace(base, query=query), temperature=0) for query in asked]


@contextmanager
def server(
    model: Path, *options: str, line: Sequence[str] = (), env: Mapping[str, str] | None = None
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running `petool-lite serve`, or another server that says its address likewise; ended at the end."""
    own = ("-m", "petool_lite", "serve", "--model", str(model), "--port", "0")
    process = subprocess.Popen([sys.executable, *(line or own), *options], stderr=subprocess.PIPE, text=True, env=env)
    said = process.stderr.readline()
    address = re.search(r"http://\S+/v1", said)
    assert address, f"the server did not start: {said}{process.stderr.read()}"
    threading.Thread(target=process.stderr.read, daemon=True).start()
    try:
        yield process, f"{address.group()}/chat/completions"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)


def ask(address: str, body: bytes, tally: Tally) -> str:
    """One request: its status and, for a failure, its kind; the answer goes into the `tally`."""
    request, started = urllib.request.Request(address, body, {"Content-Type": "application/json"}), time.monotonic()
    try:
        with urllib.request.urlopen(request, timeout=_PATIENCE) as answer:
            message, status = json.load(answer)["choices"][0]["message"], str(answer.status)
        made = [item["function"] for item in message.get("tool_calls") or ()]
        called = [(one["name"], json.loads(one["arguments"])) for one in made]
        tally.replies[body] = called or message["content"]
        tally.seconds.append(time.monotonic() - started)
    except urllib.error.HTTPError as error:
        status = f"{error.code} {json.load(error)['error']['type']}"
    except (OSError, ValueError):
        status = "lost"
    tally.statuses.append(status)
    return status


def ask_all(address: str, requests: list[bytes], clients: int, end: float, tally: Tally, apart: int = 1) -> None:
    """Run `clients` until `end`, on time.monotonic's clock, each beginning `apart` requests after the one before."""

    def client(first: int) -> None:
        for number in itertools.count(first):
            if time.monotonic() >= end:
                return
            if ask(address, requests[number % len(requests)], tally).startswith("429"):
                time.sleep(_RETRY_S)

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(0, apart * clients, apart)))


def family(pid: int) -> list[psutil.Process]:
    """A process and those that it has started and that run; the last one is the worker that holds the model."""
    own = psutil.Process(pid)
    return [own, *own.children()]


def load(model: Path, seconds: int, clients: int, kills: int) -> dict[str, Any]:
    """Run `clients` for `seconds`, with the engine killed `kills` times, evenly spread: what came back, and memory that
    is no file's, in MiB."""
    tally, memory = Tally(), list[float]()
    requests = [body_of(entry) for entry in load_dataset("demo:test:20").entries]
    with server(model, "--context", "2048") as (process, address):
        asking = threading.Thread(target=ask_all, args=(address, requests, clients, time.monotonic() + seconds, tally))
        asking.start()
        for part in range(parts := max(kills, 10) + 1):
            time.sleep(seconds / parts)
            with suppress(psutil.NoSuchProcess):  # a worker that is just being replaced
                used = [each.memory_info() for each in family(process.pid)]
                memory.append(sum(each.rss - each.shared for each in used) / 2**20)
                if part < kills and len(used) > 1:
                    family(process.pid)[-1].kill()
        asking.join()
        last, times = ask(address, requests[0], Tally()), sorted(tally.seconds) or [0.0]
    return dict(Counter(sorted(tally.statuses))) | {
        "lost": tally.statuses.count("lost"), "status of one more": last, "kills": kills,
        "answers a second": round(len(tally.seconds) / seconds, 2),
        "median seconds": round(times[len(times) // 2], 2), "longest seconds": round(times[-1], 2),
        "MiB early": round(memory[1], 1), "MiB at the end": round(memory[-1], 1),
    }  # fmt: skip


def cpu_seconds(pid: int) -> float:
    """CPU time that a process and its children have used."""
    return sum(sum(each.cpu_times()[:2]) for each in family(pid))


def compare(model: Path, seconds: int, clients: int, rounds: int) -> dict[str, Any]:
    """Replies a minute of one slot, many slots and the peer, in turns so that other load falls on all alike."""
    requests, own = long_bodies(model), ("--context", "2048", "--queue", str(clients))
    kinds: dict[str, Any] = {
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
            "not answered": len(tally.statuses) - count,
        }
    return rows


def main(arguments: list[str]) -> None:
    """Both phases against servers of their own, or the comparison."""
    what = arguments.pop(0) if arguments[:1] in (["compare"], ["peer"]) else "load"
    if not arguments or arguments[0].startswith("-"):
        sys.exit("usage: python dev/serve_load.py MODEL.gguf [SECONDS] [CLIENTS] [KILLS]")
    model, given = Path(arguments[0]), arguments[1:]
    if what == "peer":
        running = peer(str(model), 2048 * int(given[0]), int(given[0]))
        print(f"{running.listening_address}/v1", file=sys.stderr, flush=True)
        return signal.pause()
    usual = ("60", "8", "2") if what == "compare" else ("120", "50", "10")
    seconds, clients, times = (int(value) for value in [*given, *usual[len(given) :]])
    if what == "compare":
        found = compare(model, seconds, clients, times)
    else:
        phases = {"load": 0, "load and kills": times}
        found = {name: load(model, seconds, clients, kills) for name, kills in phases.items()}
    names = dict.fromkeys(key for row in found.values() for key in row)
    rows = [[name, *(str(row.get(name, 0)) for row in found.values())] for name in names]
    print_table(f"{what}: {clients} clients, {seconds} s, load {os.getloadavg()[0]:.1f}", ["", *found], rows)
    print_json({"clients": clients, "seconds": seconds, "times": times, "load": os.getloadavg(), **found})


if __name__ == "__main__":
    main(sys.argv[1:])
