"""Accuracy by folds: what each run is told, how results of many runs become a line, and one real study."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from folds import (
    beside_the_gpu,
    collect,
    grouped_interval,
    main,
    run_all,
    shared_gpu,
    study_of,
    train_and_bench,
    write_split,
)
from petool_lite.bench import folds
from study import Change, One, Study, keep_study, parse_change, settings_of
from support import own_runs
from support_bench import row, write_results

from petool_lite.console import silent
from petool_lite.data.files import load_dataset
from petool_lite.errors import PetoolError


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(
        "demo:test:8", "smol-rating", tmp_path, (Change("as it is"), Change("r 16", ("lora.r=16",))), 2, (0, 1), (0, 1),
        ("model.adapter=runs/{seed}-{fold}",), ("rating",), "", 1, 0.0, False,
    )  # fmt: skip


def test_a_run_is_told_its_fold_and_seed_and_the_change_decides(study: Study) -> None:
    told = dict(item.split("=", 1) for item in settings_of(study, One(study.changes[1], 1, 0)))
    assert told["data.train"] == str(study.out / "folds" / "fold0-train.jsonl")
    assert (told["train.seed"], told["model.adapter"], told["lora.r"]) == ("1", "runs/1-0", "16")


def test_every_entry_is_tested_in_one_fold(study: Study) -> None:
    groups = write_split(study)
    entries = load_dataset(study.data, "rating").entries
    files = [study.out / "folds" / f"fold{fold}-test.jsonl" for fold in (0, 1)]
    tested = [json.loads(line)["entry_id"] for file in files for line in file.read_text().splitlines()]
    assert sorted(map(str, tested)) == sorted(entry.id for entry in entries)
    assert len(groups) == len(entries)


def test_a_line_pools_the_runs_and_its_interval_draws_functions(study: Study) -> None:
    write_split(study)
    groups = {}
    for seed in (0, 1):
        for fold in (0, 1):
            dataset = load_dataset(str(study.out / "folds" / f"fold{fold}-test.jsonl"), "rating")
            rows = []
            for index, entry in enumerate(dataset.entries):
                right = entry.gold.to_json() if (seed, fold) != (1, 1) else "{}"
                rows.append(row(entry, index, right, variant="tuned-bf16-gpu-constrained", decoding="constrained"))
                groups[entry.id] = fold  # a fold stands or falls as a whole
            write_results(One(study.changes[0], seed, fold).folder(study) / "bench-rating", rows)
    (line,) = collect(study, groups)
    assert (line["label"], line["setting"], line["runs"], line["n"], line["functions"]) == (
        "as it is",
        "rating",
        4,
        16,
        2,
    )
    tested = [item["n"] for item in line["by_run"] if item["seed"] == 1]
    assert line["tool"] == line["joint"] == pytest.approx(100 * (16 - tested[1]) / 16)
    assert [item["joint"] for item in line["by_run"]] == [100, 100, 100, 0]
    assert line["tool_ci"] == [50, 100], "the second fold alone, or the first alone"


def test_a_gguf_file_is_compared_entry_by_entry_and_seed_by_seed(study: Study) -> None:
    write_split(study)
    one = One(study.changes[0], 1, 0)
    dataset = load_dataset(str(study.out / "folds" / "fold0-test.jsonl"), "rating")
    for name, wrong in (("tuned-bf16-gpu", 1), ("tuned-q4_k_m", 2)):
        replies = [entry.gold.to_json() if index >= wrong else "{}" for index, entry in enumerate(dataset.entries)]
        rows = [
            row(entry, index, reply, variant=f"{name}-constrained", decoding="constrained")
            for index, (entry, reply) in enumerate(zip(dataset.entries, replies, strict=True))
        ]
        write_results(one.folder(study) / "bench-rating", rows)
    (pair,) = beside_the_gpu(study, "tuned-q4_k_m")
    assert (pair["n"], pair["joint"]["first_only"], pair["joint"]["second_only"]) == (len(dataset.entries), 1, 0)


def test_an_interval_of_groups_is_wider_than_one_of_entries() -> None:
    alike = [(group, group % 4 > 0) for group in range(40) for _ in range(10)]
    alone = [(place, right) for place, (_, right) in enumerate(alike)]
    (low, high), (inner_low, inner_high) = grouped_interval(alike), grouped_interval(alone)
    assert low < inner_low < 75 < inner_high < high
    assert 2 < (high - low) / (inner_high - inner_low) < 4.5, "ten entries that stand together count as about one"
    assert grouped_interval([]) == (0, 100)


@pytest.mark.parametrize("text", ["lora.r=16", "r 16:", "r 16: lora.r"])
def test_a_change_without_label_or_value_is_refused(text: str) -> None:
    with pytest.raises(PetoolError, match="expected LABEL: KEY=VALUE"):
        parse_change(text)


def made(study: Study, change: int = 0) -> Path:
    """A finished run of the study, as later commands find it."""
    run = One(study.changes[change], 0, 0).folder(study) / "run" / "smol-rating-1"
    run.mkdir(parents=True)
    (run / "manifest.json").write_text("{}")
    return run


def test_a_study_takes_more_changes_seeds_folds_and_prompts(study: Study) -> None:
    keep_study(study)
    made(study), made(study, 1)
    more = replace(study, changes=(Change("r 8", ("lora.r=8",)),), only=(1,), seeds=(2,), scored=("preferred",))
    keep_study(replace(more, export="q8_0", jobs=3, until=9.0))
    keep_study(study)
    kept = json.loads((study.out / "study.json").read_text())
    assert kept["changes"] == {"as it is": [], "r 16": ["lora.r=16"]}, "nothing was made of r 8"
    assert (kept["shared"]["folds"], kept["shared"]["model.adapter"]) == (2, "runs/{seed}-{fold}")


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"folds": 3}, "folds was 2, is 3"),
        ({"data": "demo:test:9"}, "sha256 of DATA was "),
        ({"settings": ("lora.r=8",)}, "model.adapter was runs/{seed}-{fold}, is ; lora.r was 64, is 8"),
        ({"recipe": "smol-preferred"}, "data.setting was rating, is preferred"),
    ],
)
def test_runs_of_another_study_are_not_taken_for_this_one(study: Study, other: dict[str, Any], told: str) -> None:
    keep_study(study)
    keep_study(replace(study, **other)), keep_study(study)  # nothing lies there yet
    made(study)
    with pytest.raises(PetoolError) as raised:
        keep_study(replace(study, **other))
    assert told in raised.value.message
    assert "\n" not in raised.value.message
    assert raised.value.hint == "choose another --out"
    assert json.loads((study.out / "study.json").read_text())["shared"]["folds"] == 2


def test_runs_that_no_study_tells_of_are_refused(study: Study) -> None:
    made(study)
    with pytest.raises(PetoolError, match=r"no study\.json"):
        keep_study(study)


def test_two_changes_do_not_share_a_folder(study: Study) -> None:
    with pytest.raises(PetoolError, match=r'"r 16" \(lora.r=16\) and "r-16" \(lora.r=16\)'):
        keep_study(replace(study, changes=(*study.changes, Change("r-16", ("lora.r=16",)))))
    keep_study(study)
    made(study, 1)
    for label in ("r 16", "r-16"):
        with pytest.raises(PetoolError, match="have the same folder"):
            keep_study(replace(study, changes=(Change(label, ("lora.r=16", "lora.alpha=8")),)))


def test_another_study_ends_the_command_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ["folds", "demo:test:8", "--folds", "2", "--out", str(tmp_path), "--seconds", "0"]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit):  # out of time
        main()
    files = {path: path.read_text() for path in (tmp_path / "folds").iterdir()}
    (tmp_path / "as-it-is-seed0-fold0" / "run" / "some").mkdir(parents=True)
    monkeypatch.setattr(sys, "argv", [*line, "--folds", "3"])
    with pytest.raises(SystemExit, match="folds was 2, is 3\nhint: choose another --out"):
        main()
    assert {path: path.read_text() for path in (tmp_path / "folds").iterdir()} == files


def stand_in(study: Study, monkeypatch: pytest.MonkeyPatch, does: str) -> Path:
    """Where the command lines are written of a Python that only `does` something."""
    python, lines = study.out / "python", study.out / "lines"
    python.write_text(f'#!/bin/sh\necho "$@" >> {lines}\n{does}\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    return lines


@pytest.mark.parametrize(
    ("does", "told"),
    [
        ("kill -9 $$", "was ended by SIGKILL, see "),
        ("kill -SEGV $$", "was ended by SIGSEGV, see "),
        ("exit 3", "failed, see "),
        ("exec sleep 60", "ran out of time\n"),
    ],
)
def test_how_a_training_ended_is_told(study: Study, monkeypatch: Any, capsys: Any, does: str, told: str) -> None:
    stand_in(study, monkeypatch, does)
    left = 2 if "sleep" in does else 60
    assert not train_and_bench(replace(study, until=time.time() + left), One(study.changes[0], 0, 0))
    said = capsys.readouterr().err
    assert said.startswith("as-it-is-seed0-fold0: train ")
    assert told in said


@pytest.mark.parametrize(("on_term", "saved"), [("touch saved; exit 0", True), ("", False)])
def test_out_of_time_a_training_may_save_first(study: Study, monkeypatch: Any, on_term: str, saved: bool) -> None:
    monkeypatch.chdir(study.out)
    monkeypatch.setattr(folds, "_TO_SAVE", 1.0)
    stand_in(study, monkeypatch, f"trap '{on_term}' TERM\nfor i in 1 2 3 4 5 6 7 8 9; do sleep 1; done")
    begun = time.monotonic()
    assert not train_and_bench(replace(study, until=time.time() + 1.5), One(study.changes[0], 0, 0))
    assert (Path("saved").exists(), time.monotonic() - begun < 6) == (saved, True)


def test_a_stopped_training_goes_on_or_fails_but_does_not_start_anew(
    study: Study, monkeypatch: Any, capsys: Any
) -> None:
    lines, one = stand_in(study, monkeypatch, "exit 1"), One(study.changes[0], 0, 0)
    study = replace(study, until=time.time() + 60)
    run = one.folder(study) / "run" / "smol-rating-1"
    run.mkdir(parents=True)
    assert not train_and_bench(study, one)
    assert " train smol-rating --set " in lines.read_text(), "without a checkpoint there is nothing to go on from"
    (run / "checkpoints" / "checkpoint-5").mkdir(parents=True)
    (run / "checkpoints" / "checkpoint-5" / "trainer_state.json").write_text("{}")
    lines.unlink()
    capsys.readouterr()
    assert not train_and_bench(study, one)
    assert lines.read_text() == f"-m petool_lite train --resume {run}\n"
    assert "as-it-is-seed0-fold0: resume failed, see " in capsys.readouterr().err


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a stand-in for CUDA's multi-process service writes how it was called, and what it read."""
    heard, program = tmp_path / "heard", tmp_path / "nvidia-cuda-mps-control"
    program.write_text(
        f'#!/bin/sh\n[ "$1" = -d ] && {{ echo start >> {heard}; exit; }}\ncat >> {heard}; exec sleep 30\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
    monkeypatch.setattr(folds, "_TO_QUIT", 1.5)
    return heard


def test_a_service_that_does_not_end_does_not_hold_the_study(study: Study, service: Path, capsys: Any) -> None:
    """It waits for its clients, and one that never ends would have the whole study wait for it."""
    begun = time.monotonic()
    with shared_gpu(replace(study, jobs=2, gpu=True)):
        assert "CUDA_MPS_PIPE_DIRECTORY" in os.environ
    assert time.monotonic() - begun < 5
    assert service.read_text() == "start\nquit\n"
    assert "did not end in" in capsys.readouterr().err
    assert "CUDA_MPS_PIPE_DIRECTORY" not in os.environ


def test_a_study_is_no_client_of_the_service_that_it_ends(
    study: Study, service: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asking for GPUs while the service runs makes the study one of those that the service waits for."""

    def asked() -> bool:
        assert "CUDA_MPS_PIPE_DIRECTORY" not in os.environ
        return True

    monkeypatch.setattr(folds, "gpu_available", asked)
    monkeypatch.setattr(sys, "argv", ["folds", study.data, "--jobs", "2", "--seconds", "0", "--out", str(study.out)])
    found = study_of(folds._options())
    assert found.gpu
    made(found)  # one run is past its training
    assert run_all(found, silent) == 0, "out of time"
    assert service.read_text() == "start\nquit\n"


def test_without_a_gpu_no_service_is_started(study: Study, service: Path) -> None:
    with shared_gpu(replace(study, jobs=2)):
        pass
    assert not service.exists()


@pytest.mark.slow
def test_one_real_study_and_what_is_done_is_kept(tiny: Path, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "folds", "demo:test:12", "--recipe", "demo", "--folds", "2"]
    line += ["--jobs", "2", "--set", f"model.base={tiny}", "--set", "train.max_steps=2", "--out", str(tmp_path / "out")]
    first = subprocess.run(line, cwd=tmp_path, env=own_runs(tmp_path), capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    document = json.loads(first.stdout)
    names = {item["variant"]: item["n"] for item in document["lines"]}
    assert names == {"rule-likely": 12, "tuned-q4_k_m-constrained": 12}
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/run/*/manifest.json")}
    assert len(made) == 2
    again = subprocess.run(line, cwd=tmp_path, env=own_runs(tmp_path), capture_output=True, text=True)
    assert json.loads(again.stdout)["lines"] == document["lines"]
    assert {path: path.stat().st_mtime_ns for path in made} == made
    stopped = next(iter(made))
    stopped.unlink()  # as if killed before the end, its checkpoint written
    third = subprocess.run(line, cwd=tmp_path, env=own_runs(tmp_path), capture_output=True, text=True)
    assert json.loads(third.stdout)["runs"] == 2
    assert set((tmp_path / "out").glob("*/run/*/manifest.json")) == set(made), "it went on in its own folder"
    assert (stopped.parents[2] / "resume.log").is_file()


def test_a_study_out_of_time_trains_nothing(study: Study) -> None:
    assert not train_and_bench(replace(study, until=1.0), One(study.changes[0], 0, 0))
