"""Accuracy by folds: what each run is told, how results of many runs become a line, and one real study."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import folds
import pytest
from folds import Change, One, Study, collect, grouped_interval, keep_study, parse_change, train_and_bench, write_split
from support import own_runs
from support_bench import answer, row, write_results

from petool_lite.console import silent
from petool_lite.data.files import load_dataset
from petool_lite.errors import PetoolError

FOLDS = Path(folds.__file__)


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(
        "demo:test:8", "smol-rating", tmp_path, (Change("as it is"), Change("r 16", ("lora.r=16",))), 2, (0, 1), (0, 1),
        ("model.adapter=runs/{seed}-{fold}",), ("rating",), "", 1, 0.0, False,
    )  # fmt: skip


def test_a_run_is_told_its_fold_and_seed_and_the_change_decides(study: Study) -> None:
    told = dict(item.split("=", 1) for item in study.settings_of(One(study.changes[1], 1, 0)))
    assert told["data.train"] == str(study.out / "folds" / "fold0-train.jsonl")
    assert (told["train.seed"], told["model.adapter"], told["lora.r"]) == ("1", "runs/1-0", "16")
    for text in ("lora.r=16", "r 16:", "r 16: lora.r"):
        with pytest.raises(PetoolError, match="expected LABEL: KEY=VALUE"):
            parse_change(text)


def test_a_line_pools_the_runs_and_its_interval_draws_functions(study: Study) -> None:
    groups = write_split(study)
    tested = [load_dataset(str(study.fold_file(fold, "test"))).entries for fold in (0, 1)]
    assert len(groups) == 8
    assert sorted(entry.query for part in tested for entry in part) == sorted(
        entry.query for entry in load_dataset(study.data).entries
    )
    groups = {(fold, place): fold for fold, place in groups}  # a fold stands or falls as a whole
    for seed in (0, 1):
        for fold in (0, 1):
            rows = []
            for index, entry in enumerate(tested[fold]):
                reply = answer(entry) if (seed, fold) != (1, 1) else "{"
                rows.append(row(entry, index, reply, variant="tuned-bf16-gpu"))
            write_results(study.folder(One(study.changes[0], seed, fold)) / "bench-rating", rows)
    (line,) = collect(study, groups)
    assert (line["label"], line["setting"], line["runs"], line["n"], line["functions"]) == (
        "as it is",
        "rating",
        4,
        16,
        2,
    )
    assert line["tool"] == line["joint"] == pytest.approx(100 * (16 - len(tested[1])) / 16)
    assert [item["joint"] for item in line["by_run"]] == [100, 100, 100, 0]
    assert line["tool_ci"] == [50, 100], "the second fold alone, or the first alone"


def test_an_interval_of_groups_is_wider_than_one_of_entries() -> None:
    alike = [(group, group % 4 > 0) for group in range(40) for _ in range(10)]
    alone = [(place, right) for place, (_, right) in enumerate(alike)]
    (low, high), (inner_low, inner_high) = grouped_interval(alike), grouped_interval(alone)
    assert low < inner_low < 75 < inner_high < high
    assert 2 < (high - low) / (inner_high - inner_low) < 4.5, "ten entries that stand together count as about one"
    assert grouped_interval([]) == (0, 100)


def made(study: Study, change: int = 0) -> Path:
    """A finished run of the study, as later commands find it."""
    run = study.folder(One(study.changes[change], 0, 0)) / "run" / "smol-rating-1"
    run.mkdir(parents=True)
    (run / "manifest.json").write_text("{}")
    return run


def test_a_study_takes_more_changes_seeds_folds_and_prompts(study: Study) -> None:
    keep_study(study)
    made(study), made(study, 1)
    more = replace(study, changes=(Change("r 8", ("lora.r=8",)),), only=(1,), seeds=(2,), scored=("preferred",))
    keep_study(replace(more, export="q8_0", jobs=3, until=9.0))
    keep_study(study)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"folds": 3}, "folds was 2, is 3"),
        ({"data": "demo:test:9"}, "sha256 of DATA was "),
        ({"settings": ("lora.r=8",)}, "model.adapter was runs/{seed}-{fold}, is ; lora.r was 64, is 8"),
        ({"changes": (Change("r-16", ("lora.r=8",)),)}, "r-16 was ['lora.r=16'], is ['lora.r=8']"),
    ],
)
def test_runs_of_another_study_are_not_taken_for_this_one(study: Study, other: dict[str, Any], told: str) -> None:
    keep_study(study)
    keep_study(replace(study, **other)), keep_study(study)  # nothing lies there yet
    made(study)
    with pytest.raises(PetoolError) as raised:
        keep_study(replace(study, **other))
    assert told in raised.value.message
    (study.out / "study.json").unlink()
    with pytest.raises(PetoolError, match=r"no study\.json"):
        keep_study(study)


def stand_in(study: Study, monkeypatch: pytest.MonkeyPatch, does: str) -> Path:
    """Where the command lines are written of a Python that only `does` something."""
    python, lines = study.out / "python", study.out / "lines"
    python.write_text(f'#!/bin/sh\necho "$@" >> {lines}\n{does}\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    return lines


@pytest.mark.parametrize(
    ("does", "told"),
    [("kill -9 $$", "was ended by SIGKILL, see "), ("exit 3", "failed, see "), ("exec sleep 60", "ran out of time\n")],
)
def test_how_a_training_ended_is_told(study: Study, monkeypatch: Any, capsys: Any, does: str, told: str) -> None:
    stand_in(study, monkeypatch, does)
    left = 1 if "sleep" in does else 60
    assert not train_and_bench(replace(study, until=time.time() + left), One(study.changes[0], 0, 0))
    said = capsys.readouterr().err
    assert said.startswith("as-it-is-seed0-fold0: train ")
    assert told in said


def test_a_stopped_training_goes_on_or_fails_but_does_not_start_anew(study: Study, monkeypatch: Any) -> None:
    lines, one = stand_in(study, monkeypatch, "exit 1"), One(study.changes[0], 0, 0)
    assert not train_and_bench(replace(study, until=1.0), one), "out of time"
    study = replace(study, until=time.time() + 60)
    run = study.folder(one) / "run" / "smol-rating-1"
    run.mkdir(parents=True)
    assert not train_and_bench(study, one)
    assert " train smol-rating --set " in lines.read_text(), "without a checkpoint there is nothing to go on from"
    (run / "checkpoints" / "checkpoint-5").mkdir(parents=True)
    (run / "checkpoints" / "checkpoint-5" / "trainer_state.json").write_text("{}")
    lines.unlink()
    assert not train_and_bench(study, one)
    assert lines.read_text() == f"-m petool_lite train --resume {run}\n"


def test_a_study_is_no_client_of_the_service_that_it_ends_and_does_not_wait_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """CUDA's multi-process service waits for its clients; one that never ends would have the whole study wait."""
    heard, program = tmp_path / "heard", tmp_path / "nvidia-cuda-mps-control"
    program.write_text(
        f'#!/bin/sh\n[ "$1" = -d ] && {{ echo start >> {heard}; exit; }}\ncat >> {heard}; exec sleep 30\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
    monkeypatch.setattr(folds, "_TO_QUIT", 0.5)

    def asked() -> bool:
        assert "CUDA_MPS_PIPE_DIRECTORY" not in os.environ
        return True

    monkeypatch.setattr(folds, "gpu_available", asked)
    found = folds.study_of(["demo:test:8", "--jobs", "2", "--seconds", "0", "--out", str(tmp_path)])
    begun = time.monotonic()
    assert folds.run_all(found, silent) == 0, "out of time"
    assert time.monotonic() - begun < 5
    assert heard.read_text() == "start\nquit\n"
    assert "did not end in" in capsys.readouterr().err
    assert "CUDA_MPS_PIPE_DIRECTORY" not in os.environ


@pytest.mark.slow
def test_one_real_study_and_what_is_done_is_kept(tiny: Path, tmp_path: Path) -> None:
    line = [sys.executable, str(FOLDS), "demo:test:12", "--recipe", "demo", "--folds", "2", "--jobs", "2"]
    line += ["--set", f"model.base={tiny}", "--set", "train.max_steps=2", "--out", str(tmp_path / "out")]
    first = subprocess.run(line, cwd=tmp_path, env=own_runs(tmp_path), capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    document = json.loads(first.stdout)
    assert {item["variant"]: item["n"] for item in document["lines"]} == {"rule-words": 12, "tuned-q4_k_m": 12}
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/run/*/manifest.json")}
    assert len(made) == 2
    again = subprocess.run(line, cwd=tmp_path, env=own_runs(tmp_path), capture_output=True, text=True)
    assert json.loads(again.stdout)["lines"] == document["lines"]
    assert {path: path.stat().st_mtime_ns for path in made} == made
