"""Full fine-tuning: what a run leaves, and what a second stage makes of it."""

import json

import pytest
from support import rows_of

from petool_lite.errors import PetoolError
from petool_lite.recipe import load_recipe
from petool_lite.train import dry_run


def test_a_run_leaves_a_model_that_transformers_loads_and_a_second_stage_starts_from(trained_full, tiny) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    manifest, folder = json.loads((trained_full / "manifest.json").read_text()), trained_full / "model"
    assert (manifest["method"], manifest["model_step"], manifest["memory"]) == ("full", 10, None)
    assert not (trained_full / "adapter").exists()
    losses = [row["loss"] for row in rows_of(trained_full)]
    assert losses[-1] < losses[0] - 0.5
    found, before = (load_file(place / "model.safetensors") for place in (folder, tiny))
    assert found.keys() == before.keys()
    assert not any(torch.equal(found[name], before[name]) for name in found), "every tensor learned, embeddings too"
    masters = load_file(trained_full / "checkpoints" / "checkpoint-10" / "model.safetensors")
    assert {weight.dtype for weight in masters.values()} == {torch.float32}
    assert all(torch.equal(masters[name].bfloat16(), found[name]) for name in found)
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    ids = [AutoTokenizer.from_pretrained(place)("a b").input_ids for place in (folder, tiny)]
    assert ids[0] == ids[1]
    start = "data.train=demo:train:4"
    with pytest.raises(PetoolError, match="has no adapter: all its weights learned") as error:
        dry_run(load_recipe("demo", [start, f"model.adapter={trained_full}"])[1])
    assert error.value.hint.endswith(f"model.base={folder}")
    assert dry_run(load_recipe("demo", [start, f"model.base={folder}"])[1])["kept"] == 4
