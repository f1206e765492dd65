"""The report's tables, once for every form: cells are texts, and each form draws them its own way."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from petool_lite.bench.errors import CLASSES, FAULTS
from petool_lite.bench.score import METRICS, SCORERS

SCORED_BY = "published scorer, greedy decoding, 95 % Wilson intervals in brackets"
TITLES = {
    "history_length": "Tool accuracy by length of the history (calls)",
    "equal_tools": "Tool accuracy by number of offered tools that do the same job",
    "liked_share": "Tool accuracy by share of likes of the right provider in the history",
}
NO_VALUE = "–"


@dataclass(frozen=True)
class Table:
    """A titled table; the first `texts` columns are text, all others numbers. `notes` stand below it."""

    key: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    texts: int = 1


def tables(document: Mapping[str, Any]) -> Iterator[Table]:
    """All tables of a report document, in reading order; those without a row are left out."""
    variants = document["variants"]
    found = [
        scores_table(document),
        strict_table(variants),
        cost_table(variants),
        pairs_table(document),
        classes_table(variants),
        faults_table(variants),
        settings_table(document),
        *(make(variants, name) for name in TITLES for make in (breakdown_table, part_classes_table)),
        published_rows(document),
    ]
    yield from (table for table in found if table.rows)


def letters(count: int) -> list[str]:
    """A, B, ... Z, A2, B2, ...: one for each variant."""
    return [chr(65 + index % 26) + (str(index // 26 + 1) if index >= 26 else "") for index in range(count)]


def accuracy(scores: Mapping[str, Any], metric: str) -> str:
    """`78.7 (76–81)`."""
    low, high = scores[f"{metric}_ci"]
    return f"{scores[f'{metric}_acc']:.1f} ({low:.0f}–{high:.0f})"


def number(value: float | None, digits: int = 1) -> str:
    """A figure with thousands separated, or a dash."""
    return NO_VALUE if value is None else f"{value:,.{digits}f}"


def p_text(value: float) -> str:
    """A p value in words of common use, without a false zero."""
    return "<0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def labels(variants: Sequence[Mapping[str, Any]]) -> list[str]:
    """Letter and name of each variant; a partial run says so wherever it stands."""
    return [
        f"{letter} {item['name']}{' (partial)' if item['partial'] else ''}"
        for letter, item in zip(letters(len(variants)), variants, strict=True)
    ]


def _filled(table: Table) -> Table:
    """The table without columns that hold no figure at all."""
    kept = [
        index
        for index in range(len(table.columns))
        if index < table.texts or any(row[index] != NO_VALUE for row in table.rows)
    ]
    rows = tuple(tuple(row[index] for index in kept) for row in table.rows)
    return replace(table, columns=tuple(table.columns[index] for index in kept), rows=rows)


def scores_table(document: Mapping[str, Any]) -> Table:
    """The headline figures."""
    variants = document["variants"]
    rows = tuple(
        (name, f"{item['n']:,}", *(accuracy(item, metric) for metric in METRICS))
        for name, item in zip(labels(variants), variants, strict=True)
    )
    columns = ("variant", "n", "tool %", "param. %", "both %")
    begun = tuple(f"{name} has no reply yet and is left out" for name in document["empty"])
    return Table("scores", "Scores", columns, rows, (SCORED_BY, *begun, *score_notes(variants)))


def score_files_table(scores: Mapping[str, Mapping[str, Any]]) -> Table:
    """Scores of single files, by every scorer."""
    rows = tuple(
        (path, scorer, f"{found['n']:,}", *(accuracy(found.get(scorer, found), metric) for metric in METRICS))
        for path, found in scores.items()
        for scorer in SCORERS
    )
    notes = [
        f"{path}: {found[key]:,} {words}"
        for path, found in scores.items()
        for key, words in _COUNTED.items()
        if found[key]
    ]
    columns = ("results", "scorer", "n", "tool %", "param. %", "both %")
    return Table("files", "Scores", columns, rows, tuple(notes), 2)


_COUNTED = {
    "history_trimmed": "prompts without their oldest history",
    "too_long": "prompts beyond its context, which count as wrong",
    "engine_errors": "failures of the engine, which are not scored",
    "cut_off": "cut off at the reply limit",
}


def score_notes(variants: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader of the scores must know, one line a fact."""
    notes = [f"{item['name']}: PARTIAL, {'; '.join(item['partial'])}" for item in variants if item["partial"]]
    for item in variants:
        notes += [f"{item['name']}: {item[key]:,} {words}" for key, words in _COUNTED.items() if item[key]]
        if item["cut_line"]:
            notes.append(f"{item['name']}: the last line of {item['results']} was cut and is left out")
        notes += flip_notes(item)
    return notes


def flip_notes(variant: Mapping[str, Any]) -> list[str]:
    """Whether batches on a GPU gave other replies than one prompt at a time."""
    found = variant["cost"]
    checked, tried = found["gpu_flips_checked"], found["gpu_flips_by_batch"] or {}
    if not checked:
        return []
    more = "".join(f", {flips} in batches of {size}" for size, flips in tried.items() if flips)
    text = f"batches of {found['gpu_batch']} changed {found['gpu_flips'] or 0} of {checked} checked replies{more}"
    return [f"{variant['name']}: {text}"]


def strict_table(variants: Sequence[Mapping[str, Any]]) -> Table:
    """The other two scorers."""
    rows = tuple(
        (letter, *(accuracy(item[scorer], metric) for scorer in ("strict", "spanning") for metric in METRICS))
        for letter, item in zip(letters(len(variants)), variants, strict=True)
    )
    kinds = [f"{scorer} {name}" for scorer in ("strict", "span.") for name in ("tool", "param.", "both")]
    notes = (
        "strict: the whole reply is one JSON call; any key order, 1 equals 1.0, true is no number",
        "spanning: the published scorer with a match over several lines",
    )
    return Table("scorers", "The same replies by other scorers, %", ("variant", *kinds), rows, notes)


def cost_table(variants: Sequence[Mapping[str, Any]]) -> Table:
    """Times, speeds, memory, size."""
    rows = []
    for letter, item in zip(letters(len(variants)), variants, strict=True):
        found = item["cost"]
        size = found["model_bytes"]
        times = [
            f"{number(found[kind]['median_s'], 2)} / {number(found[kind]['p95_s'], 2)}"
            if found[kind]["n"]
            else NO_VALUE
            for kind in ("cold", "warm")
        ]
        speeds = [number(found[f"{kind}_tokens_per_s"], 0) for kind in ("prefill", "decode", "gpu")]
        memory = [number(found["peak_memory_gb"], 2), number(found["gpu_memory_gb"], 1)]
        rows.append((letter, *times, *speeds, *memory, number(size / 1e6 if size else None, 0)))
    notes = [
        "s: seconds a call, median / 95th percentile; cold: nothing of the prompt was read before",
        "prefill, decode, GPU: tokens a second; GPU: all that a batch reads and writes",
    ]
    notes += [
        f"{letter}: {machine(item)}"
        for letter, item in zip(letters(len(variants)), variants, strict=True)
        if item["engine"] != "none"
    ]
    columns = ("variant", "s cold", "s warm", "prefill", "decode", "GPU", "peak GB", "GPU GB", "file MB")
    return _filled(Table("cost", "Cost", columns, tuple(rows), tuple(notes)))


def machine(variant: Mapping[str, Any]) -> str:
    """Engine and machine in words."""
    found = variant["machine"]
    parts = [variant["engine"], found.get("device"), found.get("cpu")]
    if found.get("cores"):
        parts.append(f"{found['cores']} cores")
    if variant["cost"]["gpu_batch"]:
        parts.append(f"batches of {variant['cost']['gpu_batch']}")
    return ", ".join(str(part) for part in dict.fromkeys(parts) if part)


def pairs_table(document: Mapping[str, Any]) -> Table:
    """Paired tests; the difference is second minus first. Pairs of two models first; those of two baselines nowhere."""
    variants = document["variants"]
    letter = dict(zip((item["name"] for item in variants), letters(len(variants)), strict=True))
    models = {item["name"] for item in variants if item["engine"] != "none"}
    pairs = [item for item in document["pairs"] if {item["first"], item["second"]} & models]
    pairs.sort(key=lambda item: not {item["first"], item["second"]} <= models)
    rows = tuple(
        (
            f"{letter[item['first']]} → {letter[item['second']]}",
            f"{item['n']:,}",
            *(f"{item[metric]['difference']:+.1f} (p {p_text(item[metric]['p'])})" for metric in METRICS),
            f"{item['agreement']:.1f}",
        )
        for item in pairs
    )
    columns = ("pair", "n", "tool", "param.", "both", "same call %")
    notes = (
        "points that the second is better, and p of the exact McNemar test, two-sided, on the entries that both scored",
        "p is not corrected for the number of pairs",
    )
    return Table("pairs", "Differences on the same entries", columns, rows, notes)


def _counts(meanings: Mapping[str, str], counts: Sequence[Mapping[str, int]]) -> tuple[tuple[str, ...], ...]:
    """A row for each name that occurs: the name, its meaning, and how often each variant has it."""
    return tuple(
        (name.replace("_", " "), meaning, *(f"{each[name]:,}" for each in counts))
        for name, meaning in meanings.items()
        if any(each[name] for each in counts)
    )


def classes_table(variants: Sequence[Mapping[str, Any]]) -> Table:
    """Error classes; one that occurs nowhere is left out."""
    rows = _counts(CLASSES, [item["classes"] for item in variants])
    return Table("classes", "What went wrong", ("class", "meaning", *letters(len(variants))), rows, (), 2)


def faults_table(variants: Sequence[Mapping[str, Any]]) -> Table:
    """What is wrong with parameters where the tool is right."""
    rows = _counts(FAULTS, [item["parameter_faults"] for item in variants])
    columns = ("fault", "meaning", *letters(len(variants)))
    return Table("faults", "Wrong parameters of the right tool", columns, rows, ("one count a parameter",), 2)


def settings_table(document: Mapping[str, Any]) -> Table:
    """Scores by setting, where a folder holds more than one."""
    variants = document["variants"] if len(document["settings"]) > 1 else []
    rows = tuple(
        (name, label, f"{item['n']:,}", *(accuracy(item, metric) for metric in METRICS))
        for name in document["settings"]
        for label, item in zip(labels(variants), variants, strict=True)
        if item["setting"] == name
    )
    columns = ("setting", "variant", "n", "tool %", "param. %", "both %")
    return Table("settings", "By setting", columns, rows, (), 2)


def breakdown_table(variants: Sequence[Mapping[str, Any]], name: str) -> Table:
    """Tool accuracy of the parts, a column a variant."""
    parts = {part["part"]: None for item in variants for part in item["breakdown"][name]}
    cells = [{part["part"]: part for part in item["breakdown"][name]} for item in variants]
    rows = tuple(
        (
            part,
            f"{max(found[part]['n'] for found in cells if part in found):,}",
            *(f"{found[part]['tool_acc']:.1f}" if part in found else NO_VALUE for found in cells),
        )
        for part in parts
    )
    return Table(name, TITLES[name], ("part", "n", *letters(len(variants))), rows)


def part_classes_table(variants: Sequence[Mapping[str, Any]], name: str) -> Table:
    """Error classes of the parts in percent, a row a part of each variant of a model; none where there is one part."""
    pairs = [
        (label, part)
        for label, item in zip(labels(variants), variants, strict=True)
        if item["engine"] != "none" and len(item["breakdown"][name]) > 1
        for part in item["breakdown"][name]
    ]
    kinds = [kind for kind in CLASSES if any(part["classes"][kind] for _, part in pairs)]
    rows = tuple(
        (label, part["part"], f"{part['n']:,}", *(f"{100 * part['classes'][kind] / part['n']:.0f}" for kind in kinds))
        for label, part in pairs
    )
    columns = ("variant", "part", "n", *(kind.replace("_", " ") for kind in kinds))
    return Table(
        f"{name}_classes", TITLES[name].replace("Tool accuracy", "What went wrong, in %,"), columns, rows, (), 2
    )


def published_rows(document: Mapping[str, Any]) -> Table:
    """Published figures and ours; empty where none of ours may stand there."""
    published = document["published"]
    rows = [
        (
            f"{item['name']} [{''.join(item['notes'])}]",
            published["mark"],
            f"{item['tool_acc']:.1f}",
            f"{item['param_acc']:.1f}",
        )
        for item in published["rows"]
    ]
    ours = [item for item in document["variants"] if item["name"] in published["ours"]]
    rows += [(item["name"], "run here", accuracy(item, "tool"), accuracy(item, "param")) for item in ours]
    notes = [f"[{key}] {text}" for key, text in published["notes"].items()]
    notes += [f"{name} is not in this table: {'; '.join(why)}" for name, why in published["left_out"].items()]
    title = "Beside the published table (rating setting)"
    return Table("published", title, ("model", "source", "tool %", "parameters %"), tuple(rows), tuple(notes), 2)


def comparison_table(item: Mapping[str, Any]) -> Table:
    """One variant before and after, on the common entries, with the paired test: a row a metric."""
    rows = []
    for metric, words in zip(METRICS, ("tool %", "param. %", "both %"), strict=True):
        test, (before, after) = item[metric], item["scores"]
        low, high = test["ci"]
        change = f"{test['difference']:+.1f} ({low:+.1f} to {high:+.1f})"
        flips = f"+{test['second_only']} -{test['first_only']}"
        rows.append((words, accuracy(before, metric), accuracy(after, metric), change, flips, p_text(test["p"])))
    notes = [f"n {item['n']:,}, the same call in {item['agreement']:.1f} %"]
    if item["entries"] != [item["n"], item["n"]]:
        notes[0] += f"; the first scored {item['entries'][0]:,} entries, the second {item['entries'][1]:,}"
    if item["other_prompts"]:
        notes.append(f"{item['other_prompts']:,} entries have another prompt (style, template or trimming)")
    notes.append("difference in points with its 95 % interval, entries won and lost, exact McNemar test")
    name = item["first"] if item["first"] == item["second"] else f"{item['first']} → {item['second']}"
    columns = ("metric", "first", "second", "difference", "entries", "p")
    return Table("comparison", f"{name}, on the same entries", columns, tuple(rows), tuple(notes))


def flipped_table(item: Mapping[str, Any], most: int) -> Table:
    """The first entries whose verdict changed."""
    shown = item["flipped"][:most]
    rows = tuple(
        (
            flip["entry_id"],
            flip["change"],
            " → ".join(name.replace("_", " ") for name in dict.fromkeys(flip["classes"])),
        )
        for flip in shown
    )
    left = len(item["flipped"]) - len(shown)
    notes = (f"{left:,} more, and every reply: --json",) if left else ("the replies: --json",)
    title = f"{item['second']}: {len(item['flipped']):,} entries flipped"
    return Table("flipped", title, ("entry", "now", "class"), rows, notes, 3)
