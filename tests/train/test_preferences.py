"""The second stage: pairs of a right and a wrong call, measured against the adapter that it starts from."""

import json
import math
from pathlib import Path

import pytest
from support import options, rows_of, tiny_settings, train_demo
from support_published import published_rows

from petool_lite.errors import PetoolError
from petool_lite.recipe import load_recipe
from petool_lite.train import dry_run

DPO = [
    "train.objective=dpo", "train.rows=2", "train.max_steps=8",
    "train.learning_rate=3e-3", "train.warmup_ratio=0", "lora.dropout=0.0", "train.save_every=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """Entries that list equal tools of other providers."""
    path = tmp_path_factory.mktemp("pairs") / "entries.json"
    path.write_text(json.dumps(published_rows("train", 12)))
    return path


@pytest.fixture(scope="module")
def second(trained, tiny, pairs, command, tmp_path_factory) -> Path:
    """A complete DPO run on top of `trained`, its adapter given as a folder."""
    root = tmp_path_factory.mktemp("second")
    settings = options(*DPO, f"data.train={pairs}", f"model.adapter={trained / 'adapter'}")
    return train_demo(command, root, *tiny_settings(tiny), *settings)[0]


def test_it_starts_level_with_its_own_start_and_then_prefers_the_right_calls(second, trained) -> None:
    """At step 1 both answers are as likely as under the first stage's adapter; under the bare base they were not."""
    from safetensors.torch import load_file

    rows = rows_of(second)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert rows[0]["rewards/margins"] == pytest.approx(0, abs=2e-3)
    assert min(row["loss"] for row in rows[4:]) < 0.66
    assert sum(row["rewards/margins"] for row in rows[4:]) / 4 > 0.05
    checkpoint = second / "checkpoints" / "checkpoint-8"
    assert not [path for path in checkpoint.iterdir() if path.is_dir()], "the reference would be restored in its place"
    first, now = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (trained, second))
    assert first.keys() == now.keys()
    change = max((now[name] - first[name]).abs().max().item() for name in first)
    assert 1e-4 < change < 0.1, "a second stage moves the first one's weights a little, and starts from them"


def test_a_start_that_cannot_be_right_is_refused_before_loading(trained, tiny) -> None:
    for override, message in (
        ("model.adapter=", "needs the adapter that a first stage left"),
        ("lora.r=16", "another shape than the recipe"),
        ("lora.dropout=0.1", "without dropout"),
        ("model.base=smollm2-135m", "was trained on"),
        ("model.adapter=nowhere", "no adapter: nowhere"),
    ):
        settings = [*tiny_settings(tiny)[1::2], *DPO, f"model.adapter={trained}", override]
        with pytest.raises(PetoolError, match=message):
            dry_run(load_recipe("demo", settings)[1])
