"""report.html: one file with everything in it. It loads nothing, and replies can only ever be text in it."""

import base64
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import resources
from typing import Any

from petool_lite.bench.report import METRIC_WORDS, heading, label, tables
from petool_lite.bench.results import Results
from petool_lite.bench.score import CLASSES, METRICS

_INK = "#010203"  # stands for the page's own text colour, light or dark
_COLOURS = ("#2a78c2", "#d1702a", "#9a5fc0")


def html_report(document: Mapping[str, Any], scored: Sequence[Results]) -> str:
    """The report as one HTML page; a policy in it forbids loading anything and running any script but its own."""
    from jinja2 import Environment

    page = resources.files("petool_lite.bench").joinpath("report.html").read_text(encoding="utf-8")
    script = page.partition("<script>")[2].partition("</script>")[0]
    first = document["variants"][0]
    version = f"petool-lite {first['versions'].get('petool-lite', '')} {first['commit'] or ''}".strip()
    return Environment(autoescape=True).from_string(page).render(
        json=partial(json.dumps, ensure_ascii=False),
        hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        lines=[*heading(document), version],
        tables=list(tables(document)),
        chart=_chart(document["variants"]),
        entries=_entries(scored),
        classes=CLASSES,
    )  # fmt: skip


def _entries(scored: Sequence[Results]) -> list[list[tuple[str, dict[str, Any], str]]]:
    """For every entry the replies to it: variant, row and class of each."""
    found: dict[tuple[str, str], list[tuple[str, dict[str, Any], str]]] = {}
    for item in scored:
        for row, _, kind in item.triples.values():
            found.setdefault((row["setting"], row["entry_id"]), []).append((item.name, row, kind))
    return list(found.values())


def _chart(variants: Sequence[Mapping[str, Any]]) -> str:
    """The accuracies as inline SVG, the same text for the same variants; "" where matplotlib is not installed."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return ""
    style = {"svg.fonttype": "none", "svg.hashsalt": "petool-lite", "font.family": "sans-serif", "font.size": 10}
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK)
    with matplotlib.rc_context({**style, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(6.4, 1.6 + 0.38 * max(4, len(variants))), layout="constrained")
        _draw(figure.add_subplot(), variants)
        figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=9)
        file = io.StringIO()
        undated = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=undated)
    svg = file.getvalue()
    return svg[svg.index("<svg") :].replace(_INK, "currentColor")


def _draw(axes: Any, variants: Sequence[Mapping[str, Any]]) -> None:
    """A row a variant, the first on top, with a point and its interval for each metric."""
    for number, metric in enumerate(METRICS):
        values = [item[f"{metric}_acc"] for item in variants]
        lows, highs = zip(*(item[f"{metric}_ci"] for item in variants), strict=True)
        errors = [[abs(value - end) for value, end in zip(values, ends, strict=True)] for ends in (lows, highs)]
        places = [index + 0.24 * (number - 1) for index in range(len(variants))]
        name = f"{METRIC_WORDS[number]} right"
        axes.errorbar(values, places, xerr=errors, fmt="o", capsize=2, color=_COLOURS[number], label=name)
    axes.set_yticks(range(len(variants)), [label(item) for item in variants], parse_math=False)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("%")
