"""The report in a terminal: tables where they fit, one block a row where they do not."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from petool_lite.bench.tables import Table, comparison_table, flipped_table, tables
from rich.console import Console
from rich.table import Table as Drawn
from rich.text import Text

from petool_lite.console import stdout

_SHOWN = ("scores", "cost", "pairs", "classes", "settings", "published")
_PAIRS, _FLIPS = 6, 12  # more are in the files, or in the --json document


def print_report(document: Mapping[str, Any], console: Console = stdout) -> None:
    """Scores, cost, paired tests and error classes; the rest is in the written forms."""
    for item in document["data"]:
        title = f"{item['source']}, {item['setting']} setting"
        console.print(Text(title, style="bold"), soft_wrap=True)
    if document["partial"]:
        console.print(Text("PARTIAL: not all entries were scored", style="bold yellow"))
    for table in tables(document):
        if table.key in _SHOWN:
            print_table(table, console)


def print_table(table: Table, console: Console = stdout) -> None:
    """One table with its notes, as wide as it needs to be or as blocks."""
    if table.key in ("classes", "faults"):  # the names say enough here
        table = replace(table, columns=(table.columns[0], *table.columns[2:]), texts=1,
                        rows=tuple((row[0], *row[2:]) for row in table.rows))  # fmt: skip
    rows = table.rows[:_PAIRS] if table.key == "pairs" else table.rows
    console.print()
    console.print(Text(table.title, style="bold underline"))
    for space in (2, 1):
        grid = Drawn(box=None, pad_edge=False, header_style="bold", padding=(0, space, 0, 0))
        for index, column in enumerate(table.columns):
            grid.add_column(column, justify="left" if index < table.texts else "right", no_wrap=True)
        for row in rows:
            grid.add_row(*map(Text, row))
        wide = console.measure(grid, options=console.options.update(width=10_000)).maximum
        if wide <= console.width:
            console.print(grid)
            break
    else:
        _print_blocks(table, rows, console)
    hidden = len(table.rows) - len(rows)
    more = [f"{hidden} more pairs are in report.md"] if hidden > 0 else []
    for note in [*table.notes, *more]:
        console.print(Text(note, style="dim"))


def _print_blocks(table: Table, rows: tuple[tuple[str, ...], ...], console: Console) -> None:
    """A row as a title and one line a figure: readable at any width."""
    width = max(len(column) for column in table.columns[1:])
    for row in rows:
        console.print(Text(row[0], style="bold"))
        for column, cell in zip(table.columns[1:], row[1:], strict=True):
            if cell and cell != "–":
                console.print(Text(f"  {column:<{width}}  {cell}"))


def print_comparison(found: Mapping[str, Any], console: Console = stdout) -> None:
    """What `bench compare` found."""
    console.print(Text(f"{found['first']} → {found['second']}", style="bold"), soft_wrap=True)
    for item in found["variants"]:
        print_table(comparison_table(item), console)
        if item["flipped"]:
            print_table(flipped_table(item, _FLIPS), console)
