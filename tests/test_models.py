"""Bases that cannot be trained are refused before anything of theirs is loaded."""

import json
import shutil
from pathlib import Path

import pytest
from support_gguf import refused

from petool_lite.models import resolve_base


@pytest.fixture
def model(tiny, tmp_path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def change(file: Path, **keys) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


CONFIGURATIONS = [
    ({"architectures": ["Mllama"]}, "no text model of a known family: Mllama, model_type llama"),
    ({"architectures": []}, "no text model of a known family: no architecture"),
    ({"model_type": "mistral"}, "family: LlamaForCausalLM, model_type mistral | known: Llama, Mistral, Qwen2, Qwen3"),
    ({"attention_bias": True}, "a Llama model with other biases cannot be trained or exported"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "is quantized by gptq;"),
    ({"quantization_config": {"bits": 4}}, "is quantized by something without a name;"),
    ({"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}}, "code of its own (auto_map in config.json)"),
    ({"transformers_weights": "adapter_model.bin"}, "names its weights itself (transformers_weights in config."),
]


def test_a_configuration_of_another_kind_of_model(model) -> None:
    plain = (model / "config.json").read_text()
    for keys, told in CONFIGURATIONS:
        (model / "config.json").write_text(plain)
        change(model / "config.json", **keys)
        assert told in refused(model)
    for config in (None, {"quant_method": "bitsandbytes"}):
        (model / "config.json").write_text(plain)
        change(model / "config.json", quantization_config=config)
        assert resolve_base(str(model)).directory == model


def test_remote_code_of_a_tokenizer_an_adapter_beside_the_model_and_what_is_no_model(model) -> None:
    change(model / "tokenizer_config.json", auto_map={"AutoTokenizer": "modeling_evil.Evil"})
    assert "code of its own (auto_map in tokenizer_config.json)" in refused(model)
    (model / "adapter_config.json").write_text("{}")
    assert "holds an adapter beside the model" in refused(model)
    (model / "config.json").write_text("{")
    assert "config.json is not JSON" in refused(model)
    (model / "config.json").unlink()
    assert "config.json is missing" in refused(model)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickled_weights(model, name) -> None:
    (model / "model.safetensors").rename(model / name)
    shutil.copy(model / name, model / "other.safetensors")  # no name that is loaded
    assert f"only the pickled {name}" in refused(model)


def shard(model: Path, *names: object) -> None:
    """An index that names these files in place of the one file."""
    (model / "model.safetensors").unlink(missing_ok=True)
    weights = {"weight_map": {str(place): name for place, name in enumerate(names)}}
    (model / "model.safetensors.index.json").write_text(json.dumps(weights))


def test_an_index_of_anything_but_safetensors_files_beside_it(model) -> None:
    (model / "pytorch_model.bin").write_bytes(b"")
    shutil.copy(model / "model.safetensors", model.parent / "model.safetensors")
    for name in ("pytorch_model.bin", "../model.safetensors", 1, [], "\ud800.safetensors"):
        shard(model, name)
        assert b"damaged index" in refused(model).encode()  # no half of a surrogate pair
    shard(model)
    assert "it names no file" in refused(model)
    shutil.copy(model.parent / "model.safetensors", model / "model-1.safetensors")
    shard(model, "model-1.safetensors", "model-1.safetensors")
    assert resolve_base(str(model)).directory == model
    shard(model, "model-1.safetensors", "model-2.safetensors")
    assert f"incomplete weights: {model / 'model-2.safetensors'} is missing" in refused(model)
