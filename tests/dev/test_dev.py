"""Studies: how results of many folds become a line, and that every script says how it is used."""

import runpy
import sys
from pathlib import Path

import folds
import pytest
from folds import One, Study, collect
from support_bench import answer, row, write_results

from petool_lite.data.files import load_dataset, write_folds

SCRIPTS = sorted(Path(folds.__file__).parent.glob("*.py"))


@pytest.fixture
def study(tmp_path) -> Study:
    return Study(data="demo:test:8", out=tmp_path, scored=("rating",))


def test_a_line_pools_the_runs_and_its_interval_is_by_function(study) -> None:
    runs = [One("as it is", (), seed, fold) for seed in (0, 1) for fold in (0, 1)]
    write_folds(study.data, "rating", 2, 0, study.out / "folds")
    tested = [load_dataset(f"{study.out}/folds/fold{fold}-test.jsonl").entries for fold in (0, 1)]
    whole = load_dataset(study.data).entries
    assert sorted(entry.query for part in tested for entry in part) == sorted(entry.query for entry in whole)
    for one in runs:
        replies = [answer(entry) if (one.seed, one.fold) != (1, 1) else "{" for entry in tested[one.fold]]
        pairs = enumerate(zip(tested[one.fold], replies, strict=True))
        rows = [row(entry, index, reply, variant="tuned-bf16-gpu") for index, (entry, reply) in pairs]
        write_results(study.out / one.folder / "bench-rating", rows)
    (line,) = collect(study, runs)
    assert (line["label"], line["setting"], line["runs"]) == ("as it is", "rating", 4)
    assert (line["n"], line["functions"]) == (16, 8)
    assert line["tool_acc"] == line["joint_acc"] == pytest.approx(100 * (16 - len(tested[1])) / 16)
    assert [item["joint_acc"] for item in line["by_run"]] == [100, 100, 100, 0]
    assert line["tool_ci"][0] < line["tool_acc"] < line["tool_ci"][1]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_says_how_it_is_used(script, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", [script.name, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    told = capsys.readouterr()
    assert "usage: " in f"{told.out}{told.err}{end.value.code}"
