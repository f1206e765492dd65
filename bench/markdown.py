"""report.md: the report's tables in Markdown."""

from collections.abc import Mapping
from typing import Any

from petool_lite.bench.tables import Table, tables


def markdown_report(document: Mapping[str, Any]) -> str:
    """The whole report document as Markdown."""
    parts = ["# Bench report", *heading(document), *(_table(table) for table in tables(document))]
    return "\n\n".join(parts) + "\n"


def heading(document: Mapping[str, Any]) -> list[str]:
    """What was scored on what, a line a setting, and whether it is all of it."""
    lines = [
        f"{item['setting']} setting, {_text(item['source'])}, {item['total']:,} entries, "
        f"SHA-256 `{_text(item['sha256'][:16])}`"
        for item in document["data"]
    ]
    return [*lines, "**PARTIAL: not all entries were scored.**"] if document["partial"] else lines


def _text(value: str) -> str:
    """Text that Markdown shows as it stands."""
    escaped = "".join(f"\\{char}" if char in "\\`*_[]<>|#~&" else char for char in value)
    return " ".join(escaped.split())


def _table(table: Table) -> str:
    marks = ["---" if index < table.texts else "---:" for index in range(len(table.columns))]
    lines = [f"| {' | '.join(map(_text, row))} |" for row in (table.columns, *table.rows)]
    lines.insert(1, f"| {' | '.join(marks)} |")
    notes = [f"- {_text(note)}" for note in table.notes]
    return "\n".join([f"## {table.title}", "", *lines, *(["", *notes] if notes else [])])
