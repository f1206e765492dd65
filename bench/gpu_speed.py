"""Generating on a GPU beside the published script's way: `python -m petool_lite.bench.gpu_speed MODEL DATA [options]`.

MODEL is a directory in Hugging Face format, DATA published entries (repeated where there are fewer than are asked
for). The peer is transformers' generate, one prompt at a time, as the published evaluation runs it, on the same model
object in the same process. Random weights never end a reply, so with `--fixed` each reply has as many tokens as the
entry's right answer, on both sides.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from petool_lite.console import print_json, print_table, say
from petool_lite.data.entries import Entry
from petool_lite.data.files import load_dataset
from petool_lite.inference.constrain import Constrainer
from petool_lite.inference.gpu import BATCH, GpuModel, Job, stop_ids
from petool_lite.inference.llama import Reply
from petool_lite.prompt import Chat, Layout, chat_from_directory, prompt_ids
from petool_lite.runs import versions

REPLY = 256
TIMES = ("prefill_s", "decode_s")


@dataclass(frozen=True)
class Work:
    """Prompts with the entries that they come from, and what is asked of each."""

    prompts: list[list[int]]
    entries: list[Entry]
    job: Job


def prepare(directory: Path, data: str, style: str, count: int, fixed: bool) -> Work:
    """`count` prompts of the rating setting, with reply lengths of the right answers if `fixed`."""
    chat: Chat = chat_from_directory(directory)
    longest = json.loads((directory / "config.json").read_text())["max_position_embeddings"] - REPLY
    found = []
    for entry in load_dataset(data, "rating").entries:
        fitted = prompt_ids(chat, entry, Layout("rating", style, longest))
        if fitted and entry.gold:
            found.append((fitted[0], entry, len(chat.encode(entry.gold.to_json())) + 1))
    chosen = [found[place % len(found)] for place in range(count)]
    assert chat.decode is not None  # a chat from a directory has one
    lengths = [item[2] for item in chosen] if fixed else None
    stops = frozenset[int]() if fixed else stop_ids(directory, chat)
    job = Job(REPLY, chat.eos_id, stops, chat.decode, lengths=lengths)
    return Work([item[0] for item in chosen], [item[1] for item in chosen], job)


def random_adapter(directory: Path, folder: Path, rank: int = 32) -> Path:
    """An adapter of random weights on all seven linears, for models that have no trained one."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device("meta"):
        from transformers import AutoConfig

        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype=torch.bfloat16)
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
    weights = {}
    for name, value in model.state_dict().items():
        if "lora_" in name:
            key = name.replace(".default", "")
            weights[key] = torch.randn(value.shape, device=device, dtype=torch.float32).mul_(0.01).cpu().contiguous()
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors")
    model.peft_config["default"].save_pretrained(str(folder))
    return folder


def spread(items: int, count: int, lengths: Sequence[int]) -> list[int]:
    """`count` indices at even steps of the order by length."""
    order = sorted(range(items), key=lambda index: lengths[index])
    step = items / count
    return [order[int((place + 0.5) * step)] for place in range(min(count, items))]


def peer(model: Any, work: Work, chosen: Sequence[int]) -> tuple[float, dict[int, tuple[int, ...]]]:
    """Seconds of transformers' generate over the chosen prompts, one at a time, and their reply ids."""
    import torch

    found, seconds, end, stops = {}, 0.0, work.job.eos_id, sorted(work.job.stops)
    for place, index in enumerate([chosen[0], *chosen]):  # the first one warms up
        count = work.job.lengths[index] if work.job.lengths else 0
        ids = torch.tensor([work.prompts[index]], device=model.device)
        started = time.perf_counter()
        with torch.inference_mode():
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count or work.job.max_tokens,
                min_new_tokens=count or None,
                do_sample=False,
                eos_token_id=stops or None,
                pad_token_id=end,
            )[0, ids.shape[1] :].tolist()
        if place:
            seconds += time.perf_counter() - started
            ended = next((spot for spot, token in enumerate(output) if token in stops), len(output))
            found[index] = tuple(output[:ended])
    return seconds, found


def generate_all(engine: GpuModel, work: Work) -> tuple[float, dict[int, Reply]]:
    """Seconds and replies by index; says how far it is after every batch, so that a cut run tells something."""
    started = time.perf_counter()
    replies: dict[int, Reply] = {}
    told = 0
    for index, reply in engine.generate(work.prompts, work.job):
        replies[index] = reply
        if len(replies) - told >= BATCH:
            told = len(replies)
            reading, writing = (sum(getattr(item, name) for item in replies.values()) for name in TIMES)
            spent = time.perf_counter() - started
            say(f"{told} entries after {spent:.1f} s: {reading:.1f} s reading, {writing:.1f} s writing")
    return time.perf_counter() - started, replies


def measure(engine: GpuModel, work: Work, sample: int, constrained: int, directory: Path) -> dict[str, Any]:
    """All figures of one loaded model; times in seconds."""
    seconds, replies = generate_all(engine, work)
    reading, writing = (sum(getattr(reply, name) for reply in replies.values()) for name in TIMES)
    read, written = sum(map(len, work.prompts)), sum(len(reply.ids) for reply in replies.values())
    peak = engine.peak_memory_gb()
    chosen = spread(len(work.prompts), sample, [len(prompt) for prompt in work.prompts])
    peer_seconds, theirs = peer(engine.model, work, chosen)
    say(f"the peer: {peer_seconds:.1f} s for {len(chosen)} entries")
    flips, checked = engine.flips(work.prompts, work.job, BATCH, sample)
    per_entry, peer_entry = seconds / len(work.prompts), peer_seconds / len(chosen)
    found = {
        "entries": len(work.prompts),
        "prompt_tokens": read,
        "longest": max(map(len, work.prompts)),
        "reply_tokens": written,
        "seconds": round(seconds, 1),
        "prefill_s": round(reading, 1),
        "decode_s": round(writing, 1),
        "prefill_tokens_per_s": round(read / reading),
        "decode_tokens_per_s": round(written / writing),
        "peer_s_per_entry": round(peer_entry, 3),
        "s_per_entry": round(per_entry, 4),
        "times_the_peer": round(peer_entry / per_entry, 1),
        "flips": f"{flips} of {checked}",
        "same_as_peer": f"{sum(replies[index].ids == ids for index, ids in theirs.items())} of {len(theirs)}",
        "peak_gb": round(peak, 2),
    }
    say(json.dumps(found))
    if constrained:
        found |= _constrained(engine, work, chosen=range(min(constrained, len(work.prompts))), directory=directory)
    return found


def _constrained(engine: GpuModel, work: Work, chosen: Sequence[int], directory: Path) -> dict[str, Any]:
    """The same entries free and held to calls of their tools, replies up to the limit."""
    constrainer = Constrainer.from_directory(directory, work.job.eos_id)
    tools = [work.entries[index].prompt("rating").tools for index in chosen]
    prompts = [work.prompts[index] for index in chosen]
    free = replace(work.job, lengths=[work.job.lengths[index] for index in chosen] if work.job.lengths else None)
    held = replace(work.job, lengths=None, stops=frozenset({work.job.eos_id}))
    found: dict[str, float] = {"constrained_entries": len(prompts)}
    for name, job in (
        ("free", free),
        ("constrained", replace(held, constrain=lambda place: constrainer.start(tools[place]))),
    ):
        started = time.perf_counter()
        replies = [reply for _, reply in engine.generate(prompts, job)]
        tokens = sum(len(reply.ids) for reply in replies)
        decode = sum(reply.decode_s for reply in replies)
        found[f"{name}_s"] = round(time.perf_counter() - started, 2)
        found[f"{name}_tokens"] = tokens
        found[f"{name}_decode_tokens_per_s"] = round(tokens / decode)
    return found


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m petool_lite.bench.gpu_speed")
    parser.add_argument("model", type=Path)
    parser.add_argument("data")
    parser.add_argument("--precision", default="bf16,nf4", help="bf16, nf4, or both with a comma")
    parser.add_argument("--adapter", type=Path, help="a PEFT adapter; random weights on seven linears if not given")
    parser.add_argument("--style", choices=["published", "compact"], default="published")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--sample", type=int, default=4, help="entries for the peer and for the check of batching")
    parser.add_argument("--constrained", type=int, default=0, help="entries to decode under constraint as well")
    parser.add_argument("--fixed", action="store_true", help="replies as long as the right answers, for random weights")
    parser.add_argument("--device", default=None, help="cpu, to try this script without a GPU")
    return parser.parse_args()


def main() -> None:
    """Measure on the model and data of the command line; print a table and one JSON line a precision."""
    options = _options()
    work = prepare(options.model, options.data, options.style, options.count, options.fixed)
    say(f"{len(work.prompts)} prompts, {sum(map(len, work.prompts)):,} tokens")
    for precision in options.precision.split(","):
        with tempfile.TemporaryDirectory() as folder:
            adapter = options.adapter or random_adapter(options.model, Path(folder))
            started = time.perf_counter()
            engine = GpuModel(options.model, adapter, precision, options.device)
            loaded = time.perf_counter() - started
        say(f"{precision} loaded in {loaded:.1f} s")
        found = {"load_s": round(loaded, 1)}
        found |= measure(engine, work, options.sample, options.constrained, options.model)
        del engine  # its memory goes before the next one comes
        _print(options, precision, found)


def _print(options: argparse.Namespace, precision: str, found: dict[str, Any]) -> None:
    import torch

    title = f"{options.model.name}, {precision}, adapter {'merged' if precision == 'bf16' else 'on it'}"
    print_table(title, ["", ""], [[key.replace("_", " "), str(value)] for key, value in found.items()])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    facts = {"precision": precision, "model": str(options.model), "device": device, "fixed": options.fixed}
    print_json({"benchmark": "gpu", **facts, **found, "versions": versions()})


if __name__ == "__main__":
    main()
