"""What a Llama model's GGUF file says of it: tensor names and order, keys and tokenizer, as llama.cpp's converter does.

Keys and tensors stand in the order in which llama.cpp's quantizer writes them, so that whole files can be compared.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petool_lite.export.quantize import tensor_bytes
from petool_lite.export.tensor_types import FILE_TYPES
from petool_lite.export.tokenizer import add_tokenizer

from petool_lite.errors import PetoolError
from petool_lite.models import BLOCK_TENSORS, TOP_TENSORS, Base, gguf_fields, open_gguf

_BLOCK_NAMES = {module: name for name, module in BLOCK_TENSORS.items()}
_TOP_NAMES = {module: name for name, module in TOP_TENSORS.items()}
# Keys that describe the file's weights, not the model; the quantizer sets them last.
_OWN_KEYS = ("general.architecture", "general.file_type", "general.quantization_version")
ROPE = "rope_freqs.weight"


def gguf_name(name: str) -> str:
    """`model.layers.3.self_attn.q_proj.weight` -> `blk.3.attn_q.weight`; raises PetoolError for an unknown one."""
    stem = name.removesuffix(".weight")
    block = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    if block and block[2] in _BLOCK_NAMES:
        return f"blk.{block[1]}.{_BLOCK_NAMES[block[2]]}.weight"
    if stem in _TOP_NAMES:
        return f"{_TOP_NAMES[stem]}.weight"
    raise PetoolError(f"unknown tensor in the base model: {name}", "only plain Llama models are supported")


def file_order(name: str) -> tuple[int, str]:
    """Sort key of GGUF tensor names: tensors outside the blocks first, then block by block, by name."""
    block = re.match(r"blk\.(\d+)\.", name)
    return (int(block[1]) if block else -1, name)


def permute(weight: Any, heads: int) -> Any:
    """llama.cpp's row order of a q or k projection: rotary pairs side by side. `weight` is (rows, columns)."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


@dataclass(frozen=True)
class Content:
    """A file to be written: GGUF type, tensors (name -> type name, shape) in file order, extra string keys."""

    file_type: str
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    extra: dict[str, str]


def write_header(path: Path, base: Base, config: dict[str, Any], content: Content) -> tuple[dict[str, int], int]:
    """Write everything but the tensors' data; return where each tensor starts and how long the whole file will be."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    sizes = {}
    for name, (kind, shape) in content.tensors.items():
        rows = shape[0] if len(shape) == 2 else 1
        sizes[name] = tensor_bytes(kind, rows, shape[-1])
        stored = shape if kind == "F32" else (*shape[:-1], sizes[name] // rows)  # in bytes, as the writer wants it
        dtype = np.dtype(np.float32 if kind == "F32" else np.uint8)
        raw = None if kind == "F32" else gguf.GGMLQuantizationType[kind]
        writer.add_tensor_info(name, stored, dtype, sizes[name], raw_dtype=raw)
    if base.gguf:
        _copy_metadata(writer, base.gguf)
    else:
        _add_metadata(writer, config, base)
        add_tokenizer(writer, base.directory, config["vocab_size"])
    for key, value in content.extra.items():
        writer.add_string(key, value)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(FILE_TYPES[content.file_type][0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    position = writer.ggml_pad(path.stat().st_size, writer.data_alignment)
    starts = {}
    for name, size in sizes.items():
        starts[name] = position
        position += writer.ggml_pad(size, writer.data_alignment)
    return starts, position


def _copy_metadata(writer: Any, source: Path) -> None:
    """Carry over every key of a GGUF base, tokenizer included, but those that describe its weights' types."""
    reader = open_gguf(source)
    for key, value in gguf_fields(reader).items():
        if key not in _OWN_KEYS:
            kinds = reader.fields[key].types
            writer.add_key_value(key, value, kinds[0], sub_type=kinds[1] if len(kinds) > 1 else None)


def _add_metadata(writer: Any, config: dict[str, Any], base: Base) -> None:
    """The keys that llama.cpp's converter derives from the directory, in its order."""
    import gguf

    writer.add_type(gguf.GGUFType.MODEL)
    counts = writer.get_total_parameter_count()
    about = gguf.Metadata.load(None, base.directory, None, counts[0])
    about.name = about.name or base.directory.name
    about.size_label = about.size_label or gguf.size_label(*counts)
    about.set_gguf_meta_model(writer)
    heads = config["num_attention_heads"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads", heads))
    theta = _rope(config).get("rope_theta")
    if theta is not None:
        writer.add_rope_freq_base(theta)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if config.get("head_dim"):
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings from either place: rope_parameters (transformers 5) or rope_theta and rope_scaling."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if "rope_theta" in config:
        rope.setdefault("rope_theta", config["rope_theta"])
    return rope


def rope_factors(config: dict[str, Any]) -> Any:
    """Llama 3's per-frequency divisors, float32 torch tensor of shape (head_dim / 2,), or None for plain rotary.

    Wavelengths below original_context / high_freq_factor stay, those above original_context / low_freq_factor are
    divided by `factor`, and those between are blended (the rule published with Llama 3.1). Computed in float32, as
    llama.cpp's converter does, to the bit.
    """
    import math

    import torch

    rope = _rope(config)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise PetoolError(f"rotary scaling {kind!r} is not supported", "llama3 and default are")
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    base = rope.get("rope_theta", 10000.0)
    lengths = 2 * math.pi / (1.0 / (base ** (torch.arange(0, size, 2, dtype=torch.float32) / size)))
    context = rope.get("original_max_position_embeddings", 8192)
    low, high, factor = (rope.get("low_freq_factor", 1.0), rope.get("high_freq_factor", 4.0), rope.get("factor", 8.0))
    blend = (context / lengths - low) / (high - low)
    factors = 1 / ((1 - blend) / factor + blend)
    factors = torch.where(lengths > context / low, torch.full_like(factors, factor), factors)
    return torch.where(lengths < context / high, torch.ones_like(factors), factors)
