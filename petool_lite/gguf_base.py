"""A base that came as a GGUF file, written out once as a directory in Hugging Face format for training."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from petool_lite.errors import PetoolError, in_words
from petool_lite.families import gguf_name, reordered_heads, shape_of, tensor_shapes
from petool_lite.gguf_header import check_gguf
from petool_lite.models import files_sha256
from petool_lite.places import cache_place
from petool_lite.runs import draft

# The layout of the written directory; part of the cache key, so that a changed writer never reads an old copy.
_VERSION = 3
_ELSEWHERE, _AGAIN = "train from the model's own directory", "get or export the file again"


def unpacked(gguf: Path, report: Callable[[str], None]) -> Path:
    """The directory made of `gguf`, all parts, in the cache; raises PetoolError for what training cannot do with."""
    from filelock import FileLock

    target = cache_place("bases", f"{gguf.stem}-{files_sha256(check_gguf(gguf))[:16]}-v{_VERSION}")
    if not (target / "config.json").is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f".{target.name}.lock")):
            if not (target / "config.json").is_file():  # another process may have been at it
                report(f"unpacking {gguf.name} for training (once)")
                try:
                    with draft(target) as folder:
                        folder.mkdir()
                        _write_directory(gguf, folder)
                except PetoolError as error:
                    raise PetoolError(f"{gguf}: {error.message}", error.hint) from error
    return target


def open_gguf(path: Path, checked: bool = False) -> Any:
    """A gguf.GGUFReader over a memory map of the file (of a split one, its first part); PetoolError if damaged."""
    from gguf import GGUFReader

    if not checked:
        check_gguf(path)
    with in_words(f"damaged GGUF file: {path}", _AGAIN, ValueError, LookupError, ArithmeticError, OSError, MemoryError):
        return GGUFReader(path)


def gguf_fields(reader: Any) -> dict[str, Any]:
    """All metadata of a gguf.GGUFReader, without its own GGUF.* rows. Raises PetoolError for text that is not UTF-8."""
    with in_words("damaged GGUF file: a text is not UTF-8", _AGAIN, UnicodeDecodeError):
        return {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}


class _Fields(dict[str, Any]):
    """A GGUF file's metadata; a missing key is named."""

    def __missing__(self, key: str) -> Any:
        raise PetoolError(f"it lacks the key {key}, without which it cannot be trained on", _ELSEWHERE)

    def roles(self) -> dict[str, int]:
        """IDs of bos, eos, unk and pad, as far as they are set; one beyond the vocabulary is not, as in llama.cpp. What
        pads is not the end, or training frameworks would mask the end away or add a token."""
        known = range(len(self["tokenizer.ggml.tokens"]))
        named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
        found = {role: self.get(f"tokenizer.ggml.{name}_token_id") for role, name in named.items()}
        found = {role: index if index in known else None for role, index in found.items()}
        if found["eos"] is None:
            self.__missing__("tokenizer.ggml.eos_token_id")
        pads = (found["pad"], found["unk"], found["bos"], 0, 1)
        found["pad"] = next(index for index in pads if index not in (None, found["eos"]))
        return {role: index for role, index in found.items() if index is not None}


def _write_directory(gguf: Path, target: Path) -> None:
    import torch
    from gguf.quants import dequantize
    from safetensors.torch import save_file

    readers = [open_gguf(part, checked=True) for part in check_gguf(gguf)]
    fields = _Fields(gguf_fields(readers[0]))
    if (architecture := fields.get("general.architecture")) != "llama":
        what = f"it is not of the Llama family: {architecture}"
        raise PetoolError(what, f"only Llama is read from a GGUF file; {_ELSEWHERE}")
    model, splitter = (fields.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if (model, splitter) != ("gpt2", "smollm"):
        raise PetoolError(f"tokenizer {model}/{splitter} cannot be read from a GGUF", _ELSEWHERE)
    found = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
    config = _config(fields, tied="output.weight" not in found)
    shape, tensors = shape_of(config), {}
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if fields.get(key, shape.head_size) != shape.head_size:
            raise PetoolError(f"{key} is {fields[key]}, a head has {shape.head_size}", _ELSEWHERE)
    names = {gguf_name(name, shape): name for name in tensor_shapes(shape)}
    if odd := found.keys() ^ names.keys():
        raise PetoolError(f"it has other tensors than a plain Llama, such as {min(odd)}", _ELSEWHERE)
    for tensor in found.values():
        name = names[tensor.name]
        with in_words(f"{tensor.name} is of a type that is not read", _ELSEWHERE, NotImplementedError):
            weight = dequantize(tensor.data, tensor.tensor_type)
        if heads := reordered_heads(name, shape):  # llama.cpp interleaves their rotary pairs
            weight = weight.reshape(heads, len(weight) // heads // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)
        tensors[name] = torch.from_numpy(weight.copy()).to(torch.bfloat16)
    _write_tokenizer(fields, target)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(config, indent=2))


def _config(fields: _Fields, tied: bool) -> dict[str, Any]:
    if (kind := fields.get("llama.rope.scaling.type", "none")) not in ("none", "linear"):
        raise PetoolError(f"it scales rotary positions by {kind}, which cannot be trained", _ELSEWHERE)
    scaling = {"rope_type": kind, "factor": fields["llama.rope.scaling.factor"]} if kind == "linear" else None
    heads, roles = fields["llama.attention.head_count"], fields.roles()
    return {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"},
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", heads),
        "head_dim": fields.get("llama.attention.key_length"),
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": fields["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": float(fields.get("llama.rope.freq_base", 10000.0)),
        **{"rope_scaling": scaling, "tie_word_embeddings": tied, "hidden_act": "silu"},
        **{f"{role}_token_id": roles.get(role) for role in ("bos", "eos", "pad")},
    }


def _write_tokenizer(fields: _Fields, target: Path) -> None:
    """Write tokenizer.json and its config. transformers' own GGUF reader drops the digit-splitting pre-tokenizer
    ("smollm": single digits, then words as GPT-2 splits them) and picks another end token."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

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
        **{f"{role}_token": tokens[index] for role, index in fields.roles().items()},
        "add_bos_token": bool(fields.get("tokenizer.ggml.add_bos_token", False)),
        "chat_template": fields["tokenizer.chat_template"],
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
    }
    (target / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False))
