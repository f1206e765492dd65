"""All talking to the terminal: talk on stderr, data on stdout. Other modules call a Report and know no terminal."""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import cycle
from time import monotonic
from typing import TYPE_CHECKING, Any

from petool_lite.errors import PetoolError

if TYPE_CHECKING:
    from rich.console import Console

_LOG_SECONDS = 60  # between two lines of a stage where stderr is a file

# (stage, done, total, note): a total of 0 is a message without a bar
Report = Callable[[str, int, int, str], None]


@lru_cache
def terminal(stderr: bool = False) -> "Console":
    """Where what needs more than plain lines is drawn. rich is imported then: it takes as long as a short call."""
    from rich.console import Console

    # Texts are shown as they are: without this a source such as demo:train:320 would get a picture of a tram
    return Console(stderr=stderr, highlight=False, emoji=False, markup=False)


def silent(stage: str, done: int, total: int, note: str) -> None:
    """A Report that says nothing."""


def say(text: str) -> None:
    """One line of talk, whatever its length: an address or a path that is broken in two is of no use."""
    print(text, file=sys.stderr, flush=True)


def say_at_once(text: str) -> None:
    """One line of talk from a signal handler, past buffers it may have interrupted; a terminal gets its cursor back."""
    cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
    os.write(2, f"\n{cursor}{text}\n".encode())


def fail(error: PetoolError) -> None:
    """One red line and a hint."""
    stderr = terminal(stderr=True)
    stderr.print(f"error: {error.message}", style="red", soft_wrap=True)
    if error.hint:
        stderr.print(f"hint: {error.hint}", style="dim", soft_wrap=True)


def print_json(document: Any) -> None:
    """One JSON document on one line of stdout."""
    print(json.dumps(document, ensure_ascii=False), flush=True)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> None:
    """A table on stdout; columns of numbers are right-aligned, a head without any name is left out."""
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=any(columns))
    for index, column in enumerate(columns):
        numbers = bool(rows) and all(row[index][:1] in "0123456789+-–<" for row in rows)
        table.add_column(column, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    for part in (Text(title, style="bold"), table, Text(caption, style="dim")):
        if str(part):
            terminal().print(part, soft_wrap=not isinstance(part, Table))


def plain(value: Any) -> str:
    """A value in words: counts with separators, yes, no and none, the items of a dictionary after their names."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key.replace('_', ' ')} {plain(item)}" for key, item in value.items())
    if value is None or isinstance(value, bool):
        return {True: "yes", False: "no", None: "none"}[value]
    return f"{value:,}" if isinstance(value, int) else str(value)


def emit(document: Any, as_json: bool, title: str = "", lines: Iterable[Any] | None = None) -> None:
    """What a verb found, on stdout: one JSON document, or for people `lines`, else a table of facts or of rows."""
    if as_json:
        print_json(document)
    elif lines is not None:
        print(*lines, sep="\n", flush=True)
    elif isinstance(document, Mapping):
        print_table(title, ["", ""], [[key.replace("_", " "), plain(value)] for key, value in document.items()])
    else:
        columns = [key.replace("_", " ") for key in (document[0] if document else ())]
        print_table(title, columns, [[plain(value) for value in row.values()] for row in document])


def print_loss_mask(row: Mapping[str, Any]) -> None:
    """A training row: what is read plain, each token with loss on green, in two shades to show their borders."""
    from rich.text import Text

    shades = cycle(("black on bright_green", "black on green"))
    pieces = ((piece["text"], next(shades) if piece["learned"] else "dim") for piece in row["pieces"])
    terminal().print(Text.assemble(*pieces), soft_wrap=True)
    dropped = f", {row['history_dropped']} earlier calls left out" if row["history_dropped"] else ""
    say(f"entry {row['entry_id']}: {row['tokens']:,} tokens, {row['loss_tokens']} with loss{dropped}")


@contextmanager
def progress() -> Iterator[Report]:
    """Yield a Report that draws one bar with the time left for each stage, on stderr."""
    from rich import progress as rich
    from rich.table import Column
    from rich.text import Text

    class Note(rich.ProgressColumn):
        """What a stage says of itself, on one line that ends in an ellipsis where there is no room."""

        def render(self, task: rich.Task) -> Text:
            return Text(task.fields["note"], style="dim", no_wrap=True, overflow="ellipsis")

    stderr = terminal(stderr=True)
    fixed = partial(Column, no_wrap=True)  # in a narrow terminal the bar gives way first, then the note
    bars = rich.Progress(
        rich.TextColumn("{task.description}", markup=False),
        rich.BarColumn(bar_width=20, table_column=Column(min_width=6)),
        rich.MofNCompleteColumn(table_column=fixed()),
        rich.TimeElapsedColumn(table_column=fixed()),
        rich.TextColumn("left"),
        rich.TimeRemainingColumn(table_column=fixed()),
        Note(table_column=Column()),
        console=stderr,
        disable=not stderr.is_terminal,
        speed_estimate_period=900,  # an optimizer step on a GPU takes many seconds: the default forgets it too soon
    )
    tasks: dict[str, rich.TaskID] = {}
    told: dict[str, float] = {}

    def report(stage: str, done: int, total: int, note: str) -> None:
        if total == 0:
            bars.console.print(stage, style="dim", soft_wrap=True)
            return
        lines = list[str]()
        if stage not in tasks:
            tasks[stage], told[stage] = bars.add_task(stage, total=total, note=note), monotonic()
            lines += [f"{total} to do" if done <= 1 else f"{done} of {total}"] * (done < total)
        bars.update(tasks[stage], completed=done, total=total, note=note)
        if done == total:
            lines.append(f"done {note}")
        elif monotonic() - told[stage] > _LOG_SECONDS:
            told[stage], left = monotonic(), bars.tasks[tasks[stage]].time_remaining
            lines.append(f"{done} of {total}, {'' if left is None else f'{left / 60:.0f} min left, '}{note}")
        for line in () if stderr.is_terminal else lines:
            stderr.print(f"{stage}: {line}", soft_wrap=True)

    with bars:
        yield report
