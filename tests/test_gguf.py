"""A GGUF file as a base: whole or in parts, known by its first bytes, missing keys named, lies of its header too."""

import json
import shutil

from petool_lite.export import load_source, write_targets
from support_gguf import refused, write_gguf

from petool_lite.gguf_header import check_gguf
from petool_lite.inference.llama import LlamaModel
from petool_lite.models import resolve_base


def test_the_parts_of_a_split_file_are_joined(tmp_path) -> None:
    from safetensors.torch import load_file

    whole = resolve_base(str(write_gguf(tmp_path / "m.gguf")))
    write_gguf(tmp_path / "s.gguf", split=5)
    parts = sorted(tmp_path.glob("s-*.gguf"))
    assert check_gguf(parts[0]) == parts
    assert len(parts) == 3
    joined = resolve_base(str(parts[0]))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (joined.directory / name).read_text() == (whole.directory / name).read_text()
    one, other = (load_file(base.directory / "model.safetensors") for base in (whole, joined))
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)
    write_targets(load_source(joined), {"f16": tmp_path / "out.gguf"}, {})  # a whole file again
    assert check_gguf(tmp_path / "out.gguf") == [tmp_path / "out.gguf"]


def test_a_part_is_refused_by_name(tmp_path) -> None:
    write_gguf(tmp_path / "s.gguf", split=5)
    first, second, third = sorted(tmp_path.glob("s-*.gguf"))
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


REFUSED = [
    *(({name: None}, f"lacks the key {name.replace('__', '.')}")
      for name in ("tokenizer__chat_template", "tokenizer__ggml__merges", "llama__attention__head_count")),
    ({"llama__rope__scaling__type": "yarn"}, "scales rotary positions by yarn"),
    ({"llama__rope__scaling__type": "linear"}, "lacks the key llama.rope.scaling.factor"),
    ({"llama__rope__dimension_count": 8}, "llama.rope.dimension_count is 8, a head has 16"),
    ({"extra": "rope_freqs.weight"}, "has other tensors than a plain Llama, such as rope_freqs.weight"),
    ({"extra": "blk.0.attn_q.bias"}, "such as blk.0.attn_q.bias"),
    ({"tokenizer__ggml__pre": "qwen2"}, "tokenizer gpt2/qwen2 cannot be read"),
    ({"llama__attention__head_count_kv": 3}, "do not go together"),
    ({"tokenizer__ggml__tokens": ["a", "a"], "tokenizer__ggml__token_type": [1, 1]}, "token occurs twice"),
    ({"tokenizer__ggml__token_type": [1]}, "258 tokens, but 1 of their token_type"),
]  # fmt: skip


def test_what_lacks_something_or_what_training_would_drop_is_refused(tmp_path) -> None:
    for number, (changes, told) in enumerate(REFUSED):
        assert told in refused(write_gguf(tmp_path / f"{number}.gguf", **changes)), changes
