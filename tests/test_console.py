"""What is printed is what was given: texts of users, data and models are no markup."""

import io
import subprocess
import sys

from rich.console import Console

from petool_lite import console


def test_texts_are_shown_as_they_are() -> None:
    odd = "demo:train:3 [red]x[/red] :cat:"
    code = f"""
from petool_lite.console import print_table, progress, say
print_table({odd!r}, [{odd!r}, ""], [[{odd!r}, "1"]], {odd!r})
say({odd!r})
with progress() as report:
    report({odd!r}, 0, 1, "")
    report({odd!r}, 1, 1, {odd!r})
    report({odd!r}, 0, 0, "")
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.count(odd) == 4
    assert found.stderr.count(odd) == 5


def test_a_bar_in_a_narrow_terminal_counts_in_full_and_the_note_gives_way(monkeypatch) -> None:
    screen = io.StringIO()
    narrow = Console(file=screen, force_terminal=True, width=80, markup=False, color_system=None)
    monkeypatch.setattr(console, "terminal", lambda stderr: narrow)
    with console.progress() as report:
        report("training", 55, 80, "loss 0.000, lr 3.5e-04, 162 tokens/s, peak 2.7 GB")
    line = [line for line in screen.getvalue().splitlines() if "training" in line][-1]
    assert ("55/80 " in line, "0:00:0" in line, line.rstrip()[-1]) == (True, True, "…")
