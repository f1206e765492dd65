"""What is printed is what was given: texts of users, data and models are no markup."""

import json
import subprocess
import sys


def test_texts_are_shown_as_they_are() -> None:
    odd = "demo:train:3 [red]x[/red] :cat:"
    code = f"""
from petool_lite.console import print_columns, print_table, progress, say
print_table({odd!r}, [{odd!r}, ""], [[{odd!r}, "1"]], {odd!r})
print_columns({{{odd!r}: {odd!r}}})
say({odd!r})
with progress() as report:
    report({odd!r}, 0, 1, "")
    report({odd!r}, 1, 1, {odd!r})
    report({odd!r}, 0, 0, "")
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.count(odd) == 6
    assert found.stderr.count(odd) == 5


def test_bars_show_texts_as_they_are(monkeypatch) -> None:
    import io

    from rich.console import Console

    from petool_lite import console

    screen = io.StringIO()
    monkeypatch.setattr(console, "stderr", Console(file=screen, force_terminal=True, width=200, markup=False))
    with console.progress() as report:
        report("read [x] :cat:", 1, 1, "note [y] :cat:")
    assert "read [x] :cat:" in screen.getvalue()
    assert "note [y] :cat:" in screen.getvalue()


def test_a_narrow_terminal_shows_counts_and_times_in_full(monkeypatch) -> None:
    import io

    from rich.console import Console

    from petool_lite import console

    screen = io.StringIO()
    narrow = Console(file=screen, force_terminal=True, width=80, markup=False, color_system=None)
    monkeypatch.setattr(console, "stderr", narrow)
    with console.progress() as report:
        report("checking that replies stop and agree", 20, 20, "")
        report("training", 55, 80, "loss 0.000, lr 3.5e-04, 162 tokens/s, peak 2.7 GB")
    line = [line for line in screen.getvalue().splitlines() if "training" in line][-1]
    assert "55/80 " in line
    assert "0:00:0" in line
    assert " loss" in line
    assert line.rstrip().endswith("…"), "the note gives way"


def test_a_line_of_talk_is_one_line_however_long() -> None:
    found = subprocess.run(
        [sys.executable, "-c", "from petool_lite.console import say; say('word ' * 60)"], capture_output=True, text=True
    )
    assert len(found.stderr.splitlines()) == 1


def test_a_table_without_a_head_has_no_empty_one() -> None:
    code = "from petool_lite.console import print_table; print_table('', ['', ''], [['rows', '3']])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(found.stdout.splitlines()) == 3


def test_the_settings_are_listed_with_their_own_names(command) -> None:
    assert "demo:train:320" in command("recipes", "keys").stdout
    assert json.loads(command("recipes", "keys", "--json").stdout)["data.train"]["default"] == "demo:train:320"


def test_facts_are_in_words() -> None:
    from petool_lite.console import plain

    facts = {"loss_tokens": 98962, "gpu": None, "amx": True, "of": {"p95": 1212, "share": 79.3}}
    assert plain(facts) == "loss tokens 98,962, gpu none, amx yes, of p95 1,212, share 79.3"
