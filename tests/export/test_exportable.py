"""What export cannot write is refused before training, in words, and what goes wrong in it leaves no file."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from support_gguf import LLAMA3_ROPE, change, refused

from petool_lite.errors import PetoolError
from petool_lite.export import load_source, write_targets
from petool_lite.export.hub import modelfile
from petool_lite.export.source import load_adapter
from petool_lite.families import chat_template, end_tokens
from petool_lite.gguf_base import gguf_fields, open_gguf
from petool_lite.models import resolve_base

TOKEN = {"id": 5000, "content": "[PAD]", "special": True}


@pytest.fixture
def model(small, tmp_path) -> Path:
    return Path(shutil.copytree(small, tmp_path / "model"))


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rotary scaling of the kind yarn"),
        ({"rope_parameters": {"rope_type": "su"}}, "known: default, linear, llama3"),
        ({"rope_scaling": LLAMA3_ROPE | {"low_freq_factor": 4.0}}, "low_freq_factor 4.0"),
        ({"rope_scaling": ["linear"]}, "the rotary scaling is ['linear']"),
        ({"partial_rotary_factor": 0.5}, "a part of each head"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"hidden_act": "gelu"}, "the activation gelu"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is small"),
        ({"num_key_value_heads": 3}, "do not go together"),
        ({"vocab_size": 999}, "by config.json it has [999, 256]"),
        ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight is missing, 9 in all"),
        ({"num_hidden_layers": 1}, "is more than a model of its config.json has"),
        ({"hidden_size": None}, "hidden_size is not there"),
    ],
)
def test_a_configuration_that_no_file_can_hold(model, keys, told) -> None:
    drop = {"rope_parameters": None} if "rope_scaling" in keys or "rope_theta" in keys else {}
    change(model / "config.json", **drop | keys)
    assert told in refused(model)


def test_tensors_that_no_file_can_hold(model) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    file, layer = model / "model.safetensors", "model.layers.0.self_attn.q_proj"
    plain = load_file(file)
    for name, weight, told in (
        (f"{layer}.bias", torch.zeros(256), "q_proj.bias in "),
        (f"{layer}.weight", torch.zeros(256, 256).to(torch.float8_e4m3fn), "has the type F8_E4M3"),
    ):
        save_file(plain | {name: weight}, file, metadata={"format": "pt"})
        assert told in refused(model)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda found: found["model"].update(byte_fallback=True), "that treats spaces by ['Sequence'] cannot"),
        (lambda found: found["model"].update(type="Unigram"), "of the kind Unigram cannot be exported"),
        (lambda found: found.update(normalizer={"type": "NFC"}), "normalizes its text"),
        (lambda found: found.update(pre_tokenizer={"type": "Whitespace"}), "splits text by ['Whitespace']"),
        (lambda found: found["added_tokens"].append(TOKEN), "tokens beyond the"),
        (lambda found: found["added_tokens"].append(TOKEN | {"id": 1, "content": "<|eot_id|>"}), "2 tokens '<|eot"),
        (lambda found: found.update(pre_tokenizer=["ByteLevel"]), "damaged tokenizer: "),
    ],
)
def test_a_tokenizer_that_llama_cpp_would_read_otherwise(model, change, told) -> None:
    file = model / "tokenizer.json"
    change(content := json.loads(file.read_text()))
    file.write_text(json.dumps(content))
    assert told in refused(model)


def test_of_a_list_of_templates_the_default_one_is_taken_and_none_or_no_end_is_refused(model) -> None:
    config = model / "tokenizer_config.json"
    template = json.loads(config.read_text())["chat_template"]
    named = [{"name": "tool_use", "template": f"{template} tools"}, {"name": "default", "template": template}]
    change(config, chat_template=named)
    assert chat_template(model) == template
    write_targets(load_source(resolve_base(str(model))), {"bf16": model / "out.gguf"})
    fields = gguf_fields(open_gguf(model / "out.gguf"))
    found = [fields[f"tokenizer.chat_template{name}"] for name in ("", ".tool_use")]
    assert found == [template, f"{template} tools"]
    for none in (named[:1], 7, None):
        change(config, chat_template=none)
        assert "no chat template" in refused(model)
    change(config, chat_template="{{ messages }}", eos_token=None)
    assert "no end token" in refused(model)
    (model / "chat_template.jinja").write_text("from the file")  # as transformers 5 saves it
    assert chat_template(model) == "from the file"


@pytest.mark.parametrize(
    ("named", "more"), [(None, []), (1, ['"']), ([1, 2, None, True, "x", -1, 10**12], ['"', "#"]), ("text", [])]
)
def test_end_tokens_of_any_generation_settings(model, named, more) -> None:
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    found = list(end_tokens(model))
    assert (found[0], found[len(found) - len(more) :]) == ("<|eot_id|>", more)
    stops = [line for line in modelfile("m.gguf", model, 2048).splitlines() if line.startswith("PARAMETER stop ")]
    assert stops == [f"PARAMETER stop {json.dumps(text)}" for text in found]


def not_written(directory, adapter, tmp_path) -> PetoolError:
    """The error of exporting to tmp_path/out, which must stay empty."""
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    with pytest.raises(PetoolError) as error:
        source = load_source(resolve_base(str(directory)), load_adapter(adapter) if adapter else None)
        write_targets(source, {"q4_k_m": out / "model.q4_k_m.gguf"})
    assert list(out.iterdir()) == []
    assert error.value.exit_code == 1
    assert error.value.hint
    return error.value


def test_an_idle_or_foreign_adapter(tiny_model, llama3_tokenizer, small, make_adapter, tmp_path) -> None:
    make_adapter(small, tmp_path / "idle", scale=0.0)
    assert "untrained" in not_written(small, tmp_path / "idle", tmp_path).hint
    make_adapter(small, tmp_path / "faint", scale=1e-30)
    assert "0 tensors changed, but the adapter has 14" in not_written(small, tmp_path / "faint", tmp_path).message
    make_adapter(tiny_model(llama3_tokenizer, intermediate_size=768, num_hidden_layers=3), tmp_path / "other")
    assert "another base" in not_written(small, tmp_path / "other", tmp_path).hint


def test_a_damaged_base_is_not_written(tuned, tmp_path) -> None:
    import torch
    from safetensors.torch import load, save_file

    file = shutil.copytree(tuned[0], tmp_path / "base") / "model.safetensors"
    raw, name = file.read_bytes(), "model.layers.1.mlp.up_proj.weight"
    file.write_bytes(raw[:-1000])
    assert "damaged weights" in not_written(file.parent, tuned[1], tmp_path).message
    (weights := load(raw))[name][3, 5] = torch.nan
    save_file(weights, file)
    assert f"{name} holds values that are not finite" in not_written(file.parent, tuned[1], tmp_path).message


def test_a_full_disk_is_said_before_and_one_that_fills_up_is_cleaned_up(small, tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(tmp_path)
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        assert "GiB free, the export needs" in not_written(small, None, tmp_path).message
    real, calls = os.pwrite, []

    def full(*arguments):
        calls.append(1)
        if len(calls) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(os, "pwrite", full)
    assert "nothing of it is left (No space left on device)" in not_written(small, None, tmp_path).message
