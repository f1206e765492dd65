"""A whole Llama of 60 KB in GGUF that llama.cpp loads and runs, with any change of its keys."""

import json
from pathlib import Path

import numpy as np
import pytest

from petool_lite.errors import PetoolError

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
WIDTH, INNER = 32, 64
TOKENS = [bytes([b]).decode("latin-1") if 33 <= b < 127 else chr(256 + b) for b in range(256)] + ["ab", "<|end|>"]
KEYS = {
    "llama.block_count": 1, "llama.context_length": 128, "llama.embedding_length": WIDTH,
    "llama.feed_forward_length": INNER, "llama.attention.head_count": 2, "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.dimension_count": WIDTH // 2,
    "llama.vocab_size": len(TOKENS), "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS, "tokenizer.ggml.token_type": [1] * 257 + [3], "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": 257, "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}",
}  # fmt: skip


def write_gguf(path: Path, split: int = 0, extra: str = "", **changes) -> Path:
    """A whole Llama of 60 KB that llama.cpp runs; `changes` of its keys (None: without), `split` tensors a part."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=split)
    for key, value in (KEYS | {key.replace("__", "."): value for key, value in changes.items()}).items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)](key, value)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (len(TOKENS), WIDTH), "output_norm": (WIDTH,), "blk.0.attn_norm": (WIDTH,)}
    shapes |= {f"blk.0.attn_{name}": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_norm": (WIDTH,), "blk.0.ffn_gate": (INNER, WIDTH), "blk.0.ffn_up": (INNER, WIDTH)}
    shapes |= {"blk.0.ffn_down": (WIDTH, INNER)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(size=shape).astype(np.float32) * 0.1)
    if extra:
        writer.add_tensor(extra, np.ones(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits_of(path, ids):
    """llama.cpp's logits after `ids`."""
    from petool_lite.inference.llama import LlamaModel

    with LlamaModel(path, n_ctx=512) as model:
        model._eval(ids)
        return model._logits()


def change(file: Path, **keys) -> None:
    """Set keys of a JSON file; None takes one away."""
    content = json.loads(file.read_text()) | keys
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def refused(base: Path) -> str:
    """Message and hint of a base that cannot be used: what training would be told, and export."""
    from petool_lite.export import check_exportable
    from petool_lite.models import resolve_base

    with pytest.raises(PetoolError) as error:
        check_exportable(resolve_base(str(base)).directory)
    assert error.value.hint
    return f"{error.value.message} | {error.value.hint}"
