"""Loss curves: what both sides are told, how runs are put together, and one real run."""

import json
import subprocess
from pathlib import Path

import pytest
from petool_lite.bench import curves
from petool_lite.bench.curves import Curves, measure, recipe_settings, same_rows, summary, table_rows
from petool_lite.bench.train_scripts import PEER

from petool_lite.recipe import load_recipe


def run(way: str, seed: int, *losses: float, **more) -> dict:
    return {"way": way, "seed": seed, "losses": list(losses)} | more


FOUND = [
    run("lean", 0, 2.0, 9.0, 1.0, 1.0, 1.0, 1.0),
    run("hf", 0, 3.0, 4.0),
    run("lean", 1, 2.5, 9.0, 3.0, 3.0, 3.0, 3.0),
]


def test_a_way_has_the_mean_and_deviation_of_its_seeds() -> None:
    assert summary(FOUND) == [
        {"way": "lean", "n": 2, "mean": 2.0, "sd": round(2**0.5, 4)},
        {"way": "hf", "n": 1, "mean": 3.5, "sd": None},
    ]


def test_the_table_has_every_run_and_a_line_for_more_than_one_seed() -> None:
    assert table_rows(FOUND) == [
        ["lean", "0", "1.0000", "2.0000"],
        ["lean", "1", "3.0000", "2.5000"],
        ["lean", "2 seeds", "2.0000 ± 1.4142", ""],
        ["hf", "0", "3.5000", "3.0000"],
    ]


def test_the_order_of_rows_is_compared_by_the_tokens_of_whole_updates() -> None:
    found = [
        run("lean", 0, 1.0, tokens=[30, 60]),
        run("hf", 0, 1.0, row_tokens=[10, 20, 25, 5, 7]),
        run("lean", 1, 1.0, tokens=[31, 60]),
        run("hf", 1, 1.0, row_tokens=[10, 20, 25, 5]),
        run("hf", 2, 1.0, row_tokens=[10]),
    ]
    checked = [item["same_rows"] for item in same_rows(found) if item["way"] == "hf"]
    assert checked == [True, False, None]


def test_both_sides_have_the_optimizer_of_the_published_recipe() -> None:
    """The peer's script and petool-lite's trainer call the same function."""
    from petool_lite.train.loop import optimizer_arguments

    assert "**optimizer_arguments(" in PEER
    assert optimizer_arguments(load_recipe("rating", ["train.learning_rate=5e-4"])[1].train, 300) == {
        "learning_rate": 5e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 3,
        "weight_decay": 0.001,
        "max_grad_norm": 0.3,
        "optim": "paged_adamw_32bit",
    }


def test_the_peer_has_the_settings_of_its_way_and_nothing_else(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = []
    monkeypatch.setattr(curves, "rows_file", lambda *_: None)
    monkeypatch.setattr(curves, "results", lambda line, *_: lines.append(line) or [run("", 0, 1.0)])
    measure(Curves(("model.base=smollm2-135m",), ("hf-bf16",), (3,), updates=2))
    ((*_, script, told),) = lines
    assert script == PEER
    facts = json.loads(told)
    assert (facts["engine"], facts["updates"]) == ("hf", 2)
    assert facts["settings"] == [
        "model.base=smollm2-135m", "model.precision=bf16", "train.seed=3", "train.max_steps=2",
    ]  # fmt: skip


def test_make_passes_options_on() -> None:
    line = ["make", "-n", "bench-curves", "DATA=entries.json", "OPTIONS=--ways auto-bf16"]
    told = subprocess.run(line, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True).stdout
    assert "bench.curves smollm2-135m entries.json --ways auto-bf16\n" in told


@pytest.mark.slow
def test_one_real_run(tiny, capfd: pytest.CaptureFixture) -> None:
    settings = recipe_settings(str(tiny), "demo:train:6", 6, 3)
    (found,) = measure(Curves(settings, ("lean",), (1,), updates=2))
    assert (found["way"], found["seed"], len(found["losses"])) == ("lean", 1, 2)
    assert "checkpointing" in found["how"]
    out, err = capfd.readouterr()
    assert not out
    assert json.loads(err[err.index("RESULT ") + 7 :].splitlines()[0])["losses"] == found["losses"]
