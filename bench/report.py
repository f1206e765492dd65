"""The report of a folder of results: one document, from the files alone, its tables, and its written forms."""

import base64
import hashlib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import resources
from itertools import combinations
from pathlib import Path, PurePosixPath
from typing import Any

from petool_lite.bench.results import ROWS_SCHEMA, Results, load_folder
from petool_lite.bench.score import CLASSES, METRIC_WORDS, METRICS, paired, quantile, summary
from petool_lite.console import print_table, terminal
from petool_lite.errors import PetoolError
from petool_lite.models import file_sha256
from petool_lite.runs import write_json, write_text

SCHEMA = 4
_PUBLISHED = ("user_entries_test.json", "user_entries_test_r.json")
WORDS = dict(zip(METRICS, METRIC_WORDS, strict=True))  # of every figure, those as asked last
WORDS |= {f"{metric}_as_asked": f"{WORDS[metric]} as asked" for metric in METRICS[1:]}
_SCORER_WORDS = {
    "published": "the published scorer", "ast": "BFCL's AST scorer", "no_call": "whether no tool is called"
}  # fmt: skip
_COUNTED = {
    "history_trimmed": "prompts without their oldest history",
    "too_long": "prompts beyond its context, which count as wrong",
    "engine_errors": "failures of the engine, which are not scored",
    "cut_off": "cut off at the reply limit",
}


@dataclass(frozen=True)
class Table:
    """A titled table of texts; `notes` stand below it."""

    key: str
    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    notes: Sequence[str] = ()

    @property
    def numbers(self) -> list[bool]:
        """Which columns hold numbers only."""
        return [all(row[place][:1] in "0123456789+-–<" for row in self.rows) for place in range(len(self.columns))]


def write_report(*folders: Path, target: Path | None = None) -> dict[str, Any]:
    """Score `folders` and write report.json, .md and .html to `target`, else to the first; return the document."""
    scored = load_folder(*folders)
    if not scored:
        raise PetoolError(f"no result in {folders[0]} yet", "petool-lite bench goes on where it was stopped")
    document = build_report(scored)
    target = target or folders[0]
    write_text(target / "report.md", markdown_report(document))
    write_text(target / "report.html", html_report(document, scored))
    write_json(target / "report.json", document)
    return document


def build_report(scored: Sequence[Results]) -> dict[str, Any]:
    """The report document (report.schema.json, docs/bench.md); the same files give the same document."""
    variants = [_variant(item) for item in scored]
    data = {item["setting"]: {"setting": item["setting"], **item["data"]} for item in reversed(variants)}
    pairs = [
        {"first": one.name, "second": two.name, **paired(one.by_entry, two.by_entry)}
        for one, two in combinations(scored, 2)
        if one.meta["setting"] == two.meta["setting"]
    ]
    own = {"schema": SCHEMA, "rows_schema": ROWS_SCHEMA, "partial": any(item["partial"] for item in variants)}
    return {**own, "data": list(reversed(data.values())), "variants": variants, "pairs": pairs}


def _variant(item: Results) -> dict[str, Any]:
    meta = item.meta
    rows, scores, kinds = zip(*item.triples.values(), strict=True)
    keys = ("engine", "decoding", "style", "setting", "model", "machine", "versions", "model_sha256", "commit")
    return {
        **{"name": item.name, "about": str(meta.get("about") or "")},
        **{key: meta.get(key) for key in (*keys, "started", "limit", "shard", "max_reply_tokens")},
        "data": {key: meta["data"][key] for key in ("source", "sha256", "total")},
        **{"results": item.path.name, "results_sha256": file_sha256(item.path), "cut_line": item.cut_line},
        **{"partial": partial_reasons(rows, meta), "published_data": is_published_data(meta), "rows": len(rows)},
        **summary(rows, scores),
        **{"classes": {name: kinds.count(name) for name in CLASSES}, "cost": cost(rows, meta)},
    }


def partial_reasons(rows: Sequence[Mapping[str, Any]], meta: Mapping[str, Any]) -> list[str]:
    """Why a variant was not scored on the whole of its data; empty if it was."""
    total, broken = meta["data"]["total"], sum(row["status"] == "engine_error" for row in rows)
    reasons = {
        f"limited to {meta.get('limit')} of {total:,} entries": (meta.get("limit") or total) < total,
        "one shard of the data": meta.get("shard"),
        f"{len(rows):,} of {meta['entries']:,} entries so far": len(rows) < meta["entries"] or not meta["complete"],
        f"the engine failed on {broken:,} entries, which are not scored": broken,
    }
    return [reason for reason, holds in reasons.items() if holds]


def is_published_data(meta: Mapping[str, Any]) -> bool:
    """Whether the data is the published rating test set, by file name, setting and number of entries."""
    name = PurePosixPath(meta["data"]["source"].replace("\\", "/")).name.removesuffix(".zip")
    return name in _PUBLISHED and (meta["setting"], meta["data"]["total"]) == ("rating", 1000)


def cost(rows: Sequence[Mapping[str, Any]], meta: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds a call (median and 95th percentile, cold and warm apart), tokens/s, GB and bytes; None where unknown. A
    call is cold if nothing of its prompt was in the engine's memory; what was reused is not counted as read."""
    runs = [row for row in rows if row["status"] == "ok"] if meta["engine"] != "none" else []

    def times(cold: bool) -> dict[str, Any]:
        seconds = [row["seconds"] for row in runs if bool(row.get("cold")) == cold]
        return {"n": len(seconds), "median_s": quantile(seconds, 0.5), "p95_s": quantile(seconds, 0.95)}

    def rate(amount: float, key: str) -> float | None:
        seconds = sum(row[key] for row in runs)
        return round(amount / seconds, 4) if seconds > 0 and amount > 0 else None

    read = sum(max(0, row["prompt_tokens"] - row.get("cached_tokens", 0)) for row in runs)
    return {
        **{"cold": times(cold=True), "warm": times(cold=False)},
        "prefill_tokens_per_s": rate(read, "prefill_s"),
        "decode_tokens_per_s": rate(sum(row["reply_tokens"] for row in runs), "decode_s"),
        "peak_memory_gb": meta.get("peak_memory_gb") if runs else None,
        **{"model_bytes": meta.get("model_bytes") or None, "wall_seconds": meta.get("seconds")},
        "gpu": {key: (meta.get("gpu") or {}).get(key) for key in ("batch", "memory_gb")},
    }


def tables(document: Mapping[str, Any]) -> Iterator[Table]:
    """All tables of a report document, in reading order; those without a row are left out."""
    models = [item for item in document["variants"] if item["engine"] != "none"]
    pairs = _pairs_table(document, {item["name"] for item in models})
    found = (_scores_table(document), _cases_table(models), pairs, _classes_table(models), _cost_table(models))
    yield from (table for table in (*found, _published_table(document["variants"])) if table.rows)


def accuracies_cells(scores: Mapping[str, Any], *metrics: str) -> list[str]:
    """`78.7 (76–81)` of each metric: percent and its 95 % interval; a dash where it was not scored."""
    found = [(scores.get(f"{name}_acc"), scores.get(f"{name}_ci", ())) for name in metrics or METRICS]
    return ["–" if share is None else "{:.1f} ({:.0f}–{:.0f})".format(share, *ends) for share, ends in found]


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
    asked = any(item.get("param_as_asked_acc", item["param_acc"]) != item["param_acc"] for item in variants)
    names = tuple(WORDS) if asked else METRICS
    columns = ("variant", "what it is", "n", *(WORDS[name] for name in names))
    rows = [(label(item), item["about"], f"{item['n']:,}", *accuracies_cells(item, *names)) for item in variants]
    notes = ["in percent, with 95 % intervals by function; decoded greedily"]
    notes += ["as asked: a number that the data cut to a whole one may stand as the request says it"] if asked else []
    scorers = [_SCORER_WORDS[name] for name in dict.fromkeys(item["scorer"] for item in variants)]
    for item in variants:
        notes += [f"{item['name']}: {note}" for note in _notes(item)]
        notes += [f"{item['name']}: {_SCORER_WORDS[item['scorer']]}"] if len(scorers) > 1 else []
    return Table("scores", f"Scores by {' and '.join(scorers)}", columns, rows, notes)


def _notes(item: Mapping[str, Any]) -> Iterator[str]:
    if item["partial"]:
        yield f"PARTIAL, {'; '.join(item['partial'])}"
    yield from (f"{item[key]:,} {words}" for key, words in _COUNTED.items() if item[key])
    if item["cut_line"]:
        yield f"the last line of {item['results']} was cut and is left out"
    if (sure := item["calibration"]) and item["n"] >= 100:  # of fewer a calibration error says nothing
        yield (
            f"its confidence is off by {100 * sure['ece']:.0f} points (expected calibration error), on half of the "
            f"functions by {100 * sure['ece_fitted']:.0f} with the other half's temperature, {sure['temperature']:.2f}"
        )


def _cases_table(models: Sequence[Mapping[str, Any]]) -> Table:
    """Where a tool fits and where none does, and each kind that the data tells apart; no row where all is one case."""
    rows = [
        (label(item), name, f"{case['n']:,}", *accuracies_cells(case, "called", *METRICS))
        for item in models
        if list(item["cases"]) != ["a tool fits"] or item["scorer"] != "published" or item["no_call"]
        for name, case in item["cases"].items()
        if name == "none fits" or case != item["cases"].get("none fits")  # the data's own word for the same entries
    ]
    notes = ["calls: replies that call a tool; where none fits, a reply without a call is right in every column"]
    return Table("cases", "By case", ("variant", "case", "n", "calls", *METRIC_WORDS), rows, notes)


def _pairs_table(document: Mapping[str, Any], models: set[str]) -> Table:
    rows = [
        (f"{item['first']} → {item['second']}", f"{item['n']:,}",
         *(f"{test['difference']:+.1f} (p {p_text(test['p'])})" for test in map(item.get, METRICS)))
        for item in document["pairs"] if {item["first"], item["second"]} <= models
    ]  # fmt: skip
    notes = ["points that the second is better, on the entries that both scored; p of the exact McNemar test"]
    return Table("pairs", "Differences", ("from → to", "n", *METRIC_WORDS), rows, notes)


def _classes_table(models: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        (name.replace("_", " "), meaning, *(f"{item['classes'][name]:,}" for item in models))
        for name, meaning in CLASSES.items()
        if any(item["classes"][name] for item in models)
    ]
    return Table("classes", "What the replies were", ("entries", "meaning", *(item["name"] for item in models)), rows)


def _cost_table(models: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    notes = ["s: median seconds a call; cold: nothing of the prompt was read before; read and write: tokens/s"]
    for item in models:
        found, machine = item["cost"], item["machine"]
        times = (_figure(found[key]["median_s"], 2) for key in ("cold", "warm"))
        rates = (_figure(found[f"{key}_tokens_per_s"], 0) for key in ("prefill", "decode"))
        size = found["model_bytes"] and found["model_bytes"] / 1e6
        peak = found["gpu"]["memory_gb"] or found["peak_memory_gb"]
        rows.append((item["name"], *times, *rates, _figure(peak, 1), _figure(size, 0)))
        parts = [item["engine"], machine.get("device"), machine.get("cpu"), f"{machine.get('cores')} cores"]
        notes.append(f"{item['name']}: {', '.join(dict.fromkeys(str(part) for part in parts if part))}")
    return Table("cost", "Cost", ("variant", "s cold", "s warm", "read", "write", "peak GB", "file MB"), rows, notes)


def _published_table(variants: Sequence[Mapping[str, Any]]) -> Table:
    """The published figures, where one of ours stands beside them: it scored all entries of that very data."""
    ours = [item for item in variants if item["published_data"] and not item["partial"]]
    held = tomllib.loads(resources.files("petool_lite.bench").joinpath("published.toml").read_text(encoding="utf-8"))
    rows = [
        (f"{name} [{notes}]", "published, not run here", f"{tool:.1f}", f"{parameters:.1f}")
        for name, (tool, parameters, notes) in held["rows"].items()
    ]
    rows += [(item["name"], "run here", *accuracies_cells(item, "tool", "param")) for item in ours]
    notes = [f"[{key}] {text}" for key, text in held["notes"].items()]
    title, columns = "Beside the published table (rating setting)", ("model", "source", "tool", "parameters")
    return Table("published", title, columns, rows if ours else [], notes)


def heading(document: Mapping[str, Any]) -> list[str]:
    """What was scored on what, a line a setting, and whether it is all of it."""
    lines = []
    for item in document["data"]:
        setting = "" if item["setting"] == "none" else f", {item['setting']} setting"
        lines.append(f"{item['source']}{setting}, {item['total']:,} entries, SHA-256 {item['sha256'][:16]}")
    return [*lines, "PARTIAL: not all entries were scored."] if document["partial"] else lines


def markdown_report(document: Mapping[str, Any]) -> str:
    """report.md: the report's tables in Markdown."""
    parts = ["# Bench report", *map(_markdown, heading(document))]
    for table in tables(document):
        lines = [f"| {' | '.join(map(_markdown, row))} |" for row in (table.columns, *table.rows)]
        lines.insert(1, f"|{' --- |' * len(table.columns)}")
        parts += [f"## {table.title}", "\n".join(lines)]
        parts += ["\n".join(f"- {_markdown(note)}" for note in table.notes)] if table.notes else []
    return "\n\n".join(parts) + "\n"


def _markdown(value: str) -> str:
    """Text that Markdown shows as it stands."""
    return " ".join("".join(f"\\{char}" if char in "\\`*_[]<>|#~&" else char for char in value).split())


def print_report(document: Mapping[str, Any]) -> None:
    """The tables on stdout; what each variant is stands below the scores, where a terminal has room for it."""
    for line in heading(document):
        terminal().print(line, soft_wrap=True)
    for table in tables(document):
        if table.key in ("scores", "classes"):
            about = [f"{row[0]}: {row[1]}" for row in table.rows if row[1] and table.key == "scores"]
            columns, *rows = ((row[0], *row[2:]) for row in (table.columns, *table.rows))
            table = replace(table, columns=columns, rows=rows, notes=[*about, *table.notes])
        print_table(table.title, table.columns, table.rows, "\n".join(table.notes))


def html_report(document: Mapping[str, Any], scored: Sequence[Results]) -> str:
    """The report as one HTML page; a policy in it forbids loading anything and running any script but its own."""
    from jinja2 import Environment

    page = resources.files("petool_lite.bench").joinpath("report.html").read_text(encoding="utf-8")
    script = page.partition("<script>")[2].partition("</script>")[0]
    entries: dict[tuple[str, str], list[tuple[str, dict[str, Any], str]]] = {}
    for item in scored:  # for every entry the replies to it: variant, row and class of each
        for row, _, kind in item.triples.values():
            entries.setdefault((row["setting"], row["entry_id"]), []).append((item.name, row, kind))
    first = document["variants"][0]
    version = f"petool-lite {first['versions'].get('petool-lite', '')} {first['commit'] or ''}".strip()
    return Environment(autoescape=True).from_string(page).render(
        json=partial(json.dumps, ensure_ascii=False),
        hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        lines=[*heading(document), version], variants=document["variants"], tables=list(tables(document)),
        metrics=dict(zip(METRICS, METRIC_WORDS, strict=True)), entries=list(entries.values()), classes=CLASSES,
    )  # fmt: skip
