"""Bases that cannot be trained are refused before anything of theirs is loaded; a GGUF file as a base, lies too."""

import json
import shutil
from pathlib import Path

import pytest
from support_gguf import change, refused, write_gguf

from petool_lite.export import load_source, write_targets
from petool_lite.gguf_header import check_gguf
from petool_lite.inference.llama import LlamaModel
from petool_lite.models import resolve_base

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
REFUSED = [
    *(({name: None}, f"lacks the key {name.replace('__', '.')}")
      for name in ("tokenizer__chat_template", "tokenizer__ggml__merges", "llama__attention__head_count")),
    ({"llama__rope__scaling__type": "yarn"}, "scales rotary positions by yarn"),
    ({"llama__rope__scaling__type": "linear"}, "lacks the key llama.rope.scaling.factor"),
    ({"llama__rope__dimension_count": 8}, "llama.rope.dimension_count is 8, a head has 16"),
    ({"extra": "rope_freqs.weight"}, "has other tensors than a plain Llama, such as rope_freqs.weight"),
    ({"tokenizer__ggml__pre": "qwen2"}, "tokenizer gpt2/qwen2 cannot be read"),
    ({"llama__attention__head_count_kv": 3}, "do not go together"),
    ({"tokenizer__ggml__tokens": ["a", "a"], "tokenizer__ggml__token_type": [1, 1]}, "token occurs twice"),
    ({"tokenizer__ggml__token_type": [1]}, "258 tokens, but 1 of their token_type"),
]  # fmt: skip


@pytest.fixture
def model(tiny, tmp_path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


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


def test_pickled_weights_remote_code_an_adapter_beside_the_model_and_what_is_no_model(model) -> None:
    last = (model / "model.safetensors").rename(model / "other.safetensors")  # no name that is loaded
    for name in ("pytorch_model.bin", "consolidated.00.pth"):
        shutil.copy(last, model / name)
        assert f"only the pickled {name}" in refused(model)
        (model / name).unlink()
    last.rename(model / "model.safetensors")
    change(model / "tokenizer_config.json", auto_map={"AutoTokenizer": "modeling_evil.Evil"})
    assert "code of its own (auto_map in tokenizer_config.json)" in refused(model)
    (model / "adapter_config.json").write_text("{}")
    assert "holds an adapter beside the model" in refused(model)
    (model / "config.json").write_text("{")
    assert "config.json is not JSON" in refused(model)
    (model / "config.json").unlink()
    assert "config.json is missing" in refused(model)


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


def test_the_parts_of_a_split_file_are_joined_and_one_alone_is_refused_by_name(tmp_path) -> None:
    from safetensors.torch import load_file

    whole = resolve_base(str(write_gguf(tmp_path / "m.gguf")))
    write_gguf(tmp_path / "s.gguf", split=5)
    first, second, third = sorted(tmp_path.glob("s-*.gguf"))
    assert check_gguf(first) == [first, second, third]
    joined = resolve_base(str(first))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (joined.directory / name).read_text() == (whole.directory / name).read_text()
    one, other = (load_file(base.directory / "model.safetensors") for base in (whole, joined))
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)
    write_targets(load_source(joined), {"f16": tmp_path / "out.gguf"})  # a whole file again
    assert check_gguf(tmp_path / "out.gguf") == [tmp_path / "out.gguf"]

    assert f"{second} is part 2 of 3 of a split model | give the first one: {first}" in refused(second)
    lost = f"no such file: {tmp_path}/s.gguf | give the first part of the split model: {first}"
    assert lost in refused(tmp_path / "s.gguf")
    shutil.copy(second, third)
    assert "the others are not of the same model" in refused(first)
    third.unlink()
    assert f"{third.name} is not beside it" in refused(first)


def test_it_is_known_by_its_first_bytes(tmp_path) -> None:
    blob = tmp_path / "sha256-aa11"
    blob.symlink_to(write_gguf(tmp_path / "m.gguf"))
    found = resolve_base(str(blob))
    assert (found.gguf, (found.directory / "model.safetensors").is_file()) == (blob, True)
    (tmp_path / "text").write_text("hello")
    assert "not a GGUF file" in refused(tmp_path / "text")
    for odd in ("x" * 5000, "a\0b", "owner/" + "y" * 300):  # names that no file can have
        assert refused(odd)


def test_a_special_token_beyond_the_vocabulary_counts_as_unset(tmp_path) -> None:
    names = ("bos", "unknown", "padding", "seperator", "mask", "eot")
    path = write_gguf(tmp_path / "m.gguf", **{f"tokenizer__ggml__{name}_token_id": 258 for name in names})
    config = json.loads((resolve_base(str(path)).directory / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (None, 257, 0)
    path = write_gguf(tmp_path / "n.gguf", tokenizer__ggml__eos_token_id=2**32 - 1)
    assert "lacks the key tokenizer.ggml.eos_token_id" in refused(path)
    with LlamaModel(path, vocab_only=True) as model:
        assert model.chat().eos_token == "<|end|>"  # llama.cpp knows it by its text


def test_what_lacks_something_or_what_training_would_drop_is_refused(tmp_path) -> None:
    for number, (changes, told) in enumerate(REFUSED):
        assert told in refused(write_gguf(tmp_path / f"{number}.gguf", **changes)), changes
