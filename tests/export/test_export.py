"""Exported files against transformers: same weights, same logits, same tokenizer."""

import pytest
from petool_lite.export import load_source, write_targets
from petool_lite.export.merge import load_adapter
from support_gguf import LLAMA3_ROPE, logits_of, write_gguf

from petool_lite.models import resolve_base
from petool_lite.prompt.render import chat_from_directory


@pytest.mark.parametrize(("rope", "tied"), [("llama3", False), ("linear", True)])
def test_the_merged_file_gives_the_logits_of_the_merged_model(
    tiny_model, llama3_tokenizer, make_adapter, tmp_path, rope, tied
) -> None:
    import numpy as np
    import torch

    changes = {"tie_word_embeddings": tied}
    if rope == "linear":
        changes["rope_parameters"] = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    if rope == "llama3":
        # a short original context, so that 200 positions fall into all three bands of the scaling rule
        changes["rope_parameters"] = LLAMA3_ROPE | {"original_max_position_embeddings": 64}
    directory = tiny_model(llama3_tokenizer, **changes)
    model = make_adapter(directory, tmp_path / "adapter").merge_and_unload().to(torch.bfloat16).float()
    target = tmp_path / "model.bf16.gguf"
    source = load_source(resolve_base(str(directory)), load_adapter(tmp_path / "adapter"))
    changes = write_targets(source, {"bf16": target}, {"petool_lite.setting": "rating"})
    assert len(changes) == 2 * 7
    assert all(change.changed and 0 < change.delta < 10 * change.base for change in changes.values())
    ids = [int(i) for i in torch.randint(0, 500, (200,), generator=torch.Generator().manual_seed(2))]
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits[0, -1].numpy()
    found = logits_of(target, ids)
    assert found.argmax() == wanted.argmax()
    assert np.abs(found - wanted).max() < 0.03 * np.abs(wanted).max()


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
