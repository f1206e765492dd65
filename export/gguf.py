"""What a model's GGUF file says of it: keys, tokenizer, tensors, to the byte as llama.cpp's converter and quantizer."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from petool_lite.export.quantize import Shapes, choose_types, tensor_bytes
from petool_lite.export.source import Adapter, Source
from petool_lite.export.vocabulary import read_vocabulary
from petool_lite.families import gguf_name, read_json, reordered_heads, rope_of
from petool_lite.gguf_base import gguf_fields, open_gguf

Places = Mapping[str, tuple[str, int]]  # GGUF tensor name -> its type, and where in the file it starts
# Keys that describe the file's weights, not the model; the quantizer sets them last.
_OWN_KEYS = ("general.architecture", "general.file_type", "general.quantization_version")
_TEMPLATE = "tokenizer.chat_template"
ROPE = "rope_freqs.weight"
_NO_BOS_VOCABULARY = 49152  # the converter turns the start token off for models of this vocabulary, SmolLM2's too


def file_order(name: str) -> tuple[int, str]:
    """Sort key of GGUF tensor names: tensors outside the blocks first, then block by block, by name."""
    block = re.match(r"blk\.(\d+)\.", name)
    return (int(block[1]) if block else -1, name)


def permute(weight: Any, heads: int) -> Any:
    """llama.cpp's row order of a q or k projection: rotary pairs side by side. `weight` is (rows, columns)."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def write_header(path: Path, source: Source, file_type: str, shapes: Shapes) -> tuple[Places, int]:
    """Write all but the data of the tensors in `shapes`, in that order; return types, places and the file's length."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, source.shape.family.gguf)
    types = choose_types(shapes, file_type, source.shape, source.importance is not None)
    sizes = {name: tensor_bytes(types[name], *shape) for name, shape in shapes.items()}
    for name, shape in shapes.items():
        kind = gguf.GGMLQuantizationType[types[name]]
        writer.add_tensor_info(name, shape, np.dtype(np.float32), sizes[name], raw_dtype=kind)
    if source.base.gguf:
        _copy_metadata(writer, source.base.gguf, source.template)
    else:
        _add_metadata(writer, source)
        _add_tokenizer(writer, source)
    for key, value in source.keys.items():
        writer.add_string(key, value)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{file_type.upper()}"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    position = writer.ggml_pad(path.stat().st_size, writer.data_alignment)
    places = {}
    for name, size in sizes.items():
        places[name] = types[name], position
        position += writer.ggml_pad(size, writer.data_alignment)
    return places, position


def _copy_metadata(writer: Any, source: Path, template: str | None) -> None:
    """Carry over every key of a GGUF base, tokenizer included, but those that describe its weights' types or parts."""
    reader = open_gguf(source)
    for key, value in gguf_fields(reader).items():
        if template is not None and key.startswith(_TEMPLATE):  # one in place of all
            if key == _TEMPLATE:
                writer.add_chat_template(template)
        elif key not in _OWN_KEYS and not key.startswith("split."):
            kinds = reader.fields[key].types
            writer.add_key_value(key, value, kinds[0], sub_type=kinds[1] if len(kinds) > 1 else None)


def _add_metadata(writer: Any, source: Source) -> None:
    """The keys that llama.cpp's converter derives from the directory, in its order."""
    import gguf

    writer.add_type(gguf.GGUFType.MODEL)
    counts = writer.get_total_parameter_count()
    about = gguf.Metadata.load(None, source.base.directory, None, counts[0])
    about.name = about.name or source.base.directory.name
    about.size_label = about.size_label or gguf.size_label(*counts)
    about.set_gguf_meta_model(writer)
    shape, rope = source.shape, rope_of(source.config)
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.key_value_heads)
    if rope.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.factor)
    if rope.theta is not None:
        writer.add_rope_freq_base(rope.theta)
    if rope.local is not None:
        writer.add_rope_freq_base_swa(rope.local)
    writer.add_layer_norm_rms_eps(shape.norm_epsilon)
    if source.config.get("head_dim") or shape.family.local:  # only where it is stated, as the converter does
        writer.add_key_length(shape.head_size)
        writer.add_value_length(shape.head_size)
    if shape.family.gguf == "llama":
        writer.add_vocab_size(shape.vocabulary)
        writer.add_rope_dimension_count(shape.head_size)
    elif shape.family.local and shape.window:
        writer.add_sliding_window(shape.window)


def _add_tokenizer(writer: Any, source: Source) -> None:
    """Add tokens, types, merges or scores, special ids and the chat template, the directory's own or the source's."""
    import gguf

    class Special(gguf.SpecialVocab):  # type: ignore[misc] # gguf has no types
        def _set_special_token(self, name: str, index: Any) -> None:
            if not isinstance(index, int) or index >= 0:  # configurations write -1 for a token that is not there
                super()._set_special_token(name, index)

    logging.getLogger("gguf.vocab").setLevel(logging.ERROR)  # it warns of separators, which a causal model has not
    directory, size, like_llama = source.base.directory, source.shape.vocabulary, source.shape.family.gguf == "llama"
    found = read_vocabulary(directory, size)
    space = read_json(directory / "tokenizer_config.json").get("add_prefix_space") if like_llama else None
    if (like_llama and found.space is not None) or space is not None:
        writer.add_add_space_prefix(space if found.space is None else found.space)
    writer.add_tokenizer_model(found.model)
    writer.add_tokenizer_pre(found.splitter)
    writer.add_token_list([token for token, _ in found.tokens])
    if found.scores is not None:
        writer.add_token_scores(found.scores)
    writer.add_token_types([kind for _, kind in found.tokens])
    special = Special(directory, load_merges=found.scores is None, n_vocab=size)
    special.chat_template = special.chat_template if source.template is None else source.template
    special.add_to_gguf(writer, quiet=True)
    if found.space is not None and not like_llama:
        writer.add_add_space_prefix(found.space)
    if size == _NO_BOS_VOCABULARY and like_llama:
        writer.kv_data[0].pop("tokenizer.ggml.add_bos_token", None)  # the writer warns of a key set twice
        writer.add_add_bos_token(False)


def write_lora(path: Path, source: Source, adapter: Adapter) -> None:
    """The adapter alone as a GGUF LoRA: A and B of every module in float32, B's rows in llama.cpp's order. llama.cpp
    scales by alpha / rank, so alpha is written such that this is the adapter's own scale."""
    import gguf

    writer = gguf.GGUFWriter(path, source.shape.family.gguf)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, adapter.config.scaling * adapter.config.r)
    for key, value in source.keys.items():
        writer.add_string(key, value)
    for name in sorted(adapter.modules, key=lambda name: file_order(gguf_name(name, source.shape))):
        low, high = adapter.modules[name]
        if heads := reordered_heads(name, source.shape):
            high = permute(high, heads)
        writer.add_tensor(f"{gguf_name(name, source.shape)}.lora_a", low.contiguous().numpy())
        writer.add_tensor(f"{gguf_name(name, source.shape)}.lora_b", high.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
