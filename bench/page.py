"""report.html: one file with everything in it. It loads nothing, and replies can only ever be text in it."""

import base64
import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

from petool_lite.bench.report import Scored, Table, heading, label, tables
from petool_lite.bench.score import CLASSES, METRICS

_INK = "#010203"  # stands for the page's own text colour, light or dark
_COLOURS = ("#2a78c2", "#d1702a", "#2f9e77", "#9a5fc0", "#c2447e", "#7a8699", "#b59b1d", "#4cb0c9")
_NAMES = {"joint": "both right", "tool": "tool right", "param": "parameters right"}


def html_report(document: Mapping[str, Any], scored: Sequence[Scored]) -> str:
    """The report as one HTML page; a policy in it forbids loading anything and running any script but its own."""
    page = resources.files("petool_lite.bench").joinpath("report.html").read_text(encoding="utf-8")
    script = page.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    found = list(tables(document))
    sections = [_header(document), _section(found[0]), _charts(document["variants"]), *map(_section, found[1:])]
    body = "\n".join([*sections, _entries(scored)])
    before, after = page.replace("$hash", digest).split("$body")
    return f"{before}{body}{after}"


def _header(document: Mapping[str, Any]) -> str:
    first = document["variants"][0]
    version = f"petool-lite {first['versions'].get('petool-lite', '')} {first['commit'] or ''}".strip()
    lines = [*heading(document), version]
    kinds = [' class="partial"' if line.startswith("PARTIAL") else "" for line in lines]
    told = "".join(f"<p{kind}>{escape(line)}</p>" for kind, line in zip(kinds, lines, strict=True))
    return f"<header><h1>Bench report</h1>{told}</header>"


def _section(table: Table) -> str:
    numbers = [all(row[index][:1] in "0123456789+-–<" for row in table.rows) for index in range(len(table.columns))]

    def line(cells: Sequence[str], tag: str) -> str:
        kinds = [" class=num" if number else "" for number in numbers]
        return "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))

    rows = "".join(f"<tr>{line(row, 'td')}</tr>" for row in table.rows)
    notes = "".join(f"<li>{escape(note)}</li>" for note in table.notes)
    return (
        f'<section id="{table.key}"><h2>{escape(table.title)}</h2><div class=scroll tabindex=0><table>'
        f"<thead><tr>{line(table.columns, 'th')}</tr></thead><tbody>{rows}</tbody></table></div>"
        f"{f'<ul class=notes>{notes}</ul>' if notes else ''}</section>"
    )


def _entries(scored: Sequence[Scored]) -> str:
    """Every entry with its right answer and each variant's reply, those with a wrong reply to be filtered for."""
    found: dict[tuple[str, str], list[tuple[Scored, int]]] = {}
    for item in scored:
        for place, row in enumerate(item.results.rows):
            found.setdefault((row["setting"], row["entry_id"]), []).append((item, place))
    entries = "\n".join(map(_entry, found.values()))
    return (
        "<section id=replies><h2>Every entry and its replies</h2><div id=filters hidden>"
        '<input id=words type=search placeholder="words of a request, tool or reply" aria-label="search">'
        "<label><input id=wrong type=checkbox> with a wrong reply</label>"
        "<label><input id=differ type=checkbox> where variants differ</label>"
        f"<span id=count></span></div>{entries}</section>"
    )


def _entry(replies: Sequence[tuple[Scored, int]]) -> str:
    first = replies[0][0].results.rows[replies[0][1]]
    classes = [item.classes[place] for item, place in replies]
    right = sum(name == "right" for name in classes)
    kind = " right" if right == len(classes) else ""
    parts = [("right answer", json.dumps(first["gold"], ensure_ascii=False))]
    parts.append(("offered tools", "\n".join(first["facts"]["offered"])))
    for (item, place), name in zip(replies, classes, strict=True):
        row = item.results.rows[place]
        reply = row.get("reply", "") if row["status"] == "ok" else row.get("error", "")
        parts.append((f"{item.name}: {name.replace('_', ' ')}, {CLASSES[name]}", reply))
    told = "".join(f"<dt>{escape(title)}</dt><dd><pre>{escape(text)}</pre></dd>" for title, text in parts)
    query = escape(first.get("query") or first["gold"]["tool_name"])
    return (
        f'<details class=entry data-classes="{" ".join(classes)}"><summary>{query} '
        f"<small>{escape(first['entry_id'])}</small><span class='tag{kind}'>{right} of {len(classes)} right</span>"
        f"</summary><dl>{told}</dl></details>"
    )


def _charts(variants: Sequence[Mapping[str, Any]]) -> str:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return "<p class=notes>No charts: matplotlib is not installed (it comes with petool-lite[train]).</p>"
    drawn = [("Accuracy, with 95 % intervals", _draw(_accuracies, variants))]
    drawn.append(("What the replies were, in percent", _draw(_classes, variants)))
    cards = "".join(f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>" for title, svg in drawn)
    return f"<section><h2>Charts</h2><div class=charts>{cards}</div></section>"


def _draw(chart: Callable[[Any, Sequence[Mapping[str, Any]]], None], variants: Sequence[Mapping[str, Any]]) -> str:
    """A chart as inline SVG without ids that another one has; the same variants give the same text."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {"svg.fonttype": "none", "svg.hashsalt": chart.__name__, "font.family": "sans-serif", "font.size": 10}
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK)
    with matplotlib.rc_context({**style, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(6.4, 1.6 + 0.38 * max(4, len(variants))), layout="constrained")
        axes = figure.add_subplot()
        chart(axes, variants)
        file = io.StringIO()
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    return re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{chart.__name__}", svg)


def _accuracies(axes: Any, variants: Sequence[Mapping[str, Any]]) -> None:
    for number, metric in enumerate(("joint", "tool", "param")):
        values = [item[f"{metric}_acc"] for item in variants]
        errors = [
            [max(0.0, value - item[f"{metric}_ci"][0]) for value, item in zip(values, variants, strict=True)],
            [max(0.0, item[f"{metric}_ci"][1] - value) for value, item in zip(values, variants, strict=True)],
        ]
        places = [index + 0.24 * (number - 1) for index in range(len(variants))]
        axes.errorbar(values, places, xerr=errors, fmt="o", capsize=2, color=_COLOURS[number], label=_NAMES[metric])
    _rows(axes, variants, len(METRICS))


def _classes(axes: Any, variants: Sequence[Mapping[str, Any]]) -> None:
    totals = [sum(item["classes"].values()) or 1 for item in variants]
    left = [0.0] * len(variants)
    used = [name for name in CLASSES if any(item["classes"][name] for item in variants)]
    for number, name in enumerate(used):
        widths = [100 * item["classes"][name] / total for item, total in zip(variants, totals, strict=True)]
        colour = "#2f9e77" if name == "right" else [c for c in _COLOURS if c != "#2f9e77"][number % 7]
        axes.barh(range(len(variants)), widths, 0.7, left, color=colour, label=name.replace("_", " "))
        left = [start + width for start, width in zip(left, widths, strict=True)]
    _rows(axes, variants, 3)


def _rows(axes: Any, variants: Sequence[Mapping[str, Any]], columns: int) -> None:
    """A row a variant, the first on top, percent below, the legend above."""
    axes.set_yticks(range(len(variants)), [label(item) for item in variants], parse_math=False)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("%")
    axes.figure.legend(loc="outside upper left", ncols=columns, frameon=False, fontsize=9)
