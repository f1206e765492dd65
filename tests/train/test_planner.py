"""The planner against what a GPU measured, and what it picks and refuses."""

import json

import pytest

from petool_lite.errors import PetoolError
from petool_lite.recipe import load_recipe
from petool_lite.train.planner import (
    Choice,
    Dimensions,
    Load,
    Room,
    chosen,
    forecasts,
    peak_bytes,
    picked,
    tokens_per_s,
)
from petool_lite.train.rates import Rates

LLAMA_3B = Dimensions(3072, 8192, 28, 24, 8, 128, 128256, True)
H200 = Rates(690e12, 315e12, 3.6e12, 55e9)
ROWS = Load((7231, *(2761, 3100, 3290, 2500, 2900) * 140), 0.0126)
GIB = 2**30


def rating(*settings: str):
    return load_recipe("rating", ["lora.dropout=0.0", *settings])[1]


# GiB over what lay on the GPU before, one H200, docs/performance.md
MEASURED = [
    (Choice("nf4", True, False, 8192), 4.56),
    (Choice("nf4", True, False, 16384), 8.89),
    (Choice("nf4", True, False, 32768), 17.42),
    (Choice("bf16", False, False, 16384), 26.39),
    (Choice("bf16", False, False, 32768), 52.06),
]


@pytest.mark.parametrize(("choice", "gib"), MEASURED)
def test_predicted_memory_is_within_a_tenth_of_the_measured(choice, gib) -> None:
    nothing = Load((1,), 0.0)
    resident = peak_bytes(LLAMA_3B, rating(), choice, nothing, optimizer=False)
    assert (peak_bytes(LLAMA_3B, rating(), choice, ROWS, optimizer=False) - resident) / GIB == pytest.approx(
        gib, rel=0.1
    )


# GiB of whole runs with offload, beside what memory torch held (within 7.4), docs/performance.md
OFFLOADED = [
    (Choice("nf4", True, True, 32768, True), 5.59),
    (Choice("nf4", True, True, 32768), 5.77),
    (Choice("nf4", True, True, 8192), 3.82),
]


@pytest.mark.parametrize(("choice", "gib"), OFFLOADED)
def test_predicted_memory_with_offload_is_within_a_tenth_of_the_measured(choice, gib) -> None:
    assert peak_bytes(LLAMA_3B, rating(), choice, ROWS) / GIB == pytest.approx(gib, rel=0.1)


SMOLLM2 = Dimensions(576, 1536, 30, 9, 3, 64, 49152, True)


def test_predicted_memory_of_a_small_model_is_within_a_tenth_of_the_measured() -> None:
    """Five folds of smol-rating on one H200 took 3.49 to 3.57 GiB; rows of 816 tokens in the mean."""
    recipe = load_recipe("smol-rating", [])[1]
    found = peak_bytes(SMOLLM2, recipe, Choice("bf16", False, False, 8192), Load((2040, *(816,) * 600), 0.051))
    assert found / GIB == pytest.approx(3.53, rel=0.1)


# tokens/s of whole runs and of their updates alone, same place; the rows' lengths are only about those of the runs
SPEEDS = [
    (Choice("nf4", True, True, 16384), "0.0", 26560),
    (Choice("nf4", True, True, 16384), "0.1", 22724),
    (Choice("nf4", True, True, 32768, True), "0.1", 22950),
    (Choice("nf4", False, False, 32768), "0.0", 32652),
    (Choice("bf16", False, False, 32768), "0.0", 35239),
]


@pytest.mark.parametrize(("choice", "dropout", "speed"), SPEEDS)
def test_predicted_speed_is_near_the_measured(choice, dropout, speed) -> None:
    found = tokens_per_s(LLAMA_3B, rating(f"lora.dropout={dropout}"), choice, ROWS, H200)
    assert found == pytest.approx(speed, rel=0.1)


DENSE = Load((8000,) * 36, 0.0044)  # 22,615 and 22,972 tokens/s in one process, the second with q, k and v offloaded


def test_q_k_and_v_wait_in_the_machine_where_that_pays() -> None:
    recipe = rating("train.accumulate=12")
    without, with_them = (
        tokens_per_s(LLAMA_3B, recipe, Choice("nf4", True, True, 32768, heads), DENSE, H200) for heads in (False, True)
    )
    assert (without, with_them) == (pytest.approx(22615, rel=0.1), pytest.approx(22972, rel=0.1))
    assert 1.01 < with_them / without < 1.04
    for rows, heads in ((DENSE, True), (ROWS, False)):  # short rows leave no time for copying more
        lean = picked(forecasts(LLAMA_3B, recipe, rows, H200), recipe, "lean", Room(140 * GIB, 40 * GIB))
        assert lean is not None
        assert (lean.choice.offload, lean.choice.offload_heads) == (True, heads)


def test_more_pinned_memory_than_there_is_is_refused() -> None:
    settings = (
        "train.checkpointing=true",
        "train.offload=true",
        "train.offload_heads=true",
        "train.token_budget=32768",
    )
    with pytest.raises(PetoolError, match=r"pins about 27\.3 GiB .* third of which is 4\.0 GiB") as error:
        chosen(LLAMA_3B, rating(*settings), ROWS, H200, Room(140 * GIB, 4 * GIB))
    assert error.value.exit_code == 3
    options = [
        option.removeprefix("--set ") for option in error.value.hint.removeprefix("would fit: ").split(" --set ")
    ]
    assert chosen(LLAMA_3B, rating(*settings, *options), ROWS, H200, Room(140 * GIB, 4 * GIB)).host_gb <= 4


def test_lean_fits_eight_gigabytes_and_keeps_the_published_numerics() -> None:
    recipe = rating()
    for room in (Room(140 * GIB, 40 * GIB), Room(7.6 * GIB, 5 * GIB)):
        lean = picked(forecasts(LLAMA_3B, recipe, ROWS, H200), recipe, "lean", room)
        assert lean is not None
        assert lean.peak_gb < 7.4
        assert lean.host_gb * GIB <= room.host
        assert (lean.choice.precision, lean.choice.checkpointing) == ("nf4", True)


def test_auto_is_about_the_fastest_that_fits() -> None:
    recipe = rating()
    found = forecasts(LLAMA_3B, recipe, ROWS, H200)
    speeds = []
    for gib in (140, 24, 8):
        auto = picked(found, recipe, "auto", Room(gib * GIB, 40 * GIB))
        assert auto is not None
        assert auto.peak_gb <= 0.9 * gib
        assert auto.tokens_per_s == max(
            item.tokens_per_s for item in found if item.peak_gb <= 0.9 * gib and item.host_gb <= 40
        )
        speeds.append(auto.tokens_per_s)
    assert speeds == sorted(speeds, reverse=True)


def test_too_little_memory_is_refused_with_what_would_fit() -> None:
    recipe = rating("train.checkpointing=false", "model.precision=bf16", "train.token_budget=32768")
    with pytest.raises(PetoolError) as error:
        chosen(LLAMA_3B, recipe, ROWS, H200, Room(16 * GIB, 8 * GIB))
    assert error.value.exit_code == 3
    assert "16.0 GiB are free" in error.value.message
    options = error.value.hint.removeprefix("would fit: ").split(" --set ")
    fitting = [option.removeprefix("--set ") for option in options]
    assert chosen(LLAMA_3B, rating(*fitting), ROWS, H200, Room(16 * GIB, 8 * GIB)).peak_gb < 16
    with pytest.raises(PetoolError, match="GiB of GPU memory"):
        chosen(LLAMA_3B, rating(), ROWS, H200, Room(2 * GIB, 8 * GIB))


def test_the_dry_run_tells_every_way_to_train(tiny, command, tmp_path) -> None:
    line = ["train", "rating", "--set", f"model.base={tiny}", "--set", "data.train=demo:train:20", "--dry-run"]
    result = command(*line, "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout)
    assert plan["kept"] == 20
    ways = {(way["precision"], way["offload_heads"], way["offload"], way["checkpointing"]) for way in plan["choices"]}
    kinds = ((True, True, True), (False, True, True), (False, False, True), (False, False, False))
    assert ways == {(precision, *kind) for precision in ("nf4", "bf16") for kind in kinds}
    assert all(way["peak_gb"] > 0 for way in plan["choices"])
    assert plan["lean"]["precision"] == "nf4"
    assert not list(tmp_path.iterdir()), "nothing is written"
    shown = command(*line, cwd=tmp_path)
    assert "offload" in shown.stdout
    assert "needs a GPU: not here" in shown.stdout
    assert plan["trains_here"] is False
