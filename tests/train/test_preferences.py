"""The second stage: pairs of a right and a wrong call, measured against the adapter that it starts from."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from support import options, rows_of, tiny_settings, train_demo
from support_published import published_rows

from petool_lite.data.answers import with_rejected
from petool_lite.data.files import load_dataset
from petool_lite.errors import PetoolError
from petool_lite.prompt.render import Layout, chat_from_directory, example, examples
from petool_lite.recipe import load_recipe
from petool_lite.train import dry_run
from petool_lite.train.preference import pair_rows

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


def test_pairs_have_the_ids_that_the_renderer_gives_each_answer(smollm2, pairs) -> None:
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    chat = chat_from_directory(smollm2.directory)
    layout = Layout("petool", 1024)
    entries = with_rejected(load_dataset(str(pairs), "rating").entries, seed=0)
    rows = [
        {"input_ids": row.ids, "answer_start": row.answer_start, "rejected_ids": row.rejected}
        for row in examples(chat, entries, layout, pairs=True)
    ]
    batch = DataCollatorForPreference(pad_token_id=0)(pair_rows(rows))
    sides = zip(batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True)
    found = [(ids[mask == 1].tolist(), int(answer.sum())) for ids, mask, answer in sides]
    assert entries
    for index, entry in enumerate(entries):
        right, wrong = (example(chat, replace(entry, answer=item), layout) for item in (entry.answer, entry.rejected))
        assert found[index] == (right.ids, len(right.ids) - right.answer_start)
        assert found[index + len(entries)] == (wrong.ids, len(wrong.ids) - wrong.answer_start)


def test_a_start_that_cannot_be_right_is_refused_before_loading(trained, tiny) -> None:
    for override, message in (
        ("model.adapter=", "needs the adapter of a first one"),
        ("lora.r=16", "another shape than the recipe"),
        ("lora.dropout=0.1", "without dropout"),
        ("model.base=smollm2-135m", "was trained on"),
        ("model.adapter=nowhere", "no adapter: nowhere"),
    ):
        settings = [*tiny_settings(tiny)[1::2], *DPO, f"model.adapter={trained}", override]
        with pytest.raises(PetoolError, match=message):
            dry_run(load_recipe("demo", settings)[1])
