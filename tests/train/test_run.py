"""What a run of the real command line leaves, with a tiny model, and what a second stage makes of it."""

import json

import pytest
import torch
from PIL import Image
from support import rows_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from petool_lite.data.files import load_dataset
from petool_lite.data.openai import entry_messages, tool_json
from petool_lite.errors import PetoolError
from petool_lite.prompt.render import Layout, chat_from_directory, prompt_text
from petool_lite.recipe import load_recipe
from petool_lite.train import dry_run


def test_a_run_explains_itself(trained, tiny) -> None:
    manifest = json.loads((trained / "manifest.json").read_text())
    assert manifest["data"]["kept"] == 20
    assert manifest["base"]["name"] == str(tiny)
    assert manifest["versions"]["unsloth"]
    rows = rows_of(trained)
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert all(row["grad_norm"] > 0 for row in rows)
    assert (manifest["steps"], manifest["adapter_step"], manifest["evaluation"]) == (10, 10, None)
    left = {"recipe.toml", "resume.json", "manifest.json", "metrics.jsonl", "loss.png", "train.log", "checkpoints"}
    assert {path.name for path in trained.iterdir()} == left | {"adapter", "tensorboard"}
    with Image.open(trained / "loss.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
    assert colours >= {(31, 119, 180), (127, 127, 127)}, "curves of the loss and of the learning rate"
    (events,) = (trained / "tensorboard").glob("events*")
    assert events.read_bytes().count(b"train/loss") == 10


def test_peft_loads_the_adapter_which_brings_the_template_that_it_was_trained_on(trained, tiny) -> None:
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(model, trained / "adapter")
    assert any("lora_B" in name and parameter.abs().max() > 0 for name, parameter in tuned.named_parameters())
    entry = load_dataset("demo:train:20").entries[3]
    tokenizer = AutoTokenizer.from_pretrained(trained / "adapter")
    tools = [tool_json(tool) for tool in entry.tools]
    text = tokenizer.apply_chat_template(entry_messages(entry), tools=tools, tokenize=False, add_generation_prompt=True)
    assert text == prompt_text(chat_from_directory(tiny), entry, Layout("petool", 8192, "trim-history"))


def test_a_run_leaves_a_model_that_transformers_loads_and_a_second_stage_starts_from(trained_full, tiny) -> None:
    from safetensors.torch import load_file

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
