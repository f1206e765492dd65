"""report.html: one file with everything in it. It loads nothing, and replies can only ever be text in it."""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from typing import TYPE_CHECKING, Any

from petool_lite.bench.browse import browser_data
from petool_lite.bench.charts import classes_chart, cost_points, history_chart, scatter
from petool_lite.bench.errors import CLASSES
from petool_lite.bench.score import METRICS
from petool_lite.bench.tables import Table, letters, machine, tables

if TYPE_CHECKING:
    from petool_lite.bench.report import Scored

_METRIC_NAMES = {"joint": "both right", "tool": "tool", "param": "parameters"}


def html_report(document: Mapping[str, Any], scored: Sequence["Scored"]) -> str:
    """The report as one HTML page; a policy in it forbids loading anything and running any script but its own."""
    script, style = _asset("report.js"), _asset("report.css")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    body = "".join([_header(document), _legend(document), _sections(document), _rows_section(document)])
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>Bench report</title><style>{style}</style></head>\n<body><main>{body}</main>\n"
        f'<script type="application/json" id="data">{embedded(browser_data(scored))}</script>\n'
        f"<script>{script}</script></body></html>\n"
    )


def embedded(value: Any) -> str:
    """JSON that cannot end or open an element of the page it stands in."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _asset(name: str) -> str:
    return resources.files("petool_lite.bench").joinpath(name).read_text(encoding="utf-8").strip()


def _header(document: Mapping[str, Any]) -> str:
    lines = [
        f"<p class=lead><b>{escape(item['source'])}</b> · {escape(item['setting'])} setting · "
        f"{item['total']:,} entries · SHA-256 <code>{escape(item['sha256'][:16])}</code></p>"
        for item in document["data"]
    ]
    badge = '<span class="badge warn">partial: not all entries were scored</span>' if document["partial"] else ""
    first = document["variants"][0]
    version = f"petool-lite {first['versions'].get('petool-lite', '')} {first['commit'] or ''}".strip()
    return f"<header><h1>Bench report {badge}</h1>{''.join(lines)}<p class=dim>{escape(version)}</p></header>"


def _legend(document: Mapping[str, Any]) -> str:
    """The variants with their letters: the key to every chart."""
    items = [
        f"<li>{_chip(index, letter)}<span><b>{escape(item['name'])}</b>"
        f"<small>{escape(_about(item))}</small></span></li>"
        for index, (letter, item) in enumerate(
            zip(letters(len(document["variants"])), document["variants"], strict=True)
        )
    ]
    return f"<ul class=legend>{''.join(items)}</ul>"


def _about(variant: Mapping[str, Any]) -> str:
    if variant["engine"] == "none":
        return "baseline without a model"
    return f"{machine(variant)}, {variant['decoding']}, {variant['style']} prompt"


def _chip(index: int, letter: str) -> str:
    return f'<span class="chip s{index % 8}">{letter}</span>'


def _sections(document: Mapping[str, Any]) -> str:
    found = {table.key: table for table in tables(document)}
    head = _table(found.pop("scores"), document)
    rest = [_table(table, document) for table in found.values()]
    return head + _charts(document["variants"]) + "".join(rest)


def _charts(variants: Sequence[Mapping[str, Any]]) -> str:
    radios = "".join(
        f'<input type=radio name=metric id="m-{metric}"{" checked" if metric == "joint" else ""}>'
        f'<label for="m-{metric}">{name}</label>'
        for metric, name in _METRIC_NAMES.items()
    )
    cards = []
    for title, name, text, value in (
        ("Accuracy and size", "file size, MB (logarithmic)", lambda tick: f"{tick:,.4g}", _megabytes),
        ("Accuracy and speed", "median seconds a call (logarithmic)", lambda tick: f"{tick:,.4g}", _seconds),
    ):
        drawn = {metric: scatter(*cost_points(variants, metric, value), metric, name, text) for metric in METRICS}
        cards.append(_card(title, drawn, "Whiskers: 95 % intervals. Dashed lines: variants without that cost."))
    lengths = {metric: history_chart(variants, metric) for metric in METRICS}
    cards.append(_card("Accuracy and length of the history", lengths, "Whiskers: 95 % intervals."))
    keys = "".join(
        f'<li><i class="bar c-{name}"></i>{name.replace("_", " ")}</li>'
        for name in CLASSES
        if any(item["classes"][name] for item in variants)
    )
    bars = f"<figure class=card><figcaption>What went wrong</figcaption>{classes_chart(variants)}"
    bars += f"<ul class=key>{keys}</ul></figure>"
    return (
        f"<section class=metrics><h2>Charts</h2><div class=switch role=radiogroup aria-label=metric>{radios}</div>"
        f"<div class=charts>{''.join(cards)}{bars}</div></section>"
    )


def _card(title: str, drawn: Mapping[str, str], note: str) -> str:
    shown = "".join(f'<div class="m-{metric}">{svg}</div>' for metric, svg in drawn.items())
    return f"<figure class=card><figcaption>{title}</figcaption>{shown}<p class=note>{note}</p></figure>"


def _megabytes(variant: Mapping[str, Any]) -> float | None:
    size = variant["cost"]["model_bytes"]
    return size / 1e6 if size else None


def _seconds(variant: Mapping[str, Any]) -> float | None:
    found = variant["cost"]
    return found["warm"]["median_s"] or found["cold"]["median_s"] or None


def _table(table: Table, document: Mapping[str, Any]) -> str:
    variants = document["variants"]
    names = dict(zip(letters(len(variants)), (item["name"] for item in variants), strict=True))
    codes = list(names)

    def cell(text: str, index: int, tag: str) -> str:
        """One cell; a variant's letter becomes its chip, with the name in a first column."""
        kind = "" if index < table.texts else " class=num"
        parts = text.split(" → ")
        if tag == "td" and index < table.texts and all(part in names for part in parts):
            inner = " → ".join(
                f"{_chip(codes.index(part), part)}<span class=wide>{escape(names[part])}</span>" for part in parts
            )
        elif tag == "th" and index >= table.texts and text in names:
            inner = f'<span title="{escape(names[text])}">{_chip(codes.index(text), text)}</span>'
        elif text.partition(" ")[0] in names and text.startswith(tuple(f"{code} {names[code]}" for code in codes)):
            code, _, rest = text.partition(" ")
            inner = f"{_chip(codes.index(code), code)}<span class=wide>{escape(rest)}</span>"
        else:
            inner = escape(text)
        return f"<{tag}{kind}>{inner}</{tag}>"

    head = "".join(cell(text, index, "th") for index, text in enumerate(table.columns))
    rows = "".join(
        f"<tr>{''.join(cell(text, index, 'td') for index, text in enumerate(row))}</tr>" for row in table.rows
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in table.notes)
    body = (
        f"<div class=scroll tabindex=0><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
        f"{f'<ul class=notes>{notes}</ul>' if notes else ''}"
    )
    if table.key.endswith("_classes"):  # long, and for those who ask why
        return f'<details id="{table.key}"><summary>{escape(table.title)}</summary>{body}</details>'
    return f'<section id="{table.key}"><h2>{escape(table.title)}</h2>{body}</section>'


def _rows_section(document: Mapping[str, Any]) -> str:
    return (
        "<section id=replies><h2>Single replies</h2>"
        "<noscript><p>Reading single replies needs JavaScript.</p></noscript>"
        "<div id=filters hidden><label>Variant <select id=f-variant></select></label>"
        "<label>Class <select id=f-class></select></label>"
        '<label class=grow>Search <input id=f-text type=search placeholder="entry, tool or text of the reply"></label>'
        "<label class=check><input id=f-differ type=checkbox> only entries where variants differ</label></div>"
        "<div class=scroll><table id=browse></table></div><div id=pager></div></section>"
    )
