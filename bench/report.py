"""From scored rows to one document, and from the document to a table."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from petool_lite.bench.score import score_rows
from petool_lite.bench.variants import Variant

from petool_lite.console import print_table
from petool_lite.data.files import Dataset
from petool_lite.runs import versions

SCHEMA = 1


def build_report(
    scored: Sequence[tuple[Variant, Path, list[dict[str, Any]]]], dataset: Dataset, setting: str, seconds: float
) -> dict[str, Any]:
    """The report document (schema 1): what was scored, on what, and one object a variant. Times in seconds."""
    return {
        "schema": SCHEMA,
        "data": {"source": dataset.source, "sha256": dataset.sha256, "total": dataset.total},
        "setting": setting,
        "partial": len(dataset.entries) < dataset.total,
        "variants": [_variant(variant, results, rows) for variant, results, rows in scored],
        "versions": versions(),
        "seconds": round(seconds, 2),
    }


def _rate(tokens: float, seconds: float) -> float:
    return round(tokens / seconds, 1) if seconds else 0.0


def _variant(variant: Variant, results: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    good = [row for row in rows if row["status"] == "ok"]
    return {
        "name": variant.name,
        "engine": variant.engine,
        "model": str(variant.model),
        "model_bytes": variant.bytes,
        "style": rows[0]["style"],
        **asdict(score_rows(rows)),
        "history_trimmed": sum(row["history_dropped"] > 0 for row in rows),
        "seconds": round(sum(row["seconds"] for row in rows), 2),
        "seconds_per_call": round(sum(row["seconds"] for row in rows) / len(rows), 3),
        "prefill_tokens_per_s": _rate(sum(row["prompt_tokens"] for row in good), sum(row["prefill_s"] for row in good)),
        "decode_tokens_per_s": _rate(sum(row["reply_tokens"] for row in good), sum(row["decode_s"] for row in good)),
        "results": str(results),
    }


def print_report(document: Mapping[str, Any]) -> None:
    """The report as a table on stdout."""
    total = document["data"]["total"]
    rows = [
        [
            variant["name"],
            str(variant["n"]),
            _percent(variant["tool_acc"], variant["tool_ci"]),
            _percent(variant["param_acc"], variant["param_ci"]),
            _percent(variant["joint_acc"], variant["joint_ci"]),
            f"{variant['seconds_per_call']:.2f}",
            f"{variant['model_bytes'] / 1e6:.0f}",
        ]
        for variant in document["variants"]
    ]
    columns = ["variant", "n", "tool % (95 %)", "parameters % (95 %)", "both % (95 %)", "s/call", "MB"]
    engines = {"llama.cpp": "llama.cpp on this CPU", "transformers": "transformers on this GPU"}
    used = dict.fromkeys(engines[variant["engine"]] for variant in document["variants"])
    notes = ["published scorer, greedy, " + ", ".join(used)]
    if document["partial"]:
        notes.append(f"PARTIAL: not all {total} entries")
    for variant in document["variants"]:
        for key, words in (
            ("engine_errors", "engine errors, not scored"),
            ("history_trimmed", "prompts lost old history"),
            ("too_long", "prompts exceed its context, scored as wrong"),
        ):
            if variant[key]:
                notes.append(f"{variant['name']}: {variant[key]} {words}")
    print_table(f"{document['data']['source']}, {document['setting']}", columns, rows, "; ".join(notes))


def _percent(value: float, interval: Sequence[float]) -> str:
    return f"{value:.1f} ({interval[0]:.0f}-{interval[1]:.0f})"
