"""What a run of the real command line leaves, with a tiny model."""

import json

from PIL import Image
from support import rows_of

from petool_lite.data.files import load_dataset
from petool_lite.data.openai import entry_messages, tool_json
from petool_lite.prompt.render import Layout, chat_from_directory, prompt_text


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


def test_an_absent_tracker_is_refused_before_anything_is_loaded(command, tmp_path) -> None:
    for name, said in (("tensorboard,clearml", "clearml is not installed"), ("tensorbord", "unknown tracker")):
        result = command("train", "demo", "--dry-run", "--set", f"train.report_to={name}", cwd=tmp_path, inline=True)
        assert (result.returncode, said in result.stderr) == (1, True), result.stderr


def test_peft_loads_the_adapter_which_brings_the_template_that_it_was_trained_on(trained, tiny) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(model, trained / "adapter")
    assert any("lora_B" in name and parameter.abs().max() > 0 for name, parameter in tuned.named_parameters())
    entry = load_dataset("demo:train:20").entries[3]
    tokenizer = AutoTokenizer.from_pretrained(trained / "adapter")
    tools = [tool_json(tool) for tool in entry.tools]
    text = tokenizer.apply_chat_template(entry_messages(entry), tools=tools, tokenize=False, add_generation_prompt=True)
    assert text == prompt_text(chat_from_directory(tiny), entry, Layout("petool", 8192, "trim-history"))
