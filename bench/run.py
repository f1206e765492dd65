"""Generate: one greedy reply an entry, one line a reply. Scoring is another step over the finished file."""

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from petool_lite.bench.variants import GPU, Variant

from petool_lite.console import Report, facts_text
from petool_lite.data.entries import Entry
from petool_lite.data.files import Dataset
from petool_lite.errors import PetoolError
from petool_lite.inference.constrain import Constrainer, Constraint
from petool_lite.inference.llama import LlamaModel, Reply
from petool_lite.inference.parse import failure
from petool_lite.prompt import Chat, Layout, chat_from_directory, prompt_ids, spread
from petool_lite.runs import draft

_UNKNOWN_STYLE = "published"


def generate_results(
    variant: Variant, dataset: Dataset, setting: str, max_reply_tokens: int, target: Path, report: Report
) -> None:
    """Write one row an entry to `target`: entry, gold, reply, status, tokens and times.

    An entry longer than the model's context loses old history, counted in the row; one that is too long even then
    has the status "too_long" and scores as wrong. A failure of the engine is "engine_error", never a wrong answer.
    `failure` names what keeps a reply from being a valid call (inference.parse); scoring does not look at it.
    """
    engine = _gpu_replies if variant.engine == GPU else _llama_replies
    stage = f"bench {variant.name}"
    total = len(dataset.entries)
    report(stage, 0, total, "")
    rows: dict[int, dict[str, Any]] = {}
    for index, row in engine(variant, dataset, setting, max_reply_tokens, report):
        facts = {"variant": variant.name, "setting": setting, "decoding": variant.decoding}
        rows[index] = _identity(dataset.entries[index]) | row | facts
        report(stage, len(rows), total, _speed(row))
    with draft(target) as path, path.open("w") as file:
        for index in range(total):
            file.write(json.dumps(rows[index], ensure_ascii=False) + "\n")


def _identity(entry: Entry) -> dict[str, Any]:
    gold = entry.gold
    assert gold is not None  # checked before any model was loaded
    return {"entry_id": entry.id, "gold": {"tool_name": gold.tool_name, "parameters": dict(gold.parameters)}}


def _fitted(
    chat: Chat, dataset: Dataset, layout: Layout, report: Report
) -> tuple[dict[int, list[int]], Iterator[tuple[int, dict[str, Any]]], dict[int, int]]:
    """Prompts that fit by entry index, finished rows for those that do not, and how much history each lost."""
    found = {index: prompt_ids(chat, entry, layout) for index, entry in enumerate(dataset.entries)}
    fits = {index: fitted[0] for index, fitted in found.items() if fitted}
    report(facts_text("prompts", _lengths(found)), 0, 0, "")
    facts = {"status": "too_long", "prompt_tokens": 0, "seconds": 0.0, "style": layout.style, "history_dropped": 0}
    misfits = ((index, dict(facts)) for index, fitted in found.items() if not fitted)
    return fits, misfits, {index: fitted[1] for index, fitted in found.items() if fitted}


def _lengths(found: Mapping[int, tuple[list[int], int] | None]) -> dict[str, int]:
    """The table that is shown before scoring."""
    fits = [fitted for fitted in found.values() if fitted]
    counts = {"entries": len(found), "trimmed": sum(lost > 0 for _, lost in fits), "too_long": len(found) - len(fits)}
    return counts | {f"tokens_{name}": value for name, value in spread([len(ids) for ids, _ in fits]).items()}


def _llama_replies(
    variant: Variant, dataset: Dataset, setting: str, max_reply_tokens: int, report: Report
) -> Iterator[tuple[int, dict[str, Any]]]:
    with LlamaModel(variant.model, vocab_only=True) as vocabulary:
        style = variant.style or vocabulary.metadata.get("petool_lite.prompt_style", _UNKNOWN_STYLE)
        layout = Layout(setting, style, vocabulary.train_ctx - max_reply_tokens)
        fits, misfits, dropped = _fitted(vocabulary.chat(), dataset, layout, report)
    yield from misfits
    longest = max((len(ids) for ids in fits.values()), default=0)
    with LlamaModel(variant.model, n_ctx=longest + max_reply_tokens) as model:
        constrainer = model.constrainer() if variant.decoding == "constrained" else None
        for index, ids in fits.items():
            facts = {"style": style, "history_dropped": dropped[index]}
            tools = dataset.entries[index].prompt(setting).tools
            started = time.perf_counter()
            try:
                reply = model.generate(ids, max_reply_tokens, constrainer.start(tools) if constrainer else None)
            except PetoolError as error:
                seconds = round(time.perf_counter() - started, 4)
                broken = {
                    "status": "engine_error",
                    "error": error.message,
                    "prompt_tokens": len(ids),
                    "seconds": seconds,
                }
                yield index, broken | facts
            else:
                yield index, _row(reply) | facts | {"failure": failure(reply.text, tools, reply.finish)}


def _gpu_replies(
    variant: Variant, dataset: Dataset, setting: str, max_reply_tokens: int, report: Report
) -> Iterator[tuple[int, dict[str, Any]]]:
    from petool_lite.inference.gpu import GpuModel

    chat = chat_from_directory(variant.model)
    config = json.loads((variant.model / "config.json").read_text())
    style = variant.style or _UNKNOWN_STYLE
    layout = Layout(setting, style, config["max_position_embeddings"] - max_reply_tokens)
    fits, misfits, dropped = _fitted(chat, dataset, layout, report)
    yield from misfits
    indexes = list(fits)
    constrain = None
    if variant.decoding == "constrained":
        constrainer = Constrainer.from_directory(variant.model, chat.eos_id)
        tools = {place: dataset.entries[index].prompt(setting).tools for place, index in enumerate(indexes)}

        def constrain(place: int) -> Constraint:
            return constrainer.start(tools[place])

    model = GpuModel(variant.model, variant.adapter)
    for place, reply in model.generate(list(fits.values()), max_reply_tokens, chat.eos_id, chat.decode, constrain):
        index = indexes[place]
        offered = dataset.entries[index].prompt(setting).tools
        facts = {"style": style, "history_dropped": dropped[index]}
        yield index, _row(reply) | facts | {"failure": failure(reply.text, offered, reply.finish)}


def _row(reply: Reply) -> dict[str, Any]:
    return {
        "status": "ok",
        "reply": reply.text,
        "reply_tokens": len(reply.ids),
        "finish": reply.finish,
        "prompt_tokens": reply.prompt_tokens,
        "prefill_s": round(reply.prefill_s, 4),
        "decode_s": round(reply.decode_s, 4),
        "seconds": round(reply.prefill_s + reply.decode_s, 4),
    }


def _speed(row: dict[str, Any]) -> str:
    return f"{row['prompt_tokens'] / row['prefill_s']:.0f} tokens/s read" if row.get("prefill_s") else ""


def read_results(path: Path) -> list[dict[str, Any]]:
    """Rows of a results file; raises PetoolError that names the line if one is not a result."""
    if not path.is_file():
        raise PetoolError(f"no such results file: {path}", "give a results-<variant>.jsonl that bench wrote")
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            good = isinstance(row["gold"]["tool_name"], str) and isinstance(row["gold"]["parameters"], dict)
            good = good and (row["status"] in ("too_long", "engine_error") or isinstance(row["reply"], str))
        except (ValueError, KeyError, TypeError):
            good = False
        if not good:
            raise PetoolError(f"{path}, line {number}: not a bench result", "run bench again, or repair the line")
        rows.append(row)
    if not rows:
        raise PetoolError(f"{path} is empty", "run bench again")
    return rows
