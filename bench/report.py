"""The report of a folder of results: one document, from the files alone, its tables, and its written forms."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from petool_lite.bench.published import not_published_data, partial_reasons, published_table
from petool_lite.bench.results import SCHEMA as ROWS_SCHEMA
from petool_lite.bench.results import Results, check_same_data, empty_files, load_folder
from petool_lite.bench.score import (
    CLASSES,
    METRICS,
    SCORERS,
    Score,
    count_classes,
    error_class,
    paired,
    quantile,
    score_row,
    summary,
)

from petool_lite.console import print_table, stdout
from petool_lite.errors import PetoolError
from petool_lite.runs import write_json, write_text

SCHEMA = 4
SCORER_WORDS = {
    "published": "the published scorer",
    "ast": "BFCL's AST scorer",
    "no_call": "whether no tool is called",
}
_METRIC_WORDS = ("tool", "parameters", "both")
_COUNTED = {
    "history_trimmed": "prompts without their oldest history",
    "too_long": "prompts beyond its context, which count as wrong",
    "engine_errors": "failures of the engine, which are not scored",
    "cut_off": "cut off at the reply limit",
}


@dataclass(frozen=True)
class Scored:
    """Results with the score and the error class of every row.

    `name` is the variant, with its setting where another setting of it is in the same report.
    """

    results: Results
    name: str
    scores: tuple[Score, ...]
    classes: tuple[str, ...]

    def triples(self) -> Iterator[tuple[dict[str, Any], Score, str]]:
        """Row, score and class of each row."""
        return zip(self.results.rows, self.scores, self.classes, strict=True)

    @property
    def by_entry(self) -> dict[str, Score]:
        """Scores of the rows whose engine did not fail, by entry id."""
        return {row["entry_id"]: score for row, score, name in self.triples() if name != "engine_error"}


@dataclass(frozen=True)
class Table:
    """A titled table of texts; `notes` stand below it."""

    key: str
    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    notes: Sequence[str] = ()


def score_results(results: Results, name: str = "") -> Scored:
    """Score every row of a results file; `name` is the variant's own if not given."""
    scores = tuple(score_row(row) for row in results.rows)
    classes = tuple(error_class(row, score) for row, score in zip(results.rows, scores, strict=True))
    return Scored(results, name or results.name, scores, classes)


def write_report(*folders: Path, target: Path | None = None) -> dict[str, Any]:
    """Score all results in `folders`, write report.json, report.md and report.html; return the document.

    They go to `target`, the first folder if not given. Variants of one name need different settings.
    """
    from petool_lite.bench.page import html_report

    scored = _scored([item for place in folders for item in load_folder(place)])
    if not scored:
        raise PetoolError(f"no result in {folders[0]} yet", "petool-lite bench goes on where it was stopped")
    document = build_report(scored, [name for place in folders for name in empty_files(place)])
    target = target or folders[0]
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


def build_report(scored: Sequence[Scored], empty: Sequence[str] = ()) -> dict[str, Any]:
    """The report document (report.schema.json, docs/bench.md); the same files give the same document.

    `empty` names results files without a row.
    """
    variants = [_variant(item) for item in scored]
    data = {item["setting"]: {"setting": item["setting"], **item["data"]} for item in reversed(variants)}
    pairs = [
        {"first": one.name, "second": two.name, **paired(one.by_entry, two.by_entry)}
        for one, two in combinations(scored, 2)
        if one.results.meta["setting"] == two.results.meta["setting"]
    ]
    return {
        "schema": SCHEMA,
        "rows_schema": ROWS_SCHEMA,
        "partial": bool(empty) or any(item["partial"] for item in variants),
        "empty": list(empty),
        "data": list(reversed(data.values())),
        "variants": variants,
        "pairs": pairs,
        "published": published_table(variants),
    }


def _variant(item: Scored) -> dict[str, Any]:
    rows, meta = item.results.rows, item.results.meta
    same = ("engine", "decoding", "style", "setting", "model", "machine", "versions")
    more = ("model_sha256", "commit", "started", "limit", "shard", "max_reply_tokens")
    return {
        "name": item.name,
        "about": str(meta.get("about") or ""),
        **{key: meta[key] for key in same},
        **{key: meta.get(key) for key in more},
        "data": {key: meta["data"][key] for key in ("source", "sha256", "total")},
        "results": item.results.path.name,
        "results_sha256": hashlib.sha256(item.results.path.read_bytes()).hexdigest(),
        "cut_line": item.results.cut_line,
        "partial": partial_reasons(rows, meta),
        "other_data": not_published_data(meta),
        "rows": len(rows),
        **summary(rows, item.scores),
        "classes": count_classes(item.classes),
        "cost": cost(rows, meta),
    }


def cost(rows: Sequence[Mapping[str, Any]], meta: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds a call (median and 95th percentile, cold and warm apart), tokens/s, GB and bytes; None where unknown.

    A call is cold if nothing of its prompt was in the engine's memory. Prefill counts the tokens that were read, not
    those that were reused. A batch on a GPU shares its time among its rows. Variants without an engine cost nothing.
    """
    gpu = meta.get("gpu") or {}
    runs = [row for row in rows if row["status"] == "ok"] if meta["engine"] != "none" else []
    read = sum(max(0, row["prompt_tokens"] - row.get("cached_tokens", 0)) for row in runs)
    return {
        "cold": _times([row for row in runs if row.get("cold")]),
        "warm": _times([row for row in runs if not row.get("cold")]),
        "prefill_tokens_per_s": _rate(read, sum(row["prefill_s"] for row in runs)),
        "decode_tokens_per_s": _rate(sum(row["reply_tokens"] for row in runs), sum(row["decode_s"] for row in runs)),
        "peak_memory_gb": meta.get("peak_memory_gb") if runs else None,
        "model_bytes": meta.get("model_bytes") or None,
        "wall_seconds": meta.get("seconds"),
        "gpu": {key: gpu.get(key) for key in ("batch", "tokens_per_s", "memory_gb")},
    }


def _times(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    seconds = [row["seconds"] for row in rows]
    return {"n": len(seconds), "median_s": quantile(seconds, 0.5), "p95_s": quantile(seconds, 0.95)}


def _rate(amount: float, seconds: float) -> float | None:
    return round(amount / seconds, 4) if seconds > 0 and amount > 0 else None


def tables(document: Mapping[str, Any]) -> Iterator[Table]:
    """All tables of a report document, in reading order; those without a row are left out."""
    variants = document["variants"]
    found = (
        _scores_table(document),
        _cases_table(variants),
        _pairs_table(document),
        _classes_table(variants),
        _cost_table(variants),
        _published_rows(document),
    )
    yield from (table for table in found if table.rows)


def accuracy(scores: Mapping[str, Any], metric: str) -> str:
    """`78.7 (76–81)`: percent and its 95 % interval."""
    low, high = scores[f"{metric}_ci"]
    return f"{scores[f'{metric}_acc']:.1f} ({low:.0f}–{high:.0f})"


def p_text(value: float) -> str:
    """A p value without a false zero."""
    return "<0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def _figure(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def label(variant: Mapping[str, Any]) -> str:
    """A variant's name; a partial run says so wherever it stands."""
    return f"{variant['name']}{' (partial)' if variant['partial'] else ''}"


def _scores_table(document: Mapping[str, Any]) -> Table:
    variants = document["variants"]
    asked = any(item["as_asked"]["param_acc"] != item["param_acc"] for item in variants if "as_asked" in item)
    rows: list[tuple[str, ...]] = []
    for item in variants:
        figures = [accuracy(item, metric) for metric in METRICS]
        if asked:
            own = item.get("as_asked")
            figures += [accuracy(own, metric) if own else "–" for metric in METRICS[1:]]
        rows.append((label(item), item["about"], f"{item['n']:,}", *figures))
    notes = ["in percent, with 95 % intervals by function; decoded greedily"]
    if asked:
        notes.append("as asked: a number that the data cut to a whole one may stand as the request says it")
    notes += [f"{name} has no reply yet and is left out" for name in document["empty"]]
    for item in variants:
        notes += [f"{item['name']}: PARTIAL, {'; '.join(item['partial'])}"] if item["partial"] else []
        notes += [f"{item['name']}: {item[key]:,} {words}" for key, words in _COUNTED.items() if item[key]]
        if item["cut_line"]:
            notes.append(f"{item['name']}: the last line of {item['results']} was cut and is left out")
    columns: tuple[str, ...] = ("variant", "what it is", "n", *_METRIC_WORDS)
    columns += ("parameters as asked", "both as asked") if asked else ()
    scorers = [SCORER_WORDS[name] for name in dict.fromkeys(item["scorer"] for item in variants)]
    notes += [f"{item['name']}: {SCORER_WORDS[item['scorer']]}" for item in variants if len(scorers) > 1]
    return Table("scores", f"Scores by {' and '.join(scorers)}", columns, rows, notes)


def _cases_table(variants: Sequence[Mapping[str, Any]]) -> Table:
    """Where a tool fits and where none does, and each kind that the data tells apart; no row where all is one case."""
    rows = []
    for item in (item for item in variants if item["engine"] != "none"):
        cases = item["cases"]
        if list(cases) == ["a tool fits"] and item["scorer"] == "published" and item["no_call"] == 0:
            continue
        for name, case in cases.items():
            if name == "none fits" or case != cases.get("none fits"):  # the data's own word for the same entries
                figures = (accuracy(case, metric) for metric in ("called", *METRICS))
                rows.append((label(item), name, f"{case['n']:,}", *figures))
    notes = ["calls: replies that call a tool; where none fits, a reply without a call is right in every column"]
    return Table("cases", "By case", ("variant", "case", "n", "calls", *_METRIC_WORDS), rows, notes)


def _pairs_table(document: Mapping[str, Any]) -> Table:
    models = {item["name"] for item in document["variants"] if item["engine"] != "none"}
    rows = [
        (
            f"{item['first']} → {item['second']}",
            f"{item['n']:,}",
            *(f"{item[metric]['difference']:+.1f} (p {p_text(item[metric]['p'])})" for metric in METRICS),
        )
        for item in document["pairs"]
        if {item["first"], item["second"]} <= models
    ]
    notes = ["points that the second is better, on the entries that both scored; p of the exact McNemar test"]
    return Table("pairs", "Differences", ("from → to", "n", *_METRIC_WORDS), rows, notes)


def _classes_table(variants: Sequence[Mapping[str, Any]]) -> Table:
    models = [item for item in variants if item["engine"] != "none"]
    rows = [
        (name.replace("_", " "), meaning, *(f"{item['classes'][name]:,}" for item in models))
        for name, meaning in CLASSES.items()
        if any(item["classes"][name] for item in models)
    ]
    return Table("classes", "What the replies were", ("entries", "meaning", *(item["name"] for item in models)), rows)


def _cost_table(variants: Sequence[Mapping[str, Any]]) -> Table:
    rows, notes = [], []
    for item in (item for item in variants if item["engine"] != "none"):
        found, gpu = item["cost"], item["cost"]["gpu"]
        times = (found["cold"]["median_s"], found["warm"]["median_s"])
        size = found["model_bytes"]
        rows.append((
            item["name"], *(_figure(seconds, 2) for seconds in times), _figure(found["prefill_tokens_per_s"], 0),
            _figure(found["decode_tokens_per_s"], 0), _figure(gpu["memory_gb"] or found["peak_memory_gb"], 1),
            _figure(size / 1e6 if size else None, 0),
        ))  # fmt: skip
        machine = item["machine"]
        parts = [item["engine"], machine.get("device"), machine.get("cpu"), f"{machine.get('cores')} cores"]
        notes.append(f"{item['name']}: {', '.join(dict.fromkeys(str(part) for part in parts if part))}")
    about = "s: median seconds a call; cold: nothing of the prompt was read before; read and write: tokens a second"
    columns = ("variant", "s cold", "s warm", "read", "write", "peak GB", "file MB")
    return Table("cost", "Cost", columns, rows, [about, *notes])


def _published_rows(document: Mapping[str, Any]) -> Table:
    published = document["published"]
    rows = [
        (f"{item['name']} [{''.join(item['notes'])}]", published["source"], f"{item['tool_acc']:.1f}",
         f"{item['param_acc']:.1f}")
        for item in published["rows"]
    ]  # fmt: skip
    ours = [item for item in document["variants"] if item["name"] in published["ours"]]
    rows += [(item["name"], "run here", accuracy(item, "tool"), accuracy(item, "param")) for item in ours]
    notes = [f"[{key}] {text}" for key, text in published["notes"].items()]
    notes += [f"{name} is not in this table: {'; '.join(why)}" for name, why in published["left_out"].items()]
    title = "Beside the published table (rating setting)"
    return Table("published", title, ("model", "source", "tool", "parameters"), rows, notes)


def files_table(found: Mapping[str, Mapping[str, Any]]) -> Table:
    """Scores of single results files, by every scorer; for `bench score`."""
    rows = [
        (path, scorer.replace("_", " "), f"{item['n']:,}", *(accuracy(scores, metric) for metric in METRICS))
        for path, item in found.items()
        for scorer, scores in {item["scorer"]: item, **{name: item[name] for name in SCORERS if name in item}}.items()
    ]
    notes = [f"{path}: {item[key]:,} {words}" for path, item in found.items() for key, words in _COUNTED.items()
             if item[key]]  # fmt: skip
    return Table("files", "Scores", ("results", "scorer", "n", *_METRIC_WORDS), rows, notes)


def heading(document: Mapping[str, Any]) -> list[str]:
    """What was scored on what, a line a setting, and whether it is all of it."""
    lines = [
        f"{item['source']}{'' if item['setting'] == 'none' else ', ' + item['setting'] + ' setting'}, "
        f"{item['total']:,} entries, SHA-256 {item['sha256'][:16]}"
        for item in document["data"]
    ]
    return [*lines, "PARTIAL: not all entries were scored."] if document["partial"] else lines


def markdown_report(document: Mapping[str, Any]) -> str:
    """report.md: the report's tables in Markdown."""
    parts = ["# Bench report", *map(_markdown, heading(document))]
    for table in tables(document):
        head = f"| {' | '.join(map(_markdown, table.columns))} |\n|{' --- |' * len(table.columns)}"
        lines = [f"| {' | '.join(map(_markdown, row))} |" for row in table.rows]
        parts += [f"## {table.title}", "\n".join([head, *lines])]
        parts += ["\n".join(f"- {_markdown(note)}" for note in table.notes)] if table.notes else []
    return "\n\n".join(parts) + "\n"


def _markdown(value: str) -> str:
    """Text that Markdown shows as it stands."""
    escaped = "".join(f"\\{char}" if char in "\\`*_[]<>|#~&" else char for char in value)
    return " ".join(escaped.split())


def print_report(document: Mapping[str, Any]) -> None:
    """The tables on stdout; what each variant is stands below the scores, where a terminal has room for it."""
    for line in heading(document):
        stdout.print(line, soft_wrap=True)
    for table in tables(document):
        if table.key in ("scores", "classes"):
            about = [f"{row[0]}: {row[1]}" for row in table.rows if row[1] and table.key == "scores"]
            rows = [(row[0], *row[2:]) for row in table.rows]
            table = Table(table.key, table.title, (table.columns[0], *table.columns[2:]), rows, [*about, *table.notes])
        show(table)


def show(table: Table) -> None:
    """One table with its notes on stdout."""
    print_table(table.title, list(table.columns), [list(row) for row in table.rows], "\n".join(table.notes))
