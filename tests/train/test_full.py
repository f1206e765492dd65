"""Full fine-tuning: what is refused, what a run leaves, and that it survives a kill."""

import json
from typing import Any

import pytest
import torch
from support import rows_of

from petool_lite.errors import PetoolError
from petool_lite.models import resolve_base
from petool_lite.recipe import load_recipe
from petool_lite.train import dry_run
from petool_lite.train.attention import PACKED
from petool_lite.train.load import load_model


def test_what_does_not_go_together_is_told_at_once() -> None:
    wrong = ["model.precision=nf4", "model.adapter=runs/a", "train.objective=dpo"]
    with pytest.raises(PetoolError) as error:
        load_recipe("demo", ["train.method=full", "train.epochs=-1", *wrong])
    for key in ("train.epochs", "model.precision", "model.adapter", "train.objective"):
        assert f"{key}: " in error.value.message
    with pytest.raises(PetoolError, match=r"model\.precision: full trains the weights themselves"):
        load_recipe("rating", ["train.method=full"])
    load_recipe("demo", wrong)  # each of them goes with an adapter, as far as a recipe can tell


def demo(*settings: str) -> Any:
    return load_recipe("demo", ["data.train=demo:train:4", *settings])[1]


def test_a_run_leaves_a_model_that_transformers_loads(trained_full, tiny) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    manifest = json.loads((trained_full / "manifest.json").read_text())
    assert (manifest["method"], manifest["model_step"], manifest["memory"]) == ("full", 10, None)
    left = {"recipe.toml", "resume.json", "manifest.json", "metrics.jsonl", "loss.png", "train.log", "checkpoints"}
    assert {path.name for path in trained_full.iterdir()} == left | {"model"}
    losses = [row["loss"] for row in rows_of(trained_full)]
    assert losses[-1] < losses[0] - 0.5
    found, before = (load_file(folder / "model.safetensors") for folder in (trained_full / "model", tiny))
    assert found.keys() == before.keys()
    assert {weight.dtype for weight in found.values()} == {torch.bfloat16}
    assert not any(torch.equal(found[name], before[name]) for name in found), "every tensor learned, embeddings too"
    masters = load_file(trained_full / "checkpoints" / "checkpoint-10" / "model.safetensors")
    assert {weight.dtype for weight in masters.values()} == {torch.float32}
    assert all(torch.equal(masters[name].bfloat16(), found[name]) for name in found)
    folder = trained_full / "model"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (tiny / name).read_bytes()
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    ids = [AutoTokenizer.from_pretrained(place)("a b").input_ids for place in (folder, tiny)]
    assert ids[0] == ids[1]


def test_the_gpu_engine_reads_the_folder(trained_full, tiny) -> None:
    """What tuned-bf16-gpu and tuned-nf4-gpu do with it, on the CPU: tokenizer, template, end tokens and weights."""
    from petool_lite.inference.gpu import load_causal_model, stop_ids
    from petool_lite.prompt.render import chat_from_directory

    folder = trained_full / "model"
    mine, theirs = chat_from_directory(folder), chat_from_directory(tiny)
    assert (mine.template_sha256, mine.eos_id) == (theirs.template_sha256, theirs.eos_id)
    assert stop_ids(folder, mine) == stop_ids(tiny, theirs)
    for precision in ("bf16", "nf4"):
        model = load_causal_model(folder, None, precision, "cpu")
        assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_it_is_loaded_to_learn_in_float32_with_checkpointing_where_asked(tiny) -> None:
    """Before the trainer touches it, so that the dry step takes what training will take."""
    for checkpointing in (False, True):
        model, _ = load_model(demo("train.method=full"), resolve_base(str(tiny)), checkpointing)
        assert {(weight.dtype, weight.requires_grad) for weight in model.parameters()} == {(torch.float32, True)}
        assert model.config._attn_implementation == PACKED
        assert [layer.training and layer.gradient_checkpointing for layer in model.model.layers] == [checkpointing] * 2


def test_a_second_stage_starts_from_the_model_as_its_base(trained_full) -> None:
    with pytest.raises(PetoolError, match="has no adapter: all its weights learned") as error:
        dry_run(demo(f"model.adapter={trained_full}"))
    taken = error.value.hint.partition("model.base=")[2]
    assert taken == str(trained_full / "model")
    assert dry_run(demo(f"model.base={taken}"))["kept"] == 4
