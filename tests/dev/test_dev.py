"""Studies: how results of many folds become a line, and that every script says how it is used."""

import runpy
import sys
from pathlib import Path

import folds
import pytest
from folds import Change, One, Study, collect, grouped_interval, write_split
from support_bench import answer, row, write_results

from petool_lite.data.files import load_dataset

SCRIPTS = sorted(Path(folds.__file__).parent.glob("*.py"))


def test_a_line_pools_the_runs_and_its_interval_draws_functions(tmp_path) -> None:
    study = Study(
        "demo:test:8", "smol-rating", tmp_path, (Change("as it is"),), 2, (0, 1), (0, 1), (), ("rating",), "", 1, 0.0,
        False,
    )  # fmt: skip
    groups = write_split(study)
    tested = [load_dataset(str(study.fold_file(fold, "test"))).entries for fold in (0, 1)]
    assert len(groups) == 8
    whole = load_dataset(study.data).entries
    assert sorted(entry.query for part in tested for entry in part) == sorted(entry.query for entry in whole)
    groups = {(fold, place): fold for fold, place in groups}  # a fold stands or falls as a whole
    for seed, fold in ((0, 0), (0, 1), (1, 0), (1, 1)):
        replies = [answer(entry) if (seed, fold) != (1, 1) else "{" for entry in tested[fold]]
        pairs = enumerate(zip(tested[fold], replies, strict=True))
        rows = [row(entry, index, reply, variant="tuned-bf16-gpu") for index, (entry, reply) in pairs]
        write_results(study.folder(One(study.changes[0], seed, fold)) / "bench-rating", rows)
    (line,) = collect(study, groups)
    assert (line["label"], line["setting"], line["runs"]) == ("as it is", "rating", 4)
    assert (line["n"], line["functions"]) == (16, 2)
    assert line["tool"] == line["joint"] == pytest.approx(100 * (16 - len(tested[1])) / 16)
    assert [item["joint"] for item in line["by_run"]] == [100, 100, 100, 0]
    assert line["tool_ci"] == [50, 100], "the second fold alone, or the first alone"


def test_an_interval_of_groups_is_wider_than_one_of_entries() -> None:
    alike = [(group, group % 4 > 0) for group in range(40) for _ in range(10)]
    alone = [(place, right) for place, (_, right) in enumerate(alike)]
    (low, high), (inner_low, inner_high) = grouped_interval(alike), grouped_interval(alone)
    assert low < inner_low < 75 < inner_high < high
    assert 2 < (high - low) / (inner_high - inner_low) < 4.5, "ten entries that stand together count as about one"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_says_how_it_is_used(script, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", [script.name, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    told = capsys.readouterr()
    assert "usage: " in f"{told.out}{told.err}{end.value.code}"
