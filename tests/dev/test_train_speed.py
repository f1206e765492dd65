"""Speed of training: every way and peer is a recipe that loads, and what the table says of results."""

from typing import Any

import pytest
from train_speed import PEERS, WAYS, as_markdown, prepared_ids, replaced

from petool_lite.recipe import load_recipe


@pytest.mark.parametrize("settings", [way[1] for way in WAYS] + [peer[2] for peer in PEERS])
def test_the_settings_of_every_side_go_together(settings) -> None:
    recipe = load_recipe("rating", settings)[1]
    assert (recipe.model.precision, recipe.train.rows in (12, 32)) == ("nf4", True)


def test_rows_of_a_peer_are_all_of_one_length_where_several_share_a_batch(smollm2) -> None:
    recipe = load_recipe("demo", ["data.train=demo:train:12"])[1]
    one, several = prepared_ids(recipe, 12, 1), prepared_ids(recipe, 12, 3)
    assert len({len(row["input_ids"]) for row in one}) > 1
    assert len({len(row["input_ids"]) for row in several}) == 1
    assert all(0 < row["answer_start"] < len(row["input_ids"]) for row in several)


def test_the_table_stands_between_its_markers() -> None:
    found: list[dict[str, Any]] = [
        {"name": "petool-lite, auto", "how": "bf16", "tokens_per_s": 31000.4, "peak_gb": 124.4, "held_gb": 125.0,
         "predicted_gb": 124.5},
        {"name": "a peer", "how": "nf4", "tokens_per_s": 7226.0, "peak_gb": 4.16, "held_gb": 4.35},
    ]  # fmt: skip
    text = as_markdown(found, "python dev/train_speed.py")
    assert "| petool-lite, auto | bf16 | 31,000 | 124.40 / 125.00 | 124.50 |" in text
    assert "| a peer | nf4 | 7,226 | 4.16 / 4.35 | - |" in text
    whole = replaced("before\n<!-- bench-gpu -->\nold\n<!-- /bench-gpu -->\nafter", text)
    assert whole.startswith("before\n<!-- bench-gpu -->\n`python dev/train_speed.py`")
    assert "old" not in whole
    with pytest.raises(ValueError, match="has no"):
        replaced("nothing", text)
