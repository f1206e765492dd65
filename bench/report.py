"""The report of a folder of results: one document, from the files alone, and its written forms."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from petool_lite.bench.cost import cost
from petool_lite.bench.errors import BREAKDOWNS, FAULTS, breakdown, count_classes, error_class
from petool_lite.bench.published import not_published_data, partial_reasons, published_table
from petool_lite.bench.results import SCHEMA as ROWS_SCHEMA
from petool_lite.bench.results import Results, check_same_data, empty_files, load_folder
from petool_lite.bench.score import Mark, compare_marks, mark_row, summary

from petool_lite.errors import PetoolError
from petool_lite.runs import write_json, write_text

SCHEMA = 2


@dataclass(frozen=True)
class Scored:
    """Results with, for every row, its mark, its error class and the faults of its parameters.

    `name` is the variant, with its setting where another setting of it is in the same report.
    """

    results: Results
    name: str
    marks: tuple[Mark, ...]
    classes: tuple[str, ...]
    faults: tuple[Mapping[str, str], ...]

    @property
    def by_entry(self) -> dict[str, Mark]:
        """Marks of the scored rows by entry id."""
        pairs = zip(self.results.rows, self.marks, strict=True)
        return {row["entry_id"]: mark for row, mark in pairs if row["status"] != "engine_error"}


def score_results(results: Results, name: str = "") -> Scored:
    """Score every row of a results file; `name` is the variant's own if not given."""
    marks = tuple(mark_row(row) for row in results.rows)
    found = [error_class(row, mark) for row, mark in zip(results.rows, marks, strict=True)]
    classes = tuple(kind for kind, _ in found)
    return Scored(results, name or results.name, marks, classes, tuple(faults for _, faults in found))


def build_report(scored: Sequence[Scored], empty: Sequence[str] = ()) -> dict[str, Any]:
    """The report document, schema 2 (report.schema.json, docs/bench.md); the same files give the same document.

    `empty` names results files without a row.
    """
    variants = [_variant(item) for item in scored]
    settings = dict.fromkeys(item["setting"] for item in variants)
    return {
        "schema": SCHEMA,
        "rows_schema": ROWS_SCHEMA,
        "partial": bool(empty) or any(item["partial"] for item in variants),
        "empty": list(empty),
        "settings": list(settings),
        "data": [_data(name, variants) for name in settings],
        "variants": variants,
        "pairs": [_pair(one, two) for one, two in combinations(scored, 2) if _setting(one) == _setting(two)],
        "published": published_table(variants),
    }


def _setting(item: Scored) -> str:
    return str(item.results.meta["setting"])


def _data(setting: str, variants: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"setting": setting, **next(item["data"] for item in variants if item["setting"] == setting)}


def _pair(one: Scored, two: Scored) -> dict[str, Any]:
    facts = {"first": one.name, "second": two.name, "setting": _setting(one)}
    return facts | compare_marks(one.by_entry, two.by_entry)


def _variant(item: Scored) -> dict[str, Any]:
    rows, meta = item.results.rows, item.results.meta
    kept = [index for index, row in enumerate(rows) if row["status"] != "engine_error"]
    good, marks = [rows[index] for index in kept], [item.marks[index] for index in kept]
    classes = [item.classes[index] for index in kept]
    same = ("engine", "decoding", "style", "setting", "model", "machine", "versions")
    return {
        "name": item.name,
        **{key: meta[key] for key in same},
        **{key: meta.get(key) for key in ("model_sha256", "commit", "started", "limit", "shard", "max_reply_tokens")},
        "data": {key: meta["data"][key] for key in ("source", "sha256", "total")},
        "results": item.results.path.name,
        "results_sha256": hashlib.sha256(item.results.path.read_bytes()).hexdigest(),
        "cut_line": item.results.cut_line,
        "partial": partial_reasons(rows, meta),
        "other_data": not_published_data(meta),
        "rows": len(rows),
        **summary(rows, marks),
        "classes": count_classes(item.classes),
        "parameter_faults": count_classes((kind for faults in item.faults for kind in faults.values()), FAULTS),
        "breakdown": {name: breakdown(good, marks, classes, name) for name in BREAKDOWNS},
        "cost": cost(rows, meta),
    }


def write_report(folder: Path, *more: Path, target: Path | None = None) -> dict[str, Any]:
    """Score all results in `folder` and `more`, write report.json, report.md and report.html; return the document.

    They go to `target`, the folder itself if not given. Variants of one name need different settings.
    """
    from petool_lite.bench.html import html_report
    from petool_lite.bench.markdown import markdown_report

    folders = (folder, *more)
    scored = _scored([item for place in folders for item in load_folder(place)])
    if not scored:
        raise PetoolError(f"no result in {folder} yet", "petool-lite bench goes on where it was stopped")
    document = build_report(scored, [name for place in folders for name in empty_files(place)])
    target = target or folder
    write_text(target / "report.md", markdown_report(document))
    write_text(target / "report.html", html_report(document, scored))
    write_json(target / "report.json", document)
    return document


def _scored(results: Sequence[Results]) -> list[Scored]:
    """All results scored, under names of their own; raises PetoolError where data or names clash."""
    check_same_data(results)
    names = [item.name for item in results]
    full = [f"{item.name} ({item.meta['setting']})" if names.count(item.name) > 1 else item.name for item in results]
    twice = next((item for item, name in zip(results, full, strict=True) if full.count(name) > 1), None)
    if twice is not None:
        raise PetoolError(
            f"the variant {twice.name} occurs twice, as in {twice.path}", "give each run a report of its own"
        )
    return [score_results(item, name) for item, name in zip(results, full, strict=True)]
