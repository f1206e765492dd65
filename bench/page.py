"""report.html: one file with everything in it. It loads nothing, and replies can only ever be text in it."""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import resources
from typing import Any

from petool_lite.bench.report import METRIC_WORDS, heading, tables
from petool_lite.bench.results import Results
from petool_lite.bench.score import CLASSES, METRICS


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
        variants=document["variants"],
        metrics=dict(zip(METRICS, METRIC_WORDS, strict=True)),
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
