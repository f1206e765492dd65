"""A base that came as a GGUF file, written out once as a directory in Hugging Face format for training."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from petool_lite.errors import PetoolError
from petool_lite.families import FAMILIES, gguf_name, reordered_heads, shape_of, tensor_shapes
from petool_lite.gguf_header import check_gguf
from petool_lite.places import cache_place
from petool_lite.runs import draft

# The layout of the written directory; part of the cache key, so that a changed writer never reads an old copy.
_VERSION = 3
_ELSEWHERE = "train from the model's own directory"


def unpacked(gguf: Path, report: Callable[[str], None]) -> Path:
    """The directory made of `gguf` (all parts of a split one), written into the cache if it is not there yet. Raises
    PetoolError for a model that is not of the Llama family, and for one that lacks or holds what training cannot do
    with."""
    from filelock import FileLock

    from petool_lite.models import files_sha256

    target = cache_place("bases", f"{gguf.stem}-{files_sha256(check_gguf(gguf))[:16]}-v{_VERSION}")
    if not (target / "config.json").is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f".{target.name}.lock")):
            if not (target / "config.json").is_file():  # another process may have been at it
                report(f"unpacking {gguf.name} for training (once)")
                with draft(target) as folder:
                    folder.mkdir()
                    _write_directory(gguf, folder)
    return target


def open_gguf(path: Path, checked: bool = False) -> Any:
    """A gguf.GGUFReader over a memory map of the file (of a split one, its first part); PetoolError if damaged."""
    from gguf import GGUFReader

    if not checked:
        check_gguf(path)
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, OSError, MemoryError, UnicodeDecodeError) as error:
        raise PetoolError(f"damaged GGUF file: {path} ({error})", "get or export the file again") from error


def gguf_fields(reader: Any) -> dict[str, Any]:
    """All metadata of a gguf.GGUFReader as plain Python values, without the reader's own GGUF.* rows. Raises
    PetoolError for a text that is not UTF-8."""
    try:
        return {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    except UnicodeDecodeError as error:
        what = f"damaged GGUF file: a text is not UTF-8 ({error})"
        raise PetoolError(what, "get or export the file again") from error


class _Fields:
    """A GGUF file's metadata, whose missing keys are named."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path, self.values = path, values
        self.tokens: list[str] = self.needed("tokenizer.ggml.tokens", list)

    def needed(self, key: str, kind: type) -> Any:
        """The value of `key`, which must be there and of `kind`."""
        if key not in self.values:
            raise PetoolError(f"{self.path} lacks the key {key}, without which it cannot be trained on", _ELSEWHERE)
        if not isinstance(self.values[key], kind):
            raise PetoolError(f"{self.path}: {key} is no {kind.__name__}", _ELSEWHERE)
        return self.values[key]

    def special(self, name: str) -> int | None:
        """The ID of a special token; one beyond the vocabulary counts as unset, as in llama.cpp."""
        found = self.values.get(f"tokenizer.ggml.{name}_token_id")
        return found if isinstance(found, int) and 0 <= found < len(self.tokens) else None

    def tokens_by_role(self) -> dict[str, int]:
        """IDs of bos, eos, unk and pad, as far as they are set. What pads is not the end, or training frameworks would
        mask the end away or add a token."""
        found = {short: self.special(name) for short, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"))}
        end = found["eos"]
        if end is None:
            raise PetoolError(f"{self.path} lacks the key tokenizer.ggml.eos_token_id: no answer would end", _ELSEWHERE)
        pads = (self.special("padding"), found["unk"], found["bos"], 0, 1)
        found["pad"] = next(index for index in pads if index not in (None, end))
        return {role: index for role, index in found.items() if index is not None}


def _write_directory(gguf: Path, target: Path) -> None:
    import torch
    from gguf.quants import dequantize
    from safetensors.torch import save_file

    readers = [open_gguf(part, checked=True) for part in check_gguf(gguf)]
    fields = _Fields(gguf, gguf_fields(readers[0]))
    if fields.values.get("general.architecture") != "llama":
        what = f"{gguf} is not of the Llama family: {fields.values.get('general.architecture')}"
        raise PetoolError(what, f"only Llama is read from a GGUF file; {_ELSEWHERE}")
    found = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
    config = _config(fields, tied="output.weight" not in found)
    shape, tensors = shape_of(config), {}
    names = {gguf_name(name, FAMILIES[0]): name for name in tensor_shapes(shape)}
    if odd := found.keys() ^ names.keys():
        raise PetoolError(f"{gguf} has other tensors than a plain Llama, such as {min(odd)}", _ELSEWHERE)
    for tensor in found.values():
        name = names[tensor.name]
        try:
            weight = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise PetoolError(f"{gguf}: {tensor.name} is of a type that is not read ({error})", _ELSEWHERE) from error
        if heads := reordered_heads(name, shape):  # llama.cpp interleaves their rotary pairs
            weight = weight.reshape(heads, len(weight) // heads // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)
        tensors[name] = torch.from_numpy(weight.copy()).to(torch.bfloat16)
    _write_tokenizer(fields, target)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(config, indent=2))


def _config(fields: _Fields, tied: bool) -> dict[str, Any]:
    values, width, roles = fields.values, fields.needed("llama.embedding_length", int), fields.tokens_by_role()
    heads = fields.needed("llama.attention.head_count", int)
    size = values.get("llama.attention.key_length", width // max(1, heads))
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if values.get(key, size) != size:
            raise PetoolError(f"{fields.path}: {key} is {values[key]}, a head has {size}", _ELSEWHERE)
    if (kind := values.get("llama.rope.scaling.type", "none")) not in ("none", "linear"):
        raise PetoolError(f"{fields.path} scales rotary positions by {kind}, which cannot be trained", _ELSEWHERE)
    factor = fields.needed("llama.rope.scaling.factor", float) if kind == "linear" else None
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "vocab_size": len(fields.tokens),
        "hidden_size": width,
        "intermediate_size": fields.needed("llama.feed_forward_length", int),
        "num_hidden_layers": fields.needed("llama.block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": values.get("llama.attention.head_count_kv", heads),
        "head_dim": size,
        "max_position_embeddings": fields.needed("llama.context_length", int),
        "rms_norm_eps": fields.needed("llama.attention.layer_norm_rms_epsilon", float),
        "rope_theta": float(values.get("llama.rope.freq_base", 10000.0)),
        "rope_scaling": factor and {"rope_type": kind, "factor": factor},
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        **{f"{role}_token_id": roles.get(role) for role in ("bos", "eos", "pad")},
    }


def _write_tokenizer(fields: _Fields, target: Path) -> None:
    """Write tokenizer.json and its config from GGUF metadata. Built here because transformers' own GGUF reader drops
    the digit-splitting pre-tokenizer and picks another end token. The "smollm" pre-tokenizer splits single digits and
    then words as GPT-2 does."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    model, splitter = (fields.values.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if (model, splitter) != ("gpt2", "smollm"):
        raise PetoolError(f"tokenizer {model}/{splitter} cannot be read from a GGUF", _ELSEWHERE)
    tokens = fields.tokens
    merges = [tuple(merge.split(" ")) for merge in fields.needed("tokenizer.ggml.merges", list)]
    tokenizer = Tokenizer(BPE({token: index for index, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields.needed("tokenizer.ggml.token_type", list)
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(target / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{role}_token": tokens[index] for role, index in fields.tokens_by_role().items()},
        "add_bos_token": bool(fields.values.get("tokenizer.ggml.add_bos_token", False)),
        "chat_template": fields.needed("tokenizer.chat_template", str),
        "model_max_length": fields.needed("llama.context_length", int),
        "clean_up_tokenization_spaces": False,
    }
    (target / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False))
