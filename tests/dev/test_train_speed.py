"""Speed of training: what each side is told, which result the warm start belongs to, and the table."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from petool_lite.bench import train_speed
from petool_lite.bench.machine import commit
from train_scripts import OURS
from train_speed import PEERS, WAYS, as_markdown, told

from petool_lite.recipe import load_recipe


def result(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "tokens_per_s": 1000.0, "peak_gb": 1.5} | more


def test_the_settings_of_every_way_go_together() -> None:
    precisions = {load_recipe("rating", way.settings)[1].model.precision for way in WAYS}
    assert precisions == {"nf4"}


def test_peers_are_told_their_dropout() -> None:
    found = {}
    for peer in PEERS:
        task = json.dumps(told(peer, ["model.base=smollm2-135m"], Path("rows.json")))
        settings = json.loads(task)["settings"]
        found[peer["name"]] = peer["engine"], load_recipe("rating", settings)[1].lora.dropout
    assert found == {
        "Transformers + PEFT + TRL, as published (dropout 0.1)": ("hf", 0.1),
        "Unsloth, as published (dropout 0.1)": ("unsloth", 0.1),
        "Unsloth as its notebooks use it (dropout 0)": ("unsloth", 0.0),
    }


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], float]]:
    """The processes that a measurement starts: names of ours or of a peer, and seconds; the second way comes first."""
    made: list[tuple[list[str], float]] = []

    def results(line: list[str], seconds: float, environment: Any) -> list[dict[str, Any]]:
        ways = json.loads(line[-1])
        names = [way["name"] for way in ways] if line[2] == OURS else [ways["name"]]
        made.append((names, seconds))
        if line[2] != OURS:
            return [result(names[0])]
        ran = [names[1], names[0]] if len(names) > 1 else names
        return [
            result(f"petool-lite, {name}", first_step_s=9.0 - len(made) if name == names[0] else None, start=[])
            for name in ran
        ]

    monkeypatch.setattr(train_speed, "results", results)
    monkeypatch.setattr(train_speed, "training_rows", lambda *_, **__: [])
    monkeypatch.setattr(train_speed, "rows_file", lambda *_: None)
    return made


def test_the_warm_start_comes_before_the_peers_and_goes_to_the_way_of_its_name(calls: list[Any]) -> None:
    found = train_speed.measure("smollm2-135m", "demo:train:4", 1.0, ())  # less time than anything takes
    assert [names for names, _ in calls[1:]] == [[WAYS[0].name], *([peer["name"]] for peer in PEERS)]
    assert calls[1][1] >= 120
    by_name = {item["name"]: item for item in found}
    first = by_name[f"petool-lite, {WAYS[0].name}"]
    assert (first["first_step_s"], first["first_step_warm_s"]) == (8.0, 7.0)
    assert [item["name"] for item in found if "first_step_warm_s" in item] == [first["name"]]


def test_one_way_alone_has_neither_peers_nor_a_warm_start(calls: list[Any]) -> None:
    train_speed.measure("smollm2-135m", "demo:train:4", 1.0, (), ["auto"])
    assert [names for names, _ in calls] == [["auto"]]


def test_without_a_first_start_there_is_no_second(calls: list[Any]) -> None:
    found = [result("petool-lite, auto")]
    train_speed.add_warm_start(found, {"name": "lean"}, 9.0, {})
    assert (calls, found) == ([], [result("petool-lite, auto")])


def test_the_table_names_the_commit_and_counts_from_transformers() -> None:
    found = [result("petool-lite, lean", tokens_per_s=4000.0, way="nf4"), result(PEERS[0]["name"])]
    text = as_markdown(found, "make bench-gpu")
    head = text.split("One run of each")[0]
    assert f", commit {commit()}." in head
    assert "| petool-lite, lean | nf4 | 4,000 | 4.0 | 1.50 |" in text
    found[0]["reserved_gb"] = 2.0
    assert "| 1.50 / 2.00 |" in as_markdown(found, "make bench-gpu")
    assert "at most" not in as_markdown(found, "make bench-gpu")
    found[0]["limit_gb"] = 7.4
    assert "torch could hold 7.4 GiB at most" in as_markdown(found, "make bench-gpu")
    found[0] |= {"peak_gb": 0.0, "reserved_gb": None}
    assert "| 0.00 |" in as_markdown(found, "make bench-gpu"), "on a CPU"


@pytest.mark.parametrize(
    ("heads", "told_as"),
    [(True, "nf4, all kept, offload with q, k, v, 8,192 tokens"), (False, "nf4, all kept, offload, 8,192 tokens")],
)
def test_a_result_says_what_waits_in_the_machines_memory(
    heads: bool, told_as: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The script of its own process, with a training that only leaves its files."""
    from petool_lite import train

    chosen = {"checkpointing": False, "offload": True, "offload_heads": heads, "token_budget": 8192}
    facts = {"recipe": {"model": {"precision": "nf4"}, "train": chosen}, "peak_memory_gb": 1.0, "predicted": None}
    (tmp_path / "manifest.json").write_text(json.dumps({**facts, "data": {"tokens": 20, "kept": 2}}))
    rows = [{"seconds": second, "tokens": 10 * second, "loss": 1.0} for second in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def leave(name: str, recipe: Any, report: Any) -> Path:
        report("training", 1, 2, "")
        return tmp_path

    monkeypatch.setattr(train, "train", leave)
    monkeypatch.setattr(sys, "argv", ["ours", json.dumps([{"name": "4 GB card", "settings": []}])])
    monkeypatch.setenv("BENCH_STARTED", "0")
    exec(compile(OURS, "ours", "exec"), {})
    assert json.loads(capsys.readouterr().out.removeprefix("RESULT "))["way"] == told_as


def test_a_way_that_fails_is_told_and_left_out(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Through the command's own processes: no such base, so nothing can be trained."""
    ways = [{"name": name, "settings": ["model.base=/nowhere"]} for name in ("lean", "auto")]
    now = repr(time.time())
    line = [sys.executable, "-c", OURS, json.dumps(ways)]
    assert train_speed.results(line, 120, {"BENCH_STARTED": now, "BENCH_LIMIT": now}) == []
    assert "FAILED lean " in capsys.readouterr().err
