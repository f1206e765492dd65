"""`bench`: generate greedy replies with llama.cpp into results files, then score them."""

import time
from pathlib import Path
from typing import Any

from petool_lite.bench.report import build_report
from petool_lite.bench.run import generate_results, read_results
from petool_lite.bench.score import Score, score_rows
from petool_lite.bench.variants import Variant

from petool_lite.console import Report, silent
from petool_lite.data.files import load_dataset
from petool_lite.errors import PetoolError
from petool_lite.runs import write_json

__all__ = ["Score", "Variant", "bench", "read_results", "score_rows"]


def bench(
    variants: list[Variant],
    data: str,
    setting: str,
    folder: Path,
    limit: int = 0,
    max_reply_tokens: int = 256,
    report: Report = silent,
) -> dict[str, Any]:
    """Run every variant over the same entries, write results-<variant>.jsonl and report.json; return the report.

    Raises PetoolError for entries without gold answers, an unknown setting or a model that does not load.
    """
    started = time.time()
    dataset = load_dataset(data, setting, limit)
    unanswered = next((entry.id for entry in dataset.entries if entry.gold is None), None)
    if unanswered is not None:
        raise PetoolError(f"{data}: entry {unanswered} has no right answer to score against", "use a labelled file")
    scored = []
    for variant in variants:
        results = folder / f"results-{variant.name}.jsonl"
        generate_results(variant, dataset, setting, max_reply_tokens, results, report)
        scored.append((variant, results, read_results(results)))
    document = build_report(scored, dataset, setting, time.time() - started)
    write_json(folder / "report.json", document)
    return document
