"""Write a Llama-family model as a bfloat16 GGUF file, tensor by tensor, with the right metadata and tokenizer."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from petool_lite.export.merge import Adapter, merged
from petool_lite.export.tokenizer import add_tokenizer

from petool_lite.base import BLOCK_TENSORS, TOP_TENSORS, Base, gguf_fields, open_gguf
from petool_lite.console import Report
from petool_lite.errors import PetoolError

_BLOCK_NAMES = {module: name for name, module in BLOCK_TENSORS.items()}
_TOP_NAMES = {module: name for name, module in TOP_TENSORS.items()}


def gguf_name(name: str) -> str:
    """`model.layers.3.self_attn.q_proj.weight` -> `blk.3.attn_q.weight`; raises PetoolError for an unknown one."""
    stem = name.removesuffix(".weight")
    block = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    if block and block[2] in _BLOCK_NAMES:
        return f"blk.{block[1]}.{_BLOCK_NAMES[block[2]]}.weight"
    if stem in _TOP_NAMES:
        return f"{_TOP_NAMES[stem]}.weight"
    raise PetoolError(f"unknown tensor in the base model: {name}", "only plain Llama models are supported")


def permute(weight: Any, heads: int) -> Any:
    """llama.cpp's row order of a q or k projection: rotary pairs side by side. `weight` is (rows, columns)."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def write_gguf(base: Base, adapter: Adapter | None, extra: dict[str, str], target: Path, report: Report) -> int:
    """Write base (+ adapter) to `target` as bfloat16, one tensor in memory at a time.

    Returns how many tensors the adapter changed. Raises PetoolError for a damaged base or a foreign adapter.
    """
    import gguf
    import torch

    config = json.loads((base.directory / "config.json").read_text())
    writer = gguf.GGUFWriter(target, "llama")
    if base.gguf:
        _copy_metadata(writer, base.gguf)
    else:
        _add_metadata(writer, config, base)
        add_tokenizer(writer, base.directory, config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    for key, value in extra.items():
        writer.add_string(key, value)
    tensors = list(_tensors(base.directory, config))
    strangers = set(adapter.modules) - {name for name, _, _ in tensors} if adapter else set()
    if strangers:
        raise PetoolError(
            f"the adapter changes {min(strangers)}, which the base {base.name} does not have",
            "the adapter belongs to another base model",
        )
    factors = rope_factors(config)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for name, shape, _ in tensors:
        _announce(writer, gguf, name, shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    changed = 0
    for number, (name, _, load) in enumerate(tensors, 1):
        weight, different = merged(load(), name, adapter)
        changed += different
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = "num_attention_heads" if "q_proj" in name else "num_key_value_heads"
            weight = permute(weight, config[heads])
        raw = weight if weight.dim() == 1 else weight.to(torch.bfloat16).view(torch.uint8)
        writer.write_tensor_data(raw.contiguous().numpy())
        report("merging" if adapter else "writing the base as GGUF", number, len(tensors), name.removeprefix("model."))
    writer.close()
    return changed


def _announce(writer: Any, gguf: Any, name: str, shape: tuple[int, ...]) -> None:
    import numpy as np

    if len(shape) == 1:
        writer.add_tensor_info(gguf_name(name), shape, np.dtype(np.float32), 4 * shape[0])
    else:
        width = (shape[0], 2 * shape[1])  # in bytes, as the writer wants it for types that numpy lacks
        kind = gguf.GGMLQuantizationType.BF16
        writer.add_tensor_info(gguf_name(name), width, np.dtype(np.uint8), width[0] * width[1], raw_dtype=kind)


def _tensors(directory: Path, config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...], Any]]:
    """Every tensor of the safetensors files: name, shape, and a function that reads it."""
    from safetensors import SafetensorError, safe_open

    def reader(file: Path, name: str) -> Any:
        def read() -> Any:
            with safe_open(file, framework="pt") as opened:
                return opened.get_tensor(name)

        return read

    for file in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                names = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise PetoolError(f"damaged weights: {file} ({error})", "get the base model again") from error
        for name, shape in names.items():
            if name == "lm_head.weight" and config.get("tie_word_embeddings"):
                continue
            yield name, shape, reader(file, name)


def _copy_metadata(writer: Any, source: Path) -> None:
    """Carry over every key of a GGUF base, tokenizer included, but those that describe its weights' types."""
    reader = open_gguf(source)
    values = gguf_fields(reader)
    for key, value in values.items():
        if key in ("general.architecture", "general.file_type", "general.quantization_version"):
            continue
        kinds = reader.fields[key].types
        writer.add_key_value(key, value, kinds[0], sub_type=kinds[1] if len(kinds) > 1 else None)


def _add_metadata(writer: Any, config: dict[str, Any], base: Base) -> None:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    writer.add_name(base.directory.name)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(_rope(config)["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings from either place: rope_parameters (transformers 5) or rope_theta and rope_scaling."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    return rope


def rope_factors(config: dict[str, Any]) -> Any:
    """Llama 3's per-frequency divisors, float32 of shape (head_dim / 2,), or None for plain rotary positions.

    Wavelengths below original_context / high_freq_factor stay, those above original_context / low_freq_factor are
    divided by `factor`, and those between are blended (the rule published with Llama 3.1).
    """
    import numpy as np

    rope = _rope(config)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise PetoolError(f"rotary scaling {kind!r} is not supported", "llama3 and default are")
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    frequencies = 1.0 / rope["rope_theta"] ** (np.arange(0, size, 2, dtype=np.float64) / size)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    low, high = rope.get("low_freq_factor", 1.0), rope.get("high_freq_factor", 4.0)
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - blend) / rope["factor"] + blend)).astype(np.float32)
