"""Every family through Unsloth as training loads it, in 16 and in 4 bits: packed rows are as exact as rows alone."""

import pytest
from support_families import CHANGES, family_model, small_tokenizer
from support_train import updates


@pytest.mark.slow
def test_packed_and_unpacked_updates_agree_through_unsloth(tmp_path) -> None:
    places = []
    for name in CHANGES:
        tokenizer = small_tokenizer(name, tmp_path / name / "tokenizer")
        places.append(family_model(name, tokenizer, tmp_path / name / "model"))
    found = updates(places, sizes=((90, 60), (9, 1), (70, 66)))
    assert len(found) == 2 * len(CHANGES)
    for row, name in zip(found, [name for name in CHANGES for _ in "12"], strict=True):
        precision, losses, apart, _, learned, packed = row
        assert losses[1] == pytest.approx(losses[0], rel=1e-3), (name, precision)
        assert apart < 3e-2, (name, precision)
        assert learned >= 2 * 7 * 2, (name, precision)
        assert packed == (precision == "nf4"), name
