"""Generate: one greedy reply an entry, one line a reply. Scoring is another step over the finished file."""

import json
import time
from pathlib import Path
from typing import Any

from petool_lite.bench.variants import Variant

from petool_lite.console import Report
from petool_lite.data.entries import Entry
from petool_lite.data.files import Dataset
from petool_lite.errors import PetoolError
from petool_lite.inference.llama import LlamaModel
from petool_lite.prompt import Layout, prompt_ids
from petool_lite.runs import draft

_UNKNOWN_STYLE = "published"


def generate_results(
    variant: Variant, dataset: Dataset, setting: str, max_reply_tokens: int, target: Path, report: Report
) -> None:
    """Write one row an entry to `target`: entry, gold, reply, status, tokens and times.

    An entry longer than the model's context loses old history, counted in the row; one that is too long even then
    has the status "too_long" and scores as wrong. A failure of the engine is "engine_error", never a wrong answer.
    """
    with LlamaModel(variant.model, vocab_only=True) as vocabulary:
        style = variant.style or vocabulary.metadata.get("petool_lite.prompt_style", _UNKNOWN_STYLE)
        chat = vocabulary.chat()
        layout = Layout(setting, style, vocabulary.train_ctx - max_reply_tokens)
        prompts = [prompt_ids(chat, entry, layout) for entry in dataset.entries]
    longest = max((len(prompt[0]) for prompt in prompts if prompt), default=0)
    stage = f"bench {variant.name}"
    report(stage, 0, len(prompts), "")
    with (
        draft(target) as path,
        path.open("w") as file,
        LlamaModel(variant.model, n_ctx=longest + max_reply_tokens) as model,
    ):
        for number, (entry, prompt) in enumerate(zip(dataset.entries, prompts, strict=True), 1):
            ids, dropped = prompt or ([], 0)
            row = _row(model, entry, ids, max_reply_tokens)
            row |= {"variant": variant.name, "setting": setting, "style": style, "history_dropped": dropped}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            report(stage, number, len(prompts), _speed(row))


def _speed(row: dict[str, Any]) -> str:
    return f"{row['prompt_tokens'] / row['prefill_s']:.0f} tokens/s read" if row["status"] == "ok" else row["status"]


def _row(model: LlamaModel, entry: Entry, ids: list[int], max_reply_tokens: int) -> dict[str, Any]:
    started = time.perf_counter()
    gold = entry.gold
    assert gold is not None  # checked before any model was loaded
    row: dict[str, Any] = {
        "entry_id": entry.id,
        "gold": {"tool_name": gold.tool_name, "parameters": dict(gold.parameters)},
        "prompt_tokens": len(ids),
    }
    if not ids:
        return row | {"status": "too_long", "seconds": 0.0}
    try:
        reply = model.generate(ids, max_reply_tokens)
    except PetoolError as error:
        return row | {"status": "engine_error", "error": error.message, "seconds": time.perf_counter() - started}
    return row | {
        "status": "ok",
        "reply": reply.text,
        "reply_tokens": len(reply.ids),
        "finish": reply.finish,
        "prefill_s": round(reply.prefill_s, 4),
        "decode_s": round(reply.decode_s, 4),
        "seconds": round(time.perf_counter() - started, 4),
    }


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
