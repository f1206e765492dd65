"""Studies: every script says how it is used."""

import runpy
import sys
from pathlib import Path

import folds
import pytest


@pytest.mark.parametrize("script", sorted(Path(folds.__file__).parent.glob("*.py")), ids=lambda path: path.name)
def test_every_script_says_how_it_is_used(script, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", [script.name, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    told = capsys.readouterr()
    assert "usage: " in f"{told.out}{told.err}{end.value.code}"
