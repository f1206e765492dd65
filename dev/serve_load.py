"""Replies a minute of `serve` with one slot and with many, and of a peer.

    python dev/serve_load.py MODEL.gguf [SECONDS] [CLIENTS] [ROUNDS]

Runs three servers in turn, as many rounds as asked: `serve` with one slot, with as many slots as there are clients, and
llama.cpp's own server (xllamacpp) with as many. Prompts have 1,000 tokens, of which all but the query are the same
user's. After 429 (the queue is full) a client waits. It prints a table and, last, a JSON line.
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
from contextlib import contextmanager
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
    """What came back: the call or the text by request, seconds of the good ones, and how many were not answered."""

    replies: dict[bytes, Any] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    failed: int = 0


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
        process.send_signal(signal.SIGKILL if line else signal.SIGINT)  # the peer goes on for minutes where it is busy
        process.wait(30)


def ask(address: str, body: bytes, tally: Tally) -> None:
    """One request; its answer goes into the `tally`."""
    request, started = urllib.request.Request(address, body, {"Content-Type": "application/json"}), time.monotonic()
    try:
        with urllib.request.urlopen(request, timeout=_PATIENCE) as answer:
            message = json.load(answer)["choices"][0]["message"]
        made = [item["function"] for item in message.get("tool_calls") or ()]
        called = [(one["name"], json.loads(one["arguments"])) for one in made]
        tally.replies[body] = called or message["content"]
        tally.seconds.append(time.monotonic() - started)
    except (OSError, ValueError) as error:
        tally.failed += 1
        if getattr(error, "code", 0) == 429:
            time.sleep(_RETRY_S)


def ask_all(address: str, requests: list[bytes], clients: int, end: float, tally: Tally) -> None:
    """Run `clients` until `end`, on time.monotonic's clock, each beginning seven requests after the one before."""

    def client(first: int) -> None:
        for number in itertools.count(first):
            if time.monotonic() >= end:
                return
            ask(address, requests[number % len(requests)], tally)

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(0, 7 * clients, 7)))


def cpu_seconds(pid: int) -> float:
    """CPU time that a process and its children have used."""
    own = psutil.Process(pid)
    return sum(sum(each.cpu_times()[:2]) for each in [own, *own.children()])


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
                    ask_all(address, requests, clients, started + span, tally)
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
            "not answered": tally.failed,
        }
    return rows


def main(arguments: list[str]) -> None:
    """The comparison; with `peer` first, llama.cpp's server alone until it is ended."""
    if arguments[:1] == ["peer"]:
        running = peer(arguments[1], 2048 * int(arguments[2]), int(arguments[2]))
        print(f"{running.listening_address}/v1", file=sys.stderr, flush=True)
        return signal.pause()
    if not arguments or arguments[0].startswith("-"):
        sys.exit("usage: python dev/serve_load.py MODEL.gguf [SECONDS] [CLIENTS] [ROUNDS]")
    model, *given = arguments
    seconds, clients, rounds = (int(value) for value in [*given, *("60", "8", "2")[len(given) :]])
    found = compare(Path(model), seconds, clients, rounds)
    names = dict.fromkeys(key for row in found.values() for key in row)
    rows = [[name, *(str(row.get(name, 0)) for row in found.values())] for name in names]
    print_table(f"{clients} clients, {seconds} s, load {os.getloadavg()[0]:.1f}", ["", *found], rows)
    print_json({"clients": clients, "seconds": seconds, "rounds": rounds, "load": os.getloadavg(), **found})


if __name__ == "__main__":
    main(sys.argv[1:])
