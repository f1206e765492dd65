"""Generate: one greedy reply an entry, one line a reply, kept as it comes. Scoring is another step over the files."""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from petool_lite.bench import results
from petool_lite.bench.engines import Task, Work, model_style, work_rows
from petool_lite.bench.report import write_report
from petool_lite.bench.variants import GPU, LLAMA, Variant
from petool_lite.console import Report, silent
from petool_lite.data.answers import equal_tools, function_words
from petool_lite.data.entries import Call, Entry
from petool_lite.data.petoolbench import published_call
from petool_lite.errors import PetoolError
from petool_lite.inference.llama_open import cpu_name
from petool_lite.places import default_threads
from petool_lite.runs import locked, versions


def bench(variants: Sequence[Variant], task: Task, folder: Path, report: Report = silent) -> dict[str, Any] | None:
    """Run every variant over the same entries, write results-<variant>.jsonl and the report; return the report, or None
    for a shard, which has a folder of its own. Raises PetoolError for unlabelled entries, and where `generate` does."""
    task.entries()  # before the folder is made
    if task.shard is not None:
        folder /= "shard-{}-of-{}".format(*task.shard)
    new = {folder / f"results-{variant.name}.jsonl": task.facts for variant in variants}
    others = [path for path in results.results_files(folder) if path not in new]
    results.check_same_data(new | {path: results.load_results(path).meta for path in others})
    with locked(folder):
        generate(variants, task, folder, report)
        if task.shard is None:
            return write_report(folder)
    report(f"replies of shard {task.shard[0]}/{task.shard[1]}: {folder}; bench merge makes all one", 0, 0, "")
    return None


def generate(variants: Sequence[Variant], task: Task, folder: Path, report: Report = silent) -> None:
    """Write results-<variant>.jsonl in `folder` for each variant, going on where an earlier run stopped. Raises
    PetoolError for a file of other work, before any reply, and for Ctrl-C (exit code 130), with all rows kept."""
    entries = task.entries()
    work = []
    for variant in variants:
        if variant.style is None:
            known = "published" if task.dataset.entries[0].published else "petool"
            recorded = model_style(variant.model) if variant.engine == LLAMA else None
            variant = replace(variant, style=recorded or known)
        path = folder / f"results-{variant.name}.jsonl"
        work.append((variant, results.Store(path, _meta(variant, task, len(entries)), task.fresh)))
    try:
        for variant, store in work:
            with store.opened(report):
                left = {index: entry for index, entry in entries.items() if index not in store.rows}
                if left:
                    _fill(Work(variant, task, left), store, report)
                    continue
                more = f" (and {len(store.rows) - len(entries):,} more)" if len(store.rows) > len(entries) else ""
                report(f"{store.path.name}: all {len(entries):,} entries are there already{more}", 0, 0, "")
    except KeyboardInterrupt:
        where, hint = f"stopped; the replies so far are in {folder}", "the same command goes on from here"
        raise PetoolError(where, hint, 128 + signal.SIGINT) from None


def _fill(work: Work, store: results.Store, report: Report) -> None:
    """Write the rows that are left; a failure of the engine has its own status and is tried again (docs/bench.md)."""
    stage, total = f"bench {work.variant.name}", len(store.rows) + len(work.entries)
    if store.rows:
        report(f"{stage}: {len(store.rows):,} of {total:,} entries are there already", 0, 0, "")
    report(stage, len(store.rows), total, "")
    started, before = time.perf_counter(), store.meta["seconds"] or 0.0
    told: dict[str, Any] = dict(store.meta["gpu"] or {})
    named = {key: store.meta[key] for key in ("setting", "variant", "engine", "decoding", "style")}
    with suppress(OSError):  # count the peak of memory from now on, where the kernel lets it
        Path("/proc/self/clear_refs").write_text("5")
    try:
        for index, row in work_rows(work, told, report):
            store.append(entry_row(index, work.entries[index]) | named | row)
            read = row["prompt_tokens"] - row["cached_tokens"]
            speed = f"{read / row['prefill_s']:.0f} tokens/s read" if row["prefill_s"] else ""
            report(stage, len(store.rows), total, speed)
    finally:
        peak = max(peak_gb(), store.meta["peak_memory_gb"] or 0.0)
        seconds = round(before + time.perf_counter() - started, 2)
        store.save_meta(seconds=seconds, peak_memory_gb=peak or None, gpu=told or None)


def entry_row(index: int, entry: Entry) -> dict[str, Any]:
    """What a row says of the entry. `gold` is the right call in the published form, or {"no_call": text}; `same_job`
    lists the offered tools that do the right one's job, itself included, and is empty where nothing tells."""
    answer, accepted = entry.answer, entry.accepted
    function = entry.function or (function_words(answer.name) if isinstance(answer, Call) else entry.id)
    facts = {"offered": [tool.name for tool in entry.tools], "same_job": list(equal_tools(entry) or ())}
    row: dict[str, Any] = {
        **{"schema": results.ROWS_SCHEMA, "index": index, "entry_id": entry.id, "query": entry.query},
        "gold": published_call(answer) or {"no_call": str(answer)},
        "facts": facts | {"history_length": len(entry.history), "function": function},
    }
    if accepted is not None:
        schema = next(tool.parameters for tool in entry.tools if tool.name == accepted.name)
        row["accept"] = {"name": accepted.name, "values": accepted.values, "schema": schema}
    return row | ({"kind": entry.kind} if entry.kind else {})


def _meta(variant: Variant, task: Task, count: int) -> dict[str, Any]:
    """The meta before the first row: what is asked of which model, where and with which versions."""
    return {
        **{"schema": results.ROWS_SCHEMA, "variant": variant.name, **task.facts},
        **{key: getattr(variant, key) for key in ("engine", "decoding", "style", "about")},
        **{"model": variant.place, "model_sha256": variant.sha256(), "model_bytes": variant.bytes},
        "limit": task.limit if task.limit and task.limit < len(task.dataset.entries) else None,
        "shard": list(task.shard) if task.shard else None,
        **{"entries": count, "complete": False, "max_reply_tokens": task.max_reply_tokens},
        **{"machine": machine(variant.engine == GPU), "versions": versions(), "commit": commit()},
        "started": datetime.now(UTC).isoformat(timespec="milliseconds"),
        **{"seconds": 0.0, "peak_memory_gb": None, "gpu": None},
    }


def machine(gpu: bool) -> dict[str, Any]:
    """The machine as results record it; memory in GiB."""
    device = "cpu"
    if gpu:
        import torch

        device = torch.cuda.get_device_name() if torch.cuda.is_available() else device
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"device": device, "cpu": cpu_name(), "cores": default_threads(), "host_ram_gb": round(ram, 1)}


def commit() -> str:
    """The commit of the checkout that this code runs from, "-dirty" if it was changed; else the installed version."""
    line = ["git", "-C", str(Path(__file__).resolve().parent)]
    describe = [*line, "describe", "--always", "--dirty", "--abbrev=12"]
    try:  # a package in a virtual environment may lie in a checkout of something else
        subprocess.run([*line, "ls-files", "--error-unmatch", Path(__file__).name], check=True, capture_output=True)
        return subprocess.run(describe, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return versions().get("petool-lite", "unknown")


def peak_gb() -> float:
    """The most memory that this process held, in GiB; 0 where the kernel does not tell."""
    with suppress(OSError):
        return round(int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 2**20, 3)
    return 0.0
