"""Accuracy by folds: what each run is told, how results of many runs become a line, and one real study."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from petool_lite.bench.folds import (
    Change,
    One,
    Study,
    beside_the_gpu,
    collect,
    grouped_interval,
    parse_change,
    settings_of,
    write_split,
)
from support import own_runs
from support_bench import row, write_results

from petool_lite.data.files import load_dataset
from petool_lite.errors import PetoolError


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(
        "demo:test:8", "smol-rating", tmp_path, (Change("as it is"), Change("r 16", ("lora.r=16",))), 2, (0, 1), (0, 1),
        ("model.adapter=runs/{seed}-{fold}",), ("rating",), "", 1, 0.0,
    )  # fmt: skip


def test_a_run_is_told_its_fold_and_seed_and_the_change_decides(study: Study) -> None:
    told = dict(item.split("=", 1) for item in settings_of(study, One(study.changes[1], 1, 0)))
    assert told["data.train"] == str(study.out / "folds" / "fold0-train.jsonl")
    assert told["data.held_out"] == str(study.out / "folds" / "fold0-test.jsonl")
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


@pytest.mark.slow
def test_one_real_study_and_what_is_done_is_kept(tiny: Path, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "petool_lite.bench.folds", "demo:test:12", "--recipe", "demo", "--folds", "2"]
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


def test_a_study_out_of_time_trains_nothing(study: Study) -> None:
    from petool_lite.bench.folds import train_and_bench

    assert not train_and_bench(replace(study, until=1.0), One(study.changes[0], 0, 0))
