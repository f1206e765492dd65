"""First-token times on this CPU beside a peer's: `python -m cpu_speed MODEL.gguf DATA [COUNT]`.

The peer is llama-cpp-python's create_chat_completion with its tool grammar: same file, same prompt text, same threads,
and the same guard against crashing AMX kernels. It is given the right tool, so that its grammar has nothing to choose.
Each side runs in a process of its own; loading the model is left out on both.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from petool_lite.console import print_json, print_table, say
from petool_lite.data.entries import Call, Entry
from petool_lite.data.files import load_dataset
from petool_lite.data.openai import tool_json
from petool_lite.errors import PetoolError
from petool_lite.inference.call import CallOptions, ToolCaller
from petool_lite.inference.llama import LlamaModel
from petool_lite.inference.parse import CallFailure
from petool_lite.inference.settings import default_threads, library_version, tuned_settings
from petool_lite.inference.states import StateStore
from petool_lite.prompt.render import Layout, prompt_text

LOW, HIGH = 2_800, 3_300  # tokens of the published prompts that are timed
CONTEXT, REPLY = 8_192, 48
PUBLISHED = Layout("published", CONTEXT)
OTHER = "Please do the same for Lisbon, and for the second of next month."


def chosen_entries(model: Path, data: str, count: int) -> list[Entry]:
    """The first entries whose published prompt has about 3,000 tokens; raises PetoolError if there are none."""
    with LlamaModel(model, vocab_only=True) as vocabulary:
        chat = vocabulary.chat()
        lengths = (
            (entry, len(chat.encode(prompt_text(chat, entry, PUBLISHED)))) for entry in load_dataset(data).entries
        )
        found = [entry for entry, length in lengths if LOW <= length <= HIGH][:count]
    if not found:
        raise PetoolError(f"{data} has no prompt of {LOW:,} to {HIGH:,} tokens", "give the published entries")
    return found


def first_token(caller: ToolCaller, entry: Entry, user: str | None = None) -> dict[str, Any]:
    """Seconds from the request to the first chosen token, and what was read for it."""
    seen: list[float] = []
    options = CallOptions(reply_tokens=REPLY, watch=lambda text: seen.append(time.perf_counter()))
    started = time.perf_counter()
    try:
        timings = caller.call_entry(entry, user, options).timings
    except CallFailure:  # random weights, or a long answer: the first token is what counts here
        timings = {}
    return {**timings, "seconds": round(seen[0] - started, 4)}


def our_times(model: Path, entry: Entry, folder: Path) -> dict[str, Any]:
    """Cold with either prompt style, and the returning user with a new query in a new engine."""
    found: dict[str, Any] = {}
    with ToolCaller(model, CONTEXT, style="petool") as caller:
        found["cold, petool prompt"] = first_token(caller, entry)
    with ToolCaller(model, CONTEXT, style="published", store=StateStore(folder)) as caller:
        found["cold, published prompt"] = first_token(caller, entry, "user")
    with ToolCaller(model, CONTEXT, style="published", store=StateStore(folder)) as caller:
        found["returning, from disk"] = first_token(caller, replace(entry, query=OTHER), "user")
        found["returning, same process"] = first_token(caller, entry, "user")
    found["state_bytes"] = sum(file.stat().st_size for file in folder.iterdir())
    return found


def peer_times(model: Path, entry: Entry) -> dict[str, Any]:
    """The peer's, cold and with what its own process still holds."""
    import llama_cpp

    original = llama_cpp.llama_cpp.llama_model_default_params

    def guarded() -> Any:
        options = original()
        options.use_extra_bufts = False
        return options

    llama_cpp.llama_cpp.llama_model_default_params = guarded
    cores = default_threads()
    peer = llama_cpp.Llama(str(model), n_ctx=CONTEXT, n_threads=cores, n_threads_batch=cores, verbose=False)
    with LlamaModel(model, vocab_only=True) as vocabulary:
        chat = vocabulary.chat()
    same = replace(entry, query=OTHER)
    return {"cold": _peer_first_token(peer, chat, entry), "same process": _peer_first_token(peer, chat, same)}


def _peer_first_token(peer: Any, chat: Any, entry: Entry) -> dict[str, Any]:
    from llama_cpp.llama_chat_format import ChatFormatterResponse, chat_formatter_to_chat_completion_handler

    text = prompt_text(chat, entry, PUBLISHED)
    peer.chat_handler = chat_formatter_to_chat_completion_handler(
        lambda **_: ChatFormatterResponse(prompt=text, stop=chat.eos_token, added_special=True)
    )
    seen: list[float] = []

    def watch(ids: Any, scores: Any) -> Any:  # runs just before the first token is chosen
        seen.append(time.perf_counter())
        return scores

    assert isinstance(entry.answer, Call)
    chosen = {"type": "function", "function": {"name": entry.answer.name}}
    messages = [{"role": "user", "content": entry.query}]
    started = time.perf_counter()
    reply = peer.create_chat_completion(
        messages, tools=[tool_json(tool) for tool in entry.tools], tool_choice=chosen, temperature=0.0, max_tokens=1,
        logits_processor=[watch],
    )  # fmt: skip
    return {"seconds": seen[0] - started, "prompt_tokens": reply["usage"]["prompt_tokens"]}


def _step(side: str, arguments: list[str], place: int) -> dict[str, Any]:
    """One side's times for one entry, in a process of its own."""
    line = [sys.executable, "-m", "cpu_speed", "--step", side, *arguments, str(place)]
    output = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def _run_step(side: str, model: Path, data: str, count: int, place: int) -> None:
    entry = chosen_entries(model, data, count)[place]
    with tempfile.TemporaryDirectory() as folder:
        print_json(peer_times(model, entry) if side == "peer" else our_times(model, entry, Path(folder)))


def main() -> None:
    """Compare on the model and data of the command line; print a table and one JSON line."""
    if sys.argv[1:2] == ["--step"]:
        side, file, source, number, place = sys.argv[2:7]
        _run_step(side, Path(file), source, int(number), int(place))
        return
    if len(sys.argv) < 3:
        sys.exit("usage: python -m cpu_speed MODEL.gguf DATA [COUNT]")
    model, arguments = Path(sys.argv[1]), [*sys.argv[1:4], "3"][:3]
    load, rows = os.getloadavg()[0], []
    for place in range(len(chosen_entries(model, arguments[1], int(arguments[2])))):
        rows.append({side: _step(side, arguments, place) for side in ("ours", "peer")})
        say(f"entry {place + 1} of {arguments[2]}")
    cold = [row["peer"]["cold"]["seconds"] for row in rows]
    names = [(side, name) for side in ("peer", "ours") for name in rows[0][side] if name != "state_bytes"]
    lines = [[f"{side}: {name}", *_shown([row[side][name]["seconds"] for row in rows], cold)] for side, name in names]
    print_table(f"{model.name}: seconds to the first token", ["", "median", "peer's cold / this", "n"], lines)
    facts = {"cores": default_threads(), "load": load, "llama_cpp_python": library_version()}
    print_json(
        {"benchmark": "cpu", "model": model.name, **facts, "settings": asdict(tuned_settings(model)), "rows": rows}
    )


def _shown(seconds: list[float], cold: list[float]) -> list[str]:
    middle = sorted(seconds)[len(seconds) // 2]
    return [f"{middle:.3f}", f"{sorted(cold)[len(cold) // 2] / middle:.1f}", str(len(seconds))]


if __name__ == "__main__":
    main()
