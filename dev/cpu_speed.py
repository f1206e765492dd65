"""Calls on this CPU beside its peers', one table in one run: `python dev/cpu_speed.py MODEL.gguf DATA [OPTIONS]`.

Peers are llama.cpp's own server as xllamacpp holds it (its build for AVX2) and llama-cpp-python's
create_chat_completion: same file, same prompt text, same threads. A returning user's state was read before; a query is
new to everybody. Figures are the median of the repeats and their range. On a machine that is not quiet it refuses.

`--shape 3B.gguf` adds a second model (dev/random_model.py writes one), `--flips N` compares N replies with those of the
plain engine, one token at a time, and does nothing else.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

from petool_lite.console import print_json, say
from petool_lite.data.entries import Entry
from petool_lite.data.files import load_dataset
from petool_lite.data.openai import tool_json
from petool_lite.data.petoolbench import interaction_row, published_tool
from petool_lite.errors import PetoolError
from petool_lite.inference.llama import LlamaModel
from petool_lite.inference.schema import buildable
from petool_lite.prompt.render import CALL_START, Chat, Layout, prompt_ids, prompt_text

QUIET = 0.5  # the highest load at which a figure counts
LENGTHS = (800, 3_000)  # tokens of a returning user's prompt
FREE = 48  # entries looked at for each length
BEFORE = ("", "Please: ", "Once more. ", "Hello! ", "Next: ", "And now this. ", "Thanks. ", "Well, ")  # new queries
STEPS, PROGRAM = Path(__file__).with_name("cpu_steps.py"), Path(sys.executable).with_name("petool-lite")
Row = dict[str, Any]


def nearest(chat: Chat, entries: list[Entry], style: str, length: int) -> Entry:
    """The entry whose prompt has about `length` tokens."""
    lengths = {entry.id: len(chat.encode(prompt_text(chat, entry, Layout(style, 1 << 20)))) for entry in entries}
    return min(entries, key=lambda entry: abs(lengths[entry.id] - length))


def bounded(entry: Entry) -> Entry:
    """The entry with values from lists only, so that a model of random weights ends its reply, too."""
    value = {"enum": ["first", "second", "third"]}
    schema = {"type": "object", "properties": {"item": value, "order": value}, "required": ["item", "order"]}
    return replace(entry, tools=tuple(replace(tool, parameters=schema) for tool in entry.tools))


def scene(model: Path, chat: Chat, entry: Entry, style: str, count: int, folder: Path, required: bool = False) -> Row:
    """What `cpu_steps` reads: `count` queries of one user with the same tools; whether we, too, must call one."""
    asked = [replace(entry, query=before + entry.query) for before in BEFORE[:count]]
    layout = Layout(style, 1 << 20)
    texts = [prompt_text(chat, item, layout) for item in asked]
    calls = [
        {"type": "object", "properties": {"name": {"const": tool.name}, "arguments": buildable(tool).schema},
         "required": ["name", "arguments"]} for tool in entry.tools
    ]  # fmt: skip
    rows = [interaction_row(item, rated=True) for item in entry.history]
    tools = [tool_json(tool) for tool in entry.tools]
    plain = tools if entry.published is None or style == "petool" else [published_tool(tool) for tool in entry.tools]
    start = CALL_START if style == "petool" else ""
    choice = {"type": "function", "function": {"name": entry.tools[0].name}}
    return {
        "model": str(model), "required": required, "style": style, "folder": str(folder), "openai": tools,
        "schema": {"anyOf": calls},
        "requests": [{"query": item.query, "tools": plain, "history": rows} for item in asked], "choice": choice,
        "prompts": [text + start for text in texts], "prefix": texts[0][: texts[0].rfind(entry.query)],
        "tokens": [len(chat.encode(text)) for text in texts],
    }  # fmt: skip


def surroundings(folder: Path) -> dict[str, str]:
    """The environment of a process whose cache, memory and sockets lie in `folder`."""
    return os.environ | {"PETOOL_LITE_CACHE": f"{folder}/cache", "XDG_DATA_HOME": str(folder), "XDG_RUNTIME_DIR": ""}


def timed(line: list[str], folder: Path) -> tuple[Row, Any]:
    """Seconds, CPU seconds and peak MiB of a process, and the JSON of its last line."""
    peak = [0.0]

    def watch() -> None:  # what wait4 tells would count the memory of this process, before it became the other one
        with suppress(OSError, IndexError):
            while True:
                text = Path(f"/proc/{process.pid}/status").read_text()
                peak[0] = int(text.partition("VmHWM:")[2].split()[0]) / 1024
                time.sleep(0.02)

    started = time.perf_counter()
    with (folder / "said.log").open("w+b") as log:
        process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=log, env=surroundings(folder))
        watcher = Thread(target=watch)
        watcher.start()
        text = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    watcher.join()
    if status:
        raise PetoolError(f"{' '.join(line)[:200]} ended with {status}", (folder / "said.log").read_text()[-1000:])
    found = {"whole": seconds, "cpu": used.ru_utime + used.ru_stime, "mib": peak[0]}
    return found, json.loads(text.splitlines()[-1])


def step(way: str, told: Row, folder: Path, **more: Any) -> tuple[Row, Any]:
    """One way of `cpu_steps` over a scene, with nothing kept of an earlier one."""
    for state in folder.glob("cache/users/*"):
        state.unlink()
    (folder / "scene.json").write_text(json.dumps(told | more))
    return timed([sys.executable, str(STEPS), way, str(folder / "scene.json")], folder)


def command(told: Row, place: int, folder: Path) -> Row:
    """`petool-lite call` of one request from the shell, with or without a helper."""
    (folder / "request.json").write_text(json.dumps(told["requests"][place]))
    words = f"call --model {told['model']} --request {folder / 'request.json'} --context 8192 --reply-tokens 160 --json"
    line = [*words.split(), "--user", "shell", "--no-store", *(["--required"] if told["required"] else [])]
    found, document = timed([str(PROGRAM), *line], folder)
    return found | {"first": found["whole"] - document["timings"]["decode_s"], "reply": json.dumps(document["call"])}


@contextmanager
def helping(told: Row, folder: Path) -> Iterator[None]:
    """A `petool-lite serve` of the same model beside."""
    line = [str(PROGRAM), "serve", "--model", told["model"], "--port", "0", "--context", "8192"]
    server = subprocess.Popen(line, env=surroundings(folder), stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        while "serving" not in server.stderr.readline():
            pass
        yield
    finally:
        server.terminate()
        server.wait()


def rows_of(told: Row, folder: Path) -> Iterator[tuple[str, list[Row]]]:
    """Every way with its runs; what is cold is run as often as the rest, in a process of its own each time."""
    again = range(1, len(told["requests"]))
    cold, warm, peer, peer_warm, python, python_warm = (list[Row]() for _ in range(6))
    for place in again:
        alone = told | {key: [told[key][0], told[key][place]] for key in ("requests", "prompts")}
        for way, first, second in (
            ("ours_in_one_process", cold, warm), ("server_warm", peer, peer_warm), ("python_peer", python, python_warm)
        ):  # fmt: skip
            used, found = step(way, alone, folder)
            first.append(found[0] | {"mib": used["mib"]})
            second.append(found[1] | {"mib": used["mib"]})
    yield "cold: petool-lite, loaded", cold
    yield "cold: llama-server, loaded", peer
    yield "cold: create_chat_completion, loaded", python
    restored = (step("server_new", told, folder, place=place) for place in again)
    yield "new process: llama-server, slot restored", [found[0] | used for used, found in restored]
    command(told, 0, folder)
    yield "new process: petool-lite call", [command(told, place, folder) for place in again]
    yield "loaded: llama-server", peer_warm
    yield "loaded: create_chat_completion", python_warm
    yield "loaded: petool-lite, Python API", warm
    with helping(told, folder):
        command(told, 0, folder)
        yield "from the shell: petool-lite call, helped by serve", [command(told, place, folder) for place in again]


def shown(runs: list[Row], key: str) -> str:
    """Median and range."""
    values = [run[key] for run in runs if key in run]
    return f"{statistics.median(values):.3f} ({min(values):.3f}-{max(values):.3f})" if values else ""


def table(name: str, told: Row, folder: Path) -> dict[str, list[Row]]:
    """Run and print one scene."""
    found = {}
    for way, runs in rows_of(told, folder):
        say(f"{name}: {way}: {shown(runs, 'whole')}")
        found[way] = runs
    print(f"\n{name}: prompts of {told['tokens'][1]:,} tokens, {told['style']}\n")
    print("| | first token, s | whole reply, s | CPU s | MiB |\n| --- | ---: | ---: | ---: | ---: |")
    for way, runs in found.items():
        figures = [shown(runs, key) for key in ("first", "whole", "cpu")]
        print("|", " | ".join([way, *figures, f"{max(run['mib'] for run in runs):.0f}"]), "|", flush=True)
    return found


def bench_seconds(model: Path, data: str, chat: Chat, entries: list[Entry], folder: Path) -> tuple[float, float]:
    """Seconds an entry of bench, and of the Python API for the same entries, every one a new user's."""
    line = [str(PROGRAM), "bench", f"--model={model}", f"--data={data}", f"--limit={len(entries)}", "--json"]
    timed([*line, f"--out={folder / 'bench'}"], folder)
    rows = [json.loads(line) for file in (folder / "bench").glob("results-*.jsonl") for line in file.open()]
    benched = [row["seconds"] for row in rows if "seconds" in row]
    scenes = (scene(model, chat, entry, "petool", 1, folder) for entry in entries)
    called = [step("ours_in_one_process", told, folder)[1][0]["whole"] for told in scenes]
    return statistics.mean(benched), statistics.mean(called)


def flips(model: Path, entries: list[Entry]) -> None:
    """Compare replies: guessed and forced ids in batches behind a restored beginning, and the plain engine's."""
    with LlamaModel(model, n_ctx=8192) as loaded:
        chat, constrainer, flipped = loaded.chat(), loaded.constrainer(), list[str]()
        for number, entry in enumerate(entries, 1):
            prompt = prompt_ids(chat, entry, Layout("petool", 8192 - 256))
            assert prompt is not None
            plain, constraint = list[int](), constrainer.start(entry.tools, "petool", True)
            loaded.read(prompt.ids, reuse=False)
            while len(plain) < 256:
                token = (constraint.forced() or [constraint.choose(loaded._logits())])[0]
                constraint.accept([token])
                if loaded.ends(token):
                    break
                plain.append(token)
                loaded.read([*prompt.ids, *plain])
            loaded.read(prompt.ids[: prompt.shared])
            reply = loaded.generate(prompt.ids, 256, constrainer.start(entry.tools, "petool", True), reuse=True)
            if list(reply.ids) != plain:
                flipped.append(entry.id)
                say(f"{number}: {loaded.decode(plain)!r} became {reply.text!r}")
    print_json({"replies": len(entries), "flipped": flipped})


def main() -> None:
    """Measure on the model and data of the command line; print tables, ratios and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("data")
    parser.add_argument("--shape", type=Path, help="a second model, of random weights")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--busy", action="store_true", help="measure whatever the load is, and say so")
    parser.add_argument("--flips", type=int, default=0)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    entries = list(load_dataset(options.data).entries)
    if options.flips:
        return flips(options.model, entries[: options.flips])
    if load > QUIET and not options.busy:
        sys.exit(f"the load is {load:.2f}, more than {QUIET}: figures would tell of others; --busy measures anyway")
    results: Row = {"benchmark": "cpu", "load": load, "busy": options.busy, "cores": len(os.sched_getaffinity(0))}
    for model in filter(None, (options.model, options.shape)):
        with LlamaModel(model, vocab_only=True) as vocabulary, tempfile.TemporaryDirectory() as place:
            chat, folder, last = vocabulary.chat(), Path(place), dict[str, list[Row]]()
            for length in options.lengths:
                entry = nearest(chat, entries[:FREE], "petool", length)
                entry = bounded(entry) if model == options.shape else entry
                told = scene(model, chat, entry, "petool", options.repeats + 1, folder, model == options.shape)
                last = table(f"{model.name}, {length:,}", told, folder)
                new, call = "new process: llama-server, slot restored", "new process: petool-lite call"
                helped, api = "from the shell: petool-lite call, helped by serve", "loaded: petool-lite, Python API"
                for slow, fast in ((new, call), ("loaded: llama-server", api), ("loaded: llama-server", helped)):
                    slower, faster = (statistics.median(run["whole"] for run in last[way]) for way in (slow, fast))
                    say(f"{fast}: {slower / faster:.2f} times as fast as {slow}")
                results[f"{model.name}, {length}"] = last
            if model == options.model:
                entry = nearest(chat, entries[:FREE], "published", 3_000)
                published, ours = (
                    [step(way, scene(model, chat, entry, style, 1, folder), folder)[1][0]["whole"] for _ in range(3)]
                    for way, style in (("server_warm", "published"), ("ours_in_one_process", "petool"))
                )
                results["cold"] = {"published prompt in llama-server": published, "petool prompt here": ours}
                say(f"cold {statistics.median(published) / statistics.median(ours):.2f} x as fast as llama-server's")
                benched, called = bench_seconds(model, options.data, chat, entries[:12], folder)
                results["seconds an entry"] = {"bench": benched, "call": called}
                say(f"bench {benched:.3f} s an entry, the Python API {called:.3f}")
    print_json(results)


if __name__ == "__main__":
    main()
