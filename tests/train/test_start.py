"""What is refused before anything is loaded: an adapter to start from that says more, odd schedules, odd rows."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from petool_lite.adapters import read_adapter_config
from petool_lite.errors import PetoolError
from petool_lite.recipe import load_recipe
from petool_lite.train import dry_run
from petool_lite.train.memory import update_count
from petool_lite.train.records import rate_at

LINEARS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}


@pytest.fixture
def adapter(tmp_path) -> Any:
    """Write an adapter folder whose adapter_config.json is changed, on all linears of one layer."""
    import torch
    from safetensors.torch import save_file

    def make(names: tuple[str, ...] = (), **changes: Any) -> Path:
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "target_modules": LINEARS}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | changes))
        stem = "base_model.model.model.layers.0.mlp"
        held = names or tuple(f"{stem}.{name}.lora_{side}.weight" for name in LINEARS for side in "AB")
        save_file({name: torch.ones(2, 2) for name in held}, tmp_path / "adapter_model.safetensors")
        return tmp_path

    return make


def test_a_plain_adapter_and_its_scale_and_no_pickled_one(adapter, tmp_path) -> None:
    plain = read_adapter_config(adapter(base_model_name_or_path="some/base"))
    assert (plain.r, plain.alpha, plain.scaling, plain.base) == (4, 8, 2, "some/base")
    rooted = read_adapter_config(adapter(use_rslora=True))
    assert (rooted.rslora, rooted.scaling) == (True, 4)
    for text in (".*layers.*(q_proj|v_proj)", None):
        assert read_adapter_config(adapter(target_modules=text)).targets == tuple(LINEARS), "the weights tell"
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(PetoolError, match=r"no adapter_model\.safetensors"):
        read_adapter_config(tmp_path)


def test_an_adapter_that_is_more_than_two_matrices_is_refused(adapter) -> None:
    for changes in (
     {"peft_type": "IA3"}, {"use_dora": True}, {"bias": "lora_only"}, {"lora_bias": True}, {"fan_in_fan_out": True},
     {"rank_pattern": {"q_proj": 8}}, {"alpha_pattern": {"q_proj": 64}}, {"modules_to_save": ["lm_head"]},
     {"trainable_token_indices": [1, 2]}, {"layer_replication": [[0, 2]]}, {"init_lora_weights": "pissa_niter_4"},
     {"r": 0}, {"lora_alpha": "NaN"}, {"lora_alpha": 1e999}, {"names": ("base_model.model.lm_head.lora_A.weight",)},
     {"names": ("base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector",)},
    ):  # fmt: skip
        with pytest.raises(PetoolError):
            read_adapter_config(adapter(**changes))


@pytest.mark.parametrize(("setting", "changes", "told"), [
    ("lora.r=100000", {}, "lora.r = 100000 is more than "),
    ("train.method=full", {"quantization_config": {"quant_method": "bitsandbytes"}}, "is quantized, and full"),
    ("lora.r=4", {"vocab_size": 1000}, "by config.json it has [1000, 256]"),
    ("lora.r=4", MISTRAL | {"sliding_window": 64}, "sees the last 64 tokens only (sliding_window)"),
])  # fmt: skip
def test_what_does_not_go_with_the_base_is_refused(tiny, tmp_path, setting, changes, told) -> None:
    base = shutil.copytree(tiny, tmp_path / "base")
    (base / "config.json").write_text(json.dumps(json.loads((base / "config.json").read_text()) | changes))
    with pytest.raises(PetoolError, match=re.escape(told)):
        dry_run(load_recipe("demo", [f"model.base={base}", "data.train=demo:train:4", setting])[1])


def test_updates_are_counted_once_and_a_begun_one_counts() -> None:
    _, recipe = load_recipe("rating")
    assert update_count(recipe, 9000) == 2 * 282  # 281.25 updates an epoch
    assert update_count(load_recipe("rating", ["train.max_steps=10"])[1], 9000) == 10
    for epochs, wanted in (("1.5", 5), ("0.1", 1)):
        assert update_count(load_recipe("rating", [f"train.epochs={epochs}"])[1], 96) == wanted


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant_with_warmup"])
def test_every_update_has_a_rate_above_nothing_and_one_has_the_peak(shape) -> None:
    for warmup, total in ((0, 1), (1, 1), (1, 2), (0.07, 60), (0.5, 3)):
        rates = [rate_at(done, shape, warmup, total) for done in range(total)]
        assert all(0 < rate <= 1 for rate in rates)
        assert math.isclose(max(rates), 1)
        falling = rates[rates.index(max(rates)) :]
        assert sorted(falling, reverse=True) == falling
