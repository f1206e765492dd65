"""Generate: one greedy reply an entry, one line a reply, kept as it comes. Scoring is another step over the files."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from petool_lite.bench.engines import Rows, Work, gpu_rows, llama_rows, model_style, rule_rows
from petool_lite.bench.machine import commit, forget_peak, machine, peak_gb
from petool_lite.bench.results import SCHEMA, Store, continued, open_store
from petool_lite.bench.variants import GPU, LLAMA, Variant

from petool_lite.console import Report, silent
from petool_lite.data.answers import equal_tools, function_words
from petool_lite.data.entries import NO_TOOL, Call, Entry
from petool_lite.data.files import Dataset
from petool_lite.data.petoolbench import published_call
from petool_lite.errors import USAGE, PetoolError
from petool_lite.runs import versions

_INTERRUPTED = 130


@dataclass(frozen=True)
class Task:
    """What every variant is asked: the entries, the longest reply, how many and which shard (i of n) of them.

    `fresh` starts results files over instead of going on with them.
    """

    dataset: Dataset
    max_reply_tokens: int
    limit: int | None = None
    shard: tuple[int, int] | None = None
    fresh: bool = False

    @property
    def setting(self) -> str:
        """PEToolBench's setting that the entries were loaded with, "none" for other data."""
        return self.dataset.entries[0].setting or "none"

    @property
    def text(self) -> bool | str:
        """The answer without a call that is allowed: the data's own sentence, any text if it has several, or none.

        A test that lists what it accepts allows one in all its parts, as BFCL does.
        """
        texts = {entry.answer for entry in self.dataset.entries if isinstance(entry.answer, str)}
        texts |= {NO_TOOL} if any(entry.accepted for entry in self.dataset.entries) else set()
        return texts.pop() if len(texts) == 1 else bool(texts)

    def entries(self) -> dict[int, Entry]:
        """This task's entries by their place in the data; raises PetoolError where one has no right answer."""
        first, step = self.shard or (0, 1)
        chosen = self.dataset.entries[: self.limit]
        found = {index: entry for index, entry in enumerate(chosen) if index % step == first}
        source = self.dataset.source
        if not found:
            raise PetoolError(f"{source}: shard {first}/{step} has no entry", "make fewer shards", USAGE)
        unanswered = next((entry.id for entry in found.values() if entry.answer is None), None)
        if unanswered is not None:
            raise PetoolError(
                f"{source}: entry {unanswered} has no right answer to score against", "use a labelled file"
            )
        return found


def generate(variants: Sequence[Variant], task: Task, folder: Path, report: Report = silent) -> None:
    """Write results-<variant>.jsonl in `folder` for each variant, going on where an earlier run stopped.

    Raises PetoolError before the first reply where one of the files is of other work. Ctrl-C ends it with what is done
    kept, as a PetoolError with exit code 130.
    """
    entries = task.entries()
    work = []
    for variant in variants:
        if variant.engine == LLAMA and variant.style is None:
            known = "published" if task.dataset.entries[0].published else "petool"
            variant = replace(variant, style=model_style(variant.weights) or known)
        path, meta = folder / f"results-{variant.name}.jsonl", _meta(variant, task, len(entries))
        if not task.fresh:
            continued(path, meta)
        work.append((variant, path, meta))
    try:
        for variant, path, meta in work:
            _generate(variant, task, path, meta, report)
    except KeyboardInterrupt:
        where, hint = f"stopped; the replies so far are in {folder}", "the same command goes on from here"
        raise PetoolError(where, hint, _INTERRUPTED) from None


def _generate(variant: Variant, task: Task, target: Path, meta: dict[str, Any], report: Report) -> None:
    """Write one row an entry to `target` as docs/bench.md describes it.

    An entry longer than the model's context loses old history, counted in the row; one that is too long even then
    has the status "too_long" and scores as wrong. A failure of the engine is "engine_error", never a wrong answer,
    and is tried again by the next run.
    """
    entries = task.entries()
    with open_store(target, meta, task.fresh, report) as store:
        left = {index: entry for index, entry in entries.items() if index not in store.rows}
        if left:
            _fill(Work(variant, left, task.max_reply_tokens, task.text), store, report)
            return
        more = f" (and {len(store.rows) - len(entries):,} more)" if len(store.rows) > len(entries) else ""
        report(f"{target.name}: all {len(entries):,} entries are there already{more}", 0, 0, "")


def _fill(work: Work, store: Store, report: Report) -> None:
    stage, total = f"bench {work.variant.name}", len(store.rows) + len(work.entries)
    if store.rows:
        report(f"{stage}: {len(store.rows):,} of {total:,} entries are there already", 0, 0, "")
    report(stage, len(store.rows), total, "")
    started, before = time.perf_counter(), store.meta["seconds"] or 0.0
    told: dict[str, Any] = dict(store.meta["gpu"] or {})
    named = {key: store.meta[key] for key in ("setting", "variant", "engine", "decoding", "style")}
    forget_peak()
    try:
        for index, row in _rows(work, told, report):
            store.append(entry_row(index, work.entries[index]) | named | row)
            report(stage, len(store.rows), total, _speed(row))
    finally:
        peak = max(peak_gb(), store.meta["peak_memory_gb"] or 0.0)
        gpu = told | {"tokens_per_s": _tokens_per_s(store)} if work.variant.engine == GPU else None
        store.save_meta(seconds=round(before + time.perf_counter() - started, 2), peak_memory_gb=peak, gpu=gpu)


def _rows(work: Work, told: dict[str, Any], report: Report) -> Rows:
    if work.variant.engine == GPU:
        return gpu_rows(work, told, report)
    return llama_rows(work, report) if work.variant.engine == LLAMA else rule_rows(work)


def entry_row(index: int, entry: Entry) -> dict[str, Any]:
    """What a row says of the entry itself.

    `gold` is the right call in the published scorers' form, or {"no_call": text} where no tool fits. The fact
    `same_job` lists the offered tools that do the right one's job, itself included; it is empty where nothing tells.
    `accept` is there for a test that lists what it accepts, `kind` where the data tells kinds apart.
    """
    answer, accepted = entry.answer, entry.accepted
    row: dict[str, Any] = {
        "schema": SCHEMA,
        "index": index,
        "entry_id": entry.id,
        "query": entry.query,
        "gold": published_call(answer) or {"no_call": str(answer)},
        "facts": {
            "offered": [tool.name for tool in entry.tools],
            "same_job": list(equal_tools(entry) or ()),
            "history_length": len(entry.history),
            "function": entry.function or (function_words(answer.name) if isinstance(answer, Call) else entry.id),
        },
    }
    if accepted is not None:
        schema = next(tool.parameters for tool in entry.tools if tool.name == accepted.name)
        row["accept"] = {"name": accepted.name, "values": accepted.values, "schema": schema}
    return row | ({"kind": entry.kind} if entry.kind else {})


def _meta(variant: Variant, task: Task, count: int) -> dict[str, Any]:
    """The meta before the first row: what is asked of which model, where and with which versions."""
    data = task.dataset
    return {
        "schema": SCHEMA,
        "setting": task.setting,
        "variant": variant.name,
        "engine": variant.engine,
        "decoding": variant.decoding,
        "style": variant.style,
        "about": variant.about,
        "model": str(variant.model or variant.name),
        "model_sha256": variant.sha256(),
        "model_bytes": variant.bytes,
        "data": {"source": data.source, "sha256": data.sha256, "total": data.total},
        "limit": task.limit if task.limit and task.limit < len(data.entries) else None,
        "shard": list(task.shard) if task.shard else None,
        "entries": count,
        "max_reply_tokens": task.max_reply_tokens,
        "machine": machine(variant.engine == GPU),
        "versions": versions(),
        "commit": commit(),
        "started": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "complete": False,
        "seconds": 0.0,
        "peak_memory_gb": None,
        "gpu": None,
    }


def _tokens_per_s(store: Store) -> float:
    """Tokens read and written a second of the GPU's work, of all rows."""
    rows = store.rows.values()
    seconds = sum(row["seconds"] for row in rows)
    return round(sum(row["prompt_tokens"] + row["reply_tokens"] for row in rows) / seconds, 1) if seconds else 0.0


def _speed(row: Mapping[str, Any]) -> str:
    read = row["prompt_tokens"] - row.get("cached_tokens", 0)
    return f"{read / row['prefill_s']:.0f} tokens/s read" if row.get("prefill_s") else ""
