"""What the files of a Llama model say of it: sizes, rotary scaling, tensor names, chat template, end tokens.

The one owner of each of these facts: training, export and inference ask here.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petool_lite.errors import PetoolError
from petool_lite.text import read_object

# GGUF's name of a block's tensor -> the Hugging Face module
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
ROPE_KINDS = ("default", "linear", "llama3")
# What some checkpoints hold beside their weights and every program computes anew.
COMPUTED = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
_LARGEST = 1 << 24  # of any size that a configuration states: loops and memory follow them
_LAYERS = 512
# Tokens that llama.cpp takes for the end of a reply by their text, whatever the file names as its end token.
_END_TEXTS = (
    "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>", "<|end|>", "<end_of_turn>", "<EOT>",
    "<reponame>", "<|repo_name|>", "<|file_sep|>", "<|fim_pad|>",
)  # fmt: skip


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in one of a model's files; raises PetoolError for anything else, or no file."""
    if not file.is_file():
        raise PetoolError(f"not a model directory: {file.parent}", f"{file.name} is missing")
    return read_object(file, f"not a model directory: {file.parent}", "get the model again")


@dataclass(frozen=True)
class Shape:
    """Sizes of a model: layers, widths, heads, tokens. `head_size` is the width of one head, `context` in tokens."""

    layers: int
    width: int
    feed_forward: int
    heads: int
    key_value_heads: int
    head_size: int
    vocabulary: int
    context: int
    norm_epsilon: float
    tied: bool


def shape_of(config: Mapping[str, Any]) -> Shape:
    """The sizes in a config.json, with transformers' defaults; raises PetoolError for one that no model has."""

    def size(key: str, default: int | None = None, most: int = _LARGEST) -> int:
        found = default if config.get(key) is None else config[key]
        if isinstance(found, bool) or not isinstance(found, int) or not 1 <= found <= most:
            raise _odd(f"{key} is {str(found)[:40]}" if key in config else f"{key} is not there")
        return found

    width, heads = size("hidden_size"), size("num_attention_heads")
    groups = size("num_key_value_heads", heads)
    if heads % groups or (config.get("head_dim") is None and width % heads):
        raise _odd(f"a width of {width} and {heads} heads, {groups} of keys, do not go together")
    epsilon = config.get("rms_norm_eps", 1e-6)
    if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not 0 <= epsilon < 1:
        raise _odd(f"rms_norm_eps is {str(epsilon)[:40]}")
    return Shape(
        layers=size("num_hidden_layers", most=_LAYERS),
        width=width,
        feed_forward=size("intermediate_size"),
        heads=heads,
        key_value_heads=groups,
        head_size=size("head_dim", width // heads),
        vocabulary=size("vocab_size"),
        context=size("max_position_embeddings", 2048),
        norm_epsilon=float(epsilon),
        tied=bool(config.get("tie_word_embeddings", False)),
    )


def _odd(what: str) -> PetoolError:
    return PetoolError(f"the configuration cannot be a model's: {what}", "get the model again")


@dataclass(frozen=True)
class Rope:
    """Rotary positions: `theta` as the configuration states it (None: 10,000), and how the angles are scaled.

    "linear" divides every position by `factor`; "llama3" divides long waves by it, with a smooth passage, between
    `low` and `high` turns in the first `context` tokens, to the short ones, which stay.
    """

    kind: str
    theta: float | None
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    context: float = 8192


def rope_of(config: Mapping[str, Any]) -> Rope:
    """Rotary settings from where a config.json has them: rope_parameters (transformers 5), or rope_theta and
    rope_scaling. Raises PetoolError for a kind beside ROPE_KINDS, and for numbers that cannot be."""
    stated = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(stated, dict):
        raise _odd(f"the rotary scaling is {str(stated)[:40]}")
    kind = str(stated.get("rope_type") or stated.get("type") or "default")[:40]
    if kind not in ROPE_KINDS:
        raise PetoolError(f"rotary scaling of the kind {kind} cannot be exported", f"known: {', '.join(ROPE_KINDS)}")
    if (stated.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1) != 1:
        raise PetoolError("rotary angles for a part of each head cannot be exported", "give another base")

    def number(key: str, default: float | None) -> float:
        found = stated.get(key, default)
        if isinstance(found, bool) or not isinstance(found, int | float) or not 0 < found < math.inf:
            raise _odd(f"{key} of its rotary scaling is {str(found)[:40]}")
        return found

    theta = stated.get("rope_theta", config.get("rope_theta"))
    if theta is not None and (isinstance(theta, bool) or not isinstance(theta, int | float) or not theta > 1):
        raise _odd(f"rope_theta is {str(theta)[:40]}")
    if kind == "default":
        return Rope(kind, theta)
    if kind == "linear":
        return Rope(kind, theta, number("factor", None))
    low, high = number("low_freq_factor", 1.0), number("high_freq_factor", 4.0)
    if not low < high:
        raise _odd(f"low_freq_factor {low} of its rotary scaling is not below high_freq_factor {high}")
    return Rope(kind, theta, number("factor", 8.0), low, high, number("original_max_position_embeddings", 8192))


def rope_divisors(rope: Rope, head_size: int) -> Any:
    """Llama 3's divisor of each rotary frequency: a float32 torch tensor of shape (head_size / 2,); None for others.

    Wavelengths below context / high stay, those above context / low are divided by `factor`, and those between are
    blended (the rule published with Llama 3.1). Computed in float32 as llama.cpp's converter does, to the bit.
    """
    import torch

    if rope.kind != "llama3":
        return None
    base = rope.theta or 10000.0
    lengths = 2 * math.pi / (1.0 / (base ** (torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)))
    blend = (rope.context / lengths - rope.low) / (rope.high - rope.low)
    divisors = 1 / ((1 - blend) / rope.factor + blend)
    divisors = torch.where(lengths > rope.context / rope.low, torch.full_like(divisors, rope.factor), divisors)
    return torch.where(lengths < rope.context / rope.high, torch.ones_like(divisors), divisors)


_TO_GGUF = {module: name for name, module in (BLOCK_TENSORS | TOP_TENSORS).items()}


def gguf_name(name: str) -> str:
    """`model.layers.3.self_attn.q_proj.weight` -> `blk.3.attn_q.weight`; raises PetoolError for an unknown one."""
    found = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+)\.weight", name)
    known = _TO_GGUF.get(found[2]) if found else None
    if found is None or known is None or (found[1] is None) != (known in TOP_TENSORS):
        raise PetoolError(f"a Llama model has no tensor {name[:100]}", "biases and other parts cannot be exported")
    return f"{known}.weight" if found[1] is None else f"blk.{found[1]}.{known}.weight"


def tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Every tensor of a model of this shape: its Hugging Face name, and (rows, columns) or (columns,)."""
    queries, keys = shape.heads * shape.head_size, shape.key_value_heads * shape.head_size
    width, wide = shape.width, shape.feed_forward
    block: dict[str, tuple[int, ...]] = {"attn_q": (queries, width), "attn_output": (width, queries)}
    block |= {"attn_norm": (width,), "ffn_norm": (width,), "attn_k": (keys, width), "attn_v": (keys, width)}
    block |= {"ffn_gate": (wide, width), "ffn_up": (wide, width), "ffn_down": (width, wide)}
    names = {
        f"model.layers.{layer}.{module}.weight": block[name]
        for layer in range(shape.layers)
        for name, module in BLOCK_TENSORS.items()
    }
    head = {} if shape.tied else {"lm_head.weight": (shape.vocabulary, width)}
    return {**names, "model.embed_tokens.weight": (shape.vocabulary, width), "model.norm.weight": (width,), **head}


def reordered_heads(name: str, shape: Shape) -> int:
    """How many heads a tensor's rows belong to where llama.cpp orders them otherwise (q and k); else 0."""
    if name.endswith("self_attn.q_proj.weight"):
        return shape.heads
    return shape.key_value_heads if name.endswith("self_attn.k_proj.weight") else 0


def chat_template(directory: Path) -> str:
    """The chat template of a model directory; of a list of templates the default one.

    chat_template.jinja goes before tokenizer_config.json, as in transformers. Raises PetoolError if there is none.
    """
    file = directory / "chat_template.jinja"
    found = read_json(directory / "tokenizer_config.json").get("chat_template")
    if file.is_file():
        found = file.read_text(encoding="utf-8")
    elif isinstance(found, list):
        found = {item.get("name"): item.get("template") for item in found if isinstance(item, dict)}
    if isinstance(found, dict):
        found = found.get("default")
    if not isinstance(found, str) or not found:
        raise PetoolError(f"no chat template in {directory}", "petool-lite needs an instruct model")
    return found


def load_tokenizer(directory: Path) -> Any:
    """The tokenizers.Tokenizer of a model directory; raises PetoolError where its file is damaged."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(directory / "tokenizer.json"))
    except Exception as error:  # the library raises nothing narrower
        raise PetoolError(f"damaged tokenizer: {directory}/tokenizer.json ({error})", "get the model again") from error


def _end_token(directory: Path) -> str:
    """The text of the token that ends an answer, as tokenizer_config.json names it; raises PetoolError for none."""
    found = read_json(directory / "tokenizer_config.json").get("eos_token")
    text = found.get("content") if isinstance(found, dict) else found
    if not isinstance(text, str) or not text:
        raise PetoolError(f"no end token in {directory}/tokenizer_config.json", "eos_token must name a known token")
    return text


def end_tokens(directory: Path) -> dict[str, int]:
    """Text -> ID of every token that ends a reply: the end token first, then those that llama.cpp takes for an end
    by their text, then those that the model's generation_config.json adds, which may be null, a number or a list."""
    tokenizer = load_tokenizer(directory)
    file = directory / "generation_config.json"
    named = read_json(file).get("eos_token_id") if file.is_file() else None
    ids = [index for index in (named if isinstance(named, list) else [named]) if type(index) is int]
    more = [tokenizer.id_to_token(index) for index in ids if 0 <= index < _LARGEST]
    texts = [_end_token(directory), *_END_TEXTS, *more]
    found = {text: tokenizer.token_to_id(text) for text in texts if text}
    return {text: index for text, index in found.items() if index is not None}
