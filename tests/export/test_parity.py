"""Whole files equal what llama.cpp's own quantizer writes from the same weights, byte for byte."""

import pytest
from petool_lite.export import load_source, write_targets
from petool_lite.export.quantize import TYPES
from support_gguf import logits_of, write_gguf

from petool_lite.models import resolve_base
from petool_lite.prompt.render import chat_from_directory

SHAPES = {
    "tied, grouped heads": {"num_hidden_layers": 9},
    "untied": {"num_hidden_layers": 3, "tie_word_embeddings": False},
    "narrow rows fall back": {"hidden_size": 192, "intermediate_size": 288, "num_attention_heads": 3,
                              "num_key_value_heads": 3, "head_dim": 64},
    "four heads a group": {"num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2},
}  # fmt: skip
GGUF = ["small.gguf", pytest.param("smollm2-135m", marks=pytest.mark.slow)]


@pytest.mark.parametrize("name", [*SHAPES, *GGUF])
def test_every_type_is_what_the_quantizer_writes(
    tiny_model, llama3_tokenizer, llama_quantize, tmp_path, monkeypatch, name
) -> None:
    monkeypatch.chdir(tmp_path)
    write_gguf(tmp_path / "small.gguf")
    base = str(tiny_model(llama3_tokenizer, **SHAPES[name])) if name in SHAPES else name
    ours = {kind: tmp_path / f"{kind}.gguf" for kind in TYPES}
    write_targets(load_source(resolve_base(base)), ours, {"petool_lite.setting": "rating"})
    for kind, path in ours.items():  # of bf16 nothing is lost
        wanted = llama_quantize(ours["bf16"], tmp_path / "wanted.gguf", kind)
        assert path.read_bytes() == wanted.read_bytes(), kind


@pytest.mark.parametrize("name", GGUF)
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
