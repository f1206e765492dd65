"""Whole files equal what llama.cpp's own quantizer writes from the same merged weights, byte for byte."""

import pytest
from petool_lite.export import load_source, write_targets
from petool_lite.export.gguf import file_order, permute
from petool_lite.export.merge import load_adapter
from petool_lite.export.quantize import TYPES
from support_gguf import logits_of, write_gguf

from petool_lite.families import FAMILIES, gguf_name
from petool_lite.gguf_base import gguf_fields, open_gguf
from petool_lite.models import resolve_base
from petool_lite.prompt.render import chat_from_directory


def float32_gguf(model, like, config, target) -> None:
    """Write `model` (transformers) as a float32 GGUF with the keys of the file `like`: the quantizer's input."""
    import gguf

    reader = open_gguf(like)
    writer = gguf.GGUFWriter(target, "llama")
    for key, value in gguf_fields(reader).items():
        if key not in ("general.architecture", "general.file_type", "general.quantization_version"):
            kinds = reader.fields[key].types
            writer.add_key_value(key, value, kinds[0], sub_type=kinds[1] if len(kinds) > 1 else None)
    writer.add_file_type(0)
    tensors = {tensor.name: tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight"}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            query = name.endswith("q_proj.weight")
            weight = permute(weight, config.num_attention_heads if query else config.num_key_value_heads)
        tensors[gguf_name(name, FAMILIES[0])] = weight.float().contiguous().numpy()
    for name in sorted(tensors, key=file_order):
        writer.add_tensor(name, tensors[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


SHAPES = {
    "tied, grouped heads": {"num_hidden_layers": 9},
    "untied": {"num_hidden_layers": 3, "tie_word_embeddings": False},
    "narrow rows fall back": {"hidden_size": 192, "intermediate_size": 288, "num_attention_heads": 3,
                              "num_key_value_heads": 3, "head_dim": 64},
    "four heads a group": {"num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2},
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_every_type_is_what_the_quantizer_writes(
    tiny_model, llama3_tokenizer, make_adapter, llama_quantize, tmp_path, shape
) -> None:
    directory = tiny_model(llama3_tokenizer, **SHAPES[shape])
    model = make_adapter(directory, tmp_path / "adapter").merge_and_unload()
    source = load_source(resolve_base(str(directory)), load_adapter(tmp_path / "adapter"))
    ours = {name: tmp_path / f"{name}.gguf" for name in TYPES}
    write_targets(source, ours, {"petool_lite.setting": "rating"})
    float32_gguf(model, ours["bf16"], model.config, tmp_path / "f32.gguf")
    for name, path in ours.items():
        wanted = llama_quantize(tmp_path / "f32.gguf", tmp_path / "wanted.gguf", name)
        assert path.read_bytes() == wanted.read_bytes(), name


@pytest.mark.parametrize("name", ["small.gguf", pytest.param("smollm2-135m", marks=pytest.mark.slow)])
def test_a_base_from_gguf_is_what_the_quantizer_writes(llama_quantize, tmp_path, monkeypatch, name) -> None:
    monkeypatch.chdir(tmp_path)
    write_gguf(tmp_path / "small.gguf")
    ours = {kind: tmp_path / f"{kind}.gguf" for kind in ("bf16", "q4_k_m")}
    write_targets(load_source(resolve_base(name)), ours, {})
    wanted = llama_quantize(ours["bf16"], tmp_path / "wanted.gguf", "q4_k_m")
    assert ours["q4_k_m"].read_bytes() == wanted.read_bytes()


@pytest.mark.parametrize("name", ["small.gguf", pytest.param("smollm2-135m", marks=pytest.mark.slow)])
def test_the_unpacked_base_computes_what_the_gguf_does(tmp_path, monkeypatch, name) -> None:
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    write_gguf(tmp_path / "small.gguf", llama__rope__scaling__type="linear", llama__rope__scaling__factor=4.0)
    base = resolve_base(name)
    ids = chat_from_directory(base.directory).encode("The quick brown fox jumps over the lazy")
    model = AutoModelForCausalLM.from_pretrained(base.directory, dtype=torch.float32)
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits[0, -1].numpy()
    found = logits_of(base.gguf, ids)
    # llama.cpp rounds activations to 8 bits before it multiplies by 4-bit weights, so this is close, not equal
    assert wanted.argmax() in np.argsort(found)[-3:]
    assert np.corrcoef(found, wanted)[0, 1] > 0.99
