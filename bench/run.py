"""Generate: one greedy reply an entry, one line a reply, kept as it comes. Scoring is another step over the files."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from petool_lite.bench.engines import GpuEngine, Rows, llama_rows, model_style, rule_rows
from petool_lite.bench.machine import commit, forget_peak, machine, peak_gb
from petool_lite.bench.rows import entry_row
from petool_lite.bench.store import Store, new_meta, open_store
from petool_lite.bench.variants import GPU, LLAMA, Variant

from petool_lite.console import Report
from petool_lite.data.entries import Entry
from petool_lite.data.files import Dataset
from petool_lite.errors import USAGE, PetoolError
from petool_lite.runs import versions


@dataclass(frozen=True)
class Task:
    """What every variant is asked: the entries, the setting, the longest reply, which shard (i of n) of them.

    `fresh` starts results files over instead of going on with them.
    """

    dataset: Dataset
    setting: str
    max_reply_tokens: int
    limit: int | None = None
    shard: tuple[int, int] | None = None
    fresh: bool = False

    def entries(self) -> dict[int, Entry]:
        """This task's entries by their place in the data; raises PetoolError where one has no right answer."""
        first, step = self.shard or (0, 1)
        found = {index: entry for index, entry in enumerate(self.dataset.entries) if index % step == first}
        source = self.dataset.source
        if not found:
            raise PetoolError(f"{source}: shard {first}/{step} has no entry", "make fewer shards", USAGE)
        unanswered = next((entry.id for entry in found.values() if entry.gold is None), None)
        if unanswered is not None:
            raise PetoolError(
                f"{source}: entry {unanswered} has no right answer to score against", "use a labelled file"
            )
        return found


def generate_results(variant: Variant, task: Task, target: Path, engine: GpuEngine, report: Report) -> None:
    """Write one row an entry to `target` as docs/bench.md describes it, going on where an earlier run stopped.

    An entry longer than the model's context loses old history, counted in the row; one that is too long even then
    has the status "too_long" and scores as wrong. A failure of the engine is "engine_error", never a wrong answer,
    and is tried again by the next run.
    """
    entries = task.entries()
    if variant.engine == LLAMA and variant.style is None:
        variant = replace(variant, style=model_style(variant.weights))
    meta = new_meta(_facts(variant, task, len(entries)))
    with open_store(target, meta, set(entries), task.fresh, report) as store:
        left = {index: entry for index, entry in entries.items() if index not in store.rows}
        if left:
            _generate(variant, task, left, store, engine, report)
        else:
            report(f"{target.name}: all {len(entries)} entries are there already", 0, 0, "")


def _generate(
    variant: Variant, task: Task, left: Mapping[int, Entry], store: Store, engine: GpuEngine, report: Report
) -> None:
    stage, total = f"bench {variant.name}", store.meta["entries"]
    if store.rows:
        report(f"{stage}: {len(store.rows)} of {total} entries are there already", 0, 0, "")
    report(stage, len(store.rows), total, "")
    started, before = time.perf_counter(), store.meta["seconds"] or 0.0
    told: dict[str, Any] = dict(store.meta["gpu"] or {})
    forget_peak()
    try:
        for index, row in _rows(variant, task, left, told, engine, report):
            store.append(entry_row(index, left[index], task.setting) | _named(variant, task.setting) | row)
            report(stage, len(store.rows), total, _speed(row))
    finally:
        peak = max(peak_gb(), store.meta["peak_memory_gb"] or 0.0)
        gpu = told | {"tokens_per_s": _tokens_per_s(store)} if variant.engine == GPU else None
        seconds = round(before + time.perf_counter() - started, 2)
        done = len(store.rows) == total
        store.save_meta(complete=done, seconds=seconds, peak_memory_gb=peak, gpu=gpu)


def _rows(
    variant: Variant, task: Task, left: Mapping[int, Entry], told: dict[str, Any], engine: GpuEngine, report: Report
) -> Rows:
    if variant.engine == GPU:
        return engine.rows(variant, left, task.setting, task.max_reply_tokens, told, report)
    if variant.engine == LLAMA:
        return llama_rows(variant, left, task.setting, task.max_reply_tokens, report)
    return rule_rows(variant, left, task.setting)


def _named(variant: Variant, setting: str) -> dict[str, Any]:
    return {
        "setting": setting,
        "variant": variant.name,
        "engine": variant.engine,
        "decoding": variant.decoding,
        "style": variant.style,
    }


def _facts(variant: Variant, task: Task, count: int) -> dict[str, Any]:
    """The meta of a run: what was asked of which model, where and with which versions."""
    data = task.dataset
    return {
        **_named(variant, task.setting),
        "model": str(variant.model or variant.name),
        "model_sha256": variant.sha256(),
        "model_bytes": variant.bytes,
        "data": {"source": data.source, "sha256": data.sha256, "total": data.total},
        "limit": task.limit,
        "shard": list(task.shard) if task.shard else None,
        "entries": count,
        "max_reply_tokens": task.max_reply_tokens,
        "machine": machine(variant.engine == GPU),
        "versions": versions(),
        "commit": commit(),
        "started": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }


def _tokens_per_s(store: Store) -> float:
    """Tokens read and written a second of the GPU's work, of all rows."""
    rows = store.rows.values()
    seconds = sum(row["seconds"] for row in rows)
    return round(sum(row["prompt_tokens"] + row["reply_tokens"] for row in rows) / seconds, 1) if seconds else 0.0


def _speed(row: Mapping[str, Any]) -> str:
    read = row["prompt_tokens"] - row.get("cached_tokens", 0)
    return f"{read / row['prefill_s']:.0f} tokens/s read" if row.get("prefill_s") else ""
