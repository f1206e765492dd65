"""Calls on this CPU beside its peers, one table in one run: `python dev/cpu_speed.py MODEL.gguf DATA [OPTIONS]`.

Peers are llama.cpp's own server as xllamacpp holds it (its build for AVX2) and llama-cpp-python's
create_chat_completion: same file, prompt text and threads, and replies of at most as many tokens as ours, since
llama-server's JSON schema allows blanks without end between two words, which random weights then write. A returning
user's state was read before; a query is new to everybody. Median and range. It refuses on a machine that is not quiet.

`--shape 3B.gguf` adds a second model (dev/export_speed.py writes one), `--flips N` compares N replies with those of the
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
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

from cpu_steps import CONTEXT, Row, tokens_of
from serve_load import server

from petool_lite.console import print_json, print_table, say
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
REPLY = 160  # tokens of a reply at the most
BEFORE = ("", "Please: ", "Once more. ", "Hello! ", "Next: ", "And now this. ", "Thanks. ", "Well, ")  # new queries
STEPS, PROGRAM = Path(__file__).with_name("cpu_steps.py"), Path(sys.executable).with_name("petool-lite")
NEW, CALL, HELPED = "llama-server, new, slot restored", "petool-lite call, new process", "petool-lite call, helped"
LOADED, API = "llama-server, loaded", "Python API, loaded"


def nearest(chat: Chat, entries: Sequence[Entry], length: int, style: str = "petool") -> Entry:
    """The entry whose prompt has about `length` tokens."""
    whole = Layout(style, 1 << 20)
    return min(entries, key=lambda entry: abs(len(chat.encode(prompt_text(chat, entry, whole))) - length))


def bounded(entries: Sequence[Entry]) -> Entry:
    """The first with the tools of all, and values from lists only, so that a model of random weights ends its reply."""
    value = {"enum": ["first", "second", "third"]}
    schema = {"type": "object", "properties": {"item": value, "order": value}, "required": ["item", "order"]}
    tools = {tool.name: replace(tool, parameters=schema) for entry in entries for tool in entry.tools}
    return replace(entries[0], tools=tuple(tools.values()))


def scene(model: Path, chat: Chat, entry: Entry, style: str, count: int, folder: Path, required: bool = False) -> Row:
    """What `cpu_steps` reads: `count` queries of one user with the same tools; whether we, too, must call one."""
    asked, layout = [replace(entry, query=before + entry.query) for before in BEFORE[:count]], Layout(style, 1 << 20)
    texts, tools = [prompt_text(chat, item, layout) for item in asked], [tool_json(tool) for tool in entry.tools]
    calls = [
        {"type": "object", "properties": {"name": {"const": tool.name}, "arguments": buildable(tool).schema},
         "required": ["name", "arguments"]} for tool in entry.tools
    ]  # fmt: skip
    rows = [interaction_row(item, rated=True) for item in entry.history]
    plain = tools if entry.published is None or style == "petool" else [published_tool(tool) for tool in entry.tools]
    return {
        "model": str(model), "required": required, "style": style, "folder": str(folder), "openai": tools,
        "schema": {"anyOf": calls}, "choice": {"type": "function", "function": {"name": entry.tools[0].name}},
        "requests": [{"query": item.query, "tools": plain, "history": rows} for item in asked],
        "prompts": [text + (CALL_START if style == "petool" else "") for text in texts], "limits": [REPLY] * count,
        "prefix": texts[0][: texts[0].rfind(entry.query)], "tokens": len(chat.encode(texts[-1])),
        "mark": len(chat.encode(CALL_START)) if style == "petool" else 0,
    }  # fmt: skip


def surroundings(folder: Path) -> dict[str, str]:
    """Where cache, memory and sockets of a process lie in `folder`."""
    return os.environ | {"PETOOL_LITE_CACHE": f"{folder}/cache", "XDG_DATA_HOME": str(folder), "XDG_RUNTIME_DIR": ""}


def timed(line: list[str], folder: Path, env: dict[str, str]) -> tuple[Row, str]:
    """Seconds, CPU seconds and peak MiB of a process, and what it printed."""
    peak = [0.0]

    def watch() -> None:  # what wait4 tells would count the memory of this process, before it became the other one
        with suppress(OSError, IndexError):
            while True:
                text = Path(f"/proc/{process.pid}/status").read_text()
                peak[0] = int(text.partition("VmHWM:")[2].split()[0]) / 1024
                time.sleep(0.02)

    started = time.perf_counter()
    with (folder / "said.log").open("w+b") as log:
        process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=log, text=True, env=env)
        watcher = Thread(target=watch)
        watcher.start()
        text = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    watcher.join()
    if status:
        raise PetoolError(f"{' '.join(line)[:200]} ended with {status}", (folder / "said.log").read_text()[-1000:])
    return {"whole": seconds, "cpu": used.ru_utime + used.ru_stime, "mib": peak[0]}, text


def asked(line: list[str], folder: Path) -> tuple[Row, Any]:
    """What a process took, and the JSON of its last line."""
    found, text = timed(line, folder, surroundings(folder))
    return found, json.loads(text.splitlines()[-1])


def step(way: str, told: Row) -> tuple[Row, list[Row]]:
    """One way of `cpu_steps` over a scene, with nothing kept of an earlier one."""
    folder = Path(told["folder"])
    for state in folder.glob("cache/users/*"):
        state.unlink()
    (folder / "scene.json").write_text(json.dumps(told))
    used, found = asked([sys.executable, str(STEPS), way, str(folder / "scene.json")], folder)
    return used, [run | {"mib": used["mib"]} for run in found]


def limits(told: Row, ours: list[Row]) -> Row:
    """What a peer's scene has: replies of as many tokens as ours have after the mark, which stands in its prompt."""
    return {"limits": [max(1, run["tokens"] - told["mark"]) for run in ours]}


def command(told: Row, place: int) -> Row:
    """`petool-lite call` of one request from the shell, with or without a helper."""
    folder = Path(told["folder"])
    (folder / "request.json").write_text(json.dumps(told["requests"][place]))
    words = f"call --model {told['model']} --request {folder / 'request.json'} --context {CONTEXT} --json"
    line = [*words.split(), "--reply-tokens", str(REPLY), "--user", "shell", "--no-store"]
    found, document = asked([str(PROGRAM), *line, *(["--required"] if told["required"] else [])], folder)
    times = document["timings"]
    return found | tokens_of(times) | {"first": found["whole"] - times["decode_s"]}


def rows_of(told: Row) -> Iterator[tuple[str, list[Row]]]:
    """Every way with its runs; what is cold is run as often as the rest, in a process of its own each time."""
    again, runs, restored = range(1, len(told["requests"])), [], []
    for place in again:
        alone = told | {key: [told[key][0], told[key][place]] for key in ("requests", "prompts", "limits")}
        ours = step("ours_in_one_process", alone)[1]
        alone |= limits(told, ours)
        runs.append([ours, *(step(way, alone)[1] for way in ("server_warm", "python_peer"))])
        used, (found,) = step("server_new", alone)
        restored.append(found | used)
    for place, state in enumerate(("cold", "loaded")):
        for number, name in enumerate(("Python API", "llama-server", "create_chat_completion")):
            yield f"{name}, {state}", [found[number][place] for found in runs]
    yield NEW, restored
    command(told, 0)
    yield CALL, [command(told, place) for place in again]
    with server(Path(told["model"]), "--context", str(CONTEXT), env=surroundings(Path(told["folder"]))):
        command(told, 0)
        yield HELPED, [command(told, place) for place in again]


def shown(runs: list[Row], key: str, digits: int = 3) -> str:
    """Median and range."""
    values = [run[key] for run in runs if key in run]
    middle, *ends = (f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({'-'.join(ends)})" if len(set(ends)) > 1 else middle


def table(name: str, told: Row) -> dict[str, list[Row]]:
    """Run and print one scene, with tokens that were read anew and replied, and how many times as fast ours is."""
    found = {}
    for way, runs in rows_of(told):
        say(f"{name}: {way}: {shown(runs, 'whole')}")
        found[way] = runs
    columns = {"first": 3, "whole": 3, "read": 0, "tokens": 0, "cpu": 3, "mib": 0}
    rows = [[way, *(shown(runs, *each) if each[0] in runs[0] else "" for each in columns.items())]
            for way, runs in found.items()]  # fmt: skip
    heads = ["", "first token, s", "whole, s", "read", "replied", "CPU s", "MiB"]
    print_table(f"{name}: prompts of {told['tokens']:,} tokens, {told['style']}", heads, rows)
    for slow, fast in ((NEW, CALL), (LOADED, API), (LOADED, HELPED)):
        slower, faster = (statistics.median(run["whole"] for run in found[way]) for way in (slow, fast))
        say(f"{fast}: {slower / faster:.2f} times as fast as {slow}")
    return found


def cold_and_bench(model: Path, data: str, chat: Chat, entries: list[Entry], folder: Path) -> Row:
    """Seconds of a new user's call here and of the published prompt's in llama-server; and seconds an entry of bench
    and of the Python API for the same entries, every one a new user's."""
    entry = nearest(chat, entries[:FREE], 3_000, "published")
    petool, published = (scene(model, chat, entry, style, 1, folder) for style in ("petool", "published"))
    ours = [step("ours_in_one_process", petool)[1][0] for _ in "123"]
    theirs = [step("server_warm", published | limits(petool, [run]))[1][0] for run in ours]
    ratio = statistics.median(run["whole"] for run in theirs) / statistics.median(run["whole"] for run in ours)
    say(f"cold {ratio:.2f} times as fast as the published prompt in llama-server")
    line = [str(PROGRAM), "bench", f"--model={model}", f"--data={data}", "--limit=12", "--json"]
    asked([*line, f"--out={folder / 'bench'}"], folder)
    rows = [json.loads(line) for file in (folder / "bench").glob("results-*.jsonl") for line in file.open()]
    benched = statistics.mean(row["seconds"] for row in rows if "seconds" in row)
    scenes = [scene(model, chat, entry, "petool", 1, folder) for entry in entries[:12]]
    called = statistics.mean(step("ours_in_one_process", told)[1][0]["whole"] for told in scenes)
    say(f"bench {benched:.3f} s an entry, the Python API {called:.3f}")
    cold = {"published prompt in llama-server": theirs, "petool prompt here": ours}
    return {"cold": cold, "seconds an entry": {"bench": benched, "call": called}}


def plain_reply(model: LlamaModel, prompt: Sequence[int], constraint: Any, most: int = 256) -> list[int]:
    """Ids of the plain engine's reply, one token at a time, without the end token."""
    found = list[int]()
    model.read(prompt, reuse=False)
    while len(found) < most:
        token = (constraint.forced() or [constraint.choose(model._logits())])[0]
        constraint.accept([token])
        if model.ends(token):
            break
        found.append(token)
        model.read([*prompt, *found])
    return found


def flips(model: Path, entries: list[Entry]) -> None:
    """Compare replies: guessed and forced ids in batches behind a restored beginning, and the plain engine's."""
    with LlamaModel(model, n_ctx=CONTEXT) as loaded:
        chat, constrainer, flipped = loaded.chat(), loaded.constrainer(), list[str]()
        for entry in entries:
            prompt = prompt_ids(chat, entry, Layout("petool", CONTEXT - 256))
            plain = plain_reply(loaded, prompt.ids, constrainer.start(entry.tools, "petool", True))
            loaded.read(prompt.ids[: prompt.shared])
            reply = loaded.generate(prompt.ids, 256, constrainer.start(entry.tools, "petool", True), reuse=True)
            flipped += [] if list(reply.ids) == plain else [[entry.id, loaded.decode(plain), reply.text]]
    print_json({"replies": len(entries), "flipped": flipped})


def main() -> None:
    """Measure on the model and data of the command line; print tables, ratios and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data")
    parser.add_argument("--shape", type=Path, help="a second model, of random weights")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--busy", action="store_true", help="measure whatever the load is, and say so")
    parser.add_argument("--flips", type=int, default=0)
    options = parser.parse_args()
    load, entries = os.getloadavg()[0], list(load_dataset(options.data).entries)
    if options.flips:
        return flips(options.model, entries[: options.flips])
    if load > QUIET and not options.busy:
        sys.exit(f"the load is {load:.2f}, more than {QUIET}: figures would tell of others; --busy measures anyway")
    results: Row = {"benchmark": "cpu", "load": load, "busy": options.busy, "cores": len(os.sched_getaffinity(0))}
    for model in filter(None, (options.model, options.shape)):
        with LlamaModel(model, vocab_only=True) as vocabulary, tempfile.TemporaryDirectory() as place:
            chat, folder, random = vocabulary.chat(), Path(place), model == options.shape
            for length in options.lengths:
                some = [bounded(entries[:count]) for count in range(1, 9)] if random else entries[:FREE]
                entry = nearest(chat, some, length)
                told = scene(model, chat, entry, "petool", options.repeats + 1, folder, random)
                results[f"{model.name}, {length}"] = table(f"{model.name}, {length:,}", told)
            if not random:
                results |= cold_and_bench(model, options.data, chat, entries, folder)
    print_json(results)


if __name__ == "__main__":
    main()
