"""What the files of a model say of it: family, sizes, rotary scaling, tensor names, chat template, end tokens. The one
owner of each of these facts; FAMILIES is all that tells one architecture from another."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from petool_lite.errors import PetoolError, in_words
from petool_lite.text import read_object

_NORMS = ("input_layernorm", "post_attention_layernorm")
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


@dataclass(frozen=True)
class Family:
    """An architecture: its `name`, transformers' class and `model_type`, llama.cpp's name (`gguf`). `norms` are those
    of a block, where `head_norms` also q and k have one, where `biases` q, k and v a bias. `interleaved`: llama.cpp
    orders the rows of q and k otherwise. `activation` and `head_size` are config.json's, or its default. `shift` is
    added to norms, `scaled` embeddings grow by the root of the width, of `local` layers only the last sees all."""

    name: str
    architecture: str
    model_type: str
    gguf: str
    norms: tuple[str, ...] = _NORMS
    head_norms: bool = False
    biases: bool = False
    interleaved: bool = False
    activation: str = "silu"
    head_size: int | None = None
    tied: bool = False
    shift: float = 0.0
    scaled: bool = False
    local: int = 0


FAMILIES = (
    Family("Llama", "LlamaForCausalLM", "llama", "llama", interleaved=True),
    Family("Mistral", "MistralForCausalLM", "mistral", "llama", interleaved=True),
    Family("Qwen2", "Qwen2ForCausalLM", "qwen2", "qwen2", biases=True),
    Family("Qwen3", "Qwen3ForCausalLM", "qwen3", "qwen3", head_norms=True, head_size=128),
    Family(
        "Gemma 3", "Gemma3ForCausalLM", "gemma3_text", "gemma3",
        norms=(*_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm"), head_norms=True,
        activation="gelu_pytorch_tanh", head_size=256, tied=True, shift=1.0, scaled=True, local=6,
    ),
)  # fmt: skip
KNOWN = f"known: {', '.join(family.name for family in FAMILIES)}, as text models without experts"


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a config.json; raises PetoolError, which names the known ones, for any other."""
    listed = config.get("architectures") or ["no architecture named"]
    named = ", ".join(map(str, listed)) if isinstance(listed, list) else str(listed)
    kind = str(config.get("model_type"))[:40]  # what transformers goes by, whatever the architecture is called
    if found := [item for item in FAMILIES if (named, kind) == (item.architecture, item.model_type)]:
        return found[0]
    raise PetoolError(f"no text model of a known family: {named[:80]}, model_type {kind}", KNOWN)


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in one of a model's files; raises PetoolError for anything else, or no file."""
    if not file.is_file():
        raise PetoolError(f"not a model directory: {file.parent}", f"{file.name} is missing")
    return read_object(file, f"not a model directory: {file.parent}", "get the model again")


@dataclass(frozen=True)
class Shape:
    """Sizes of a model: `context` is in tokens, `window` how many of them local attention sees, None without it."""

    family: Family
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
    window: int | None = None


def shape_of(config: Mapping[str, Any]) -> Shape:
    """The sizes in a config.json, with transformers' defaults. Raises PetoolError for what is of no known family."""
    family, size = family_of(config), partial(_number, config)
    width, heads = size("hidden_size"), size("num_attention_heads")
    groups = size("num_key_value_heads", heads)
    per_head = family.head_size or width // heads
    if heads % groups or (config.get("head_dim") is None and not family.head_size and width % heads):
        raise _odd(f"a width of {width} and {heads} heads, {groups} of keys, do not go together")
    windowed = family.local or family.model_type == "mistral"
    shape = Shape(
        family=family,
        layers=size("num_hidden_layers", most=_LAYERS),
        width=width,
        feed_forward=size("intermediate_size"),
        heads=heads,
        key_value_heads=groups,
        head_size=size("head_dim", per_head),
        vocabulary=size("vocab_size"),
        context=size("max_position_embeddings", 2048),
        norm_epsilon=float(_number(config, "rms_norm_eps", 1e-6, 0, 1, float)),
        tied=bool(config.get("tie_word_embeddings", family.tied)),
        window=size("sliding_window") if windowed and config.get("sliding_window") is not None else None,
    )
    _check_attention(config, shape)
    return shape


def _check_attention(config: Mapping[str, Any], shape: Shape) -> None:
    """Raise PetoolError for what llama.cpp, or another model of the family, does not do."""
    family = shape.family
    activation = config.get("hidden_activation" if family.local else "hidden_act") or family.activation
    local = [bool(family.local) and (layer + 1) % family.local > 0 for layer in range(shape.layers)]
    kinds = ["sliding_attention" if here else "full_attention" for here in local]
    odd = {
        f"the activation {str(activation)[:40]}": activation != family.activation,
        "an attention window": bool(config.get("use_sliding_window")),
        "another order of windows": bool(config.get("layer_types")) and config["layer_types"] != kinds,
        "another pattern of windows": config.get("sliding_window_pattern", family.local) != family.local,
        "soft caps": bool(config.get("attn_logit_softcapping") or config.get("final_logit_softcapping")),
        "attention in both directions": bool(config.get("use_bidirectional_attention")),
        "another scale of attention": family.scaled
        and config.get("query_pre_attn_scalar", shape.head_size) != shape.head_size,
        "other biases": any(config.get(key) for key in ("attention_bias", "mlp_bias")),
    }
    if what := next((what for what, there in odd.items() if there), ""):
        raise PetoolError(f"a {family.name} model with {what} cannot be trained or exported", "give another base")


def _number(
    config: Mapping[str, Any], key: str, default: Any = None, least: float = 1, most: float = _LARGEST, kind: type = int
) -> Any:
    """A number in a configuration; raises PetoolError for another value, and for none where there is no default."""
    found = default if config.get(key) is None else config[key]
    if type(found) not in (int, kind) or not least <= found <= most:
        raise _odd(f"{key} is {str(found)[:40]}" if key in config else f"{key} is not there")
    return found


def _odd(what: str) -> PetoolError:
    return PetoolError(f"the configuration cannot be a model's: {what}", "get the model again")


@dataclass(frozen=True)
class Rope:
    """Rotary positions: `theta` as the configuration states it (None: 10,000), that of layers with a window (`local`),
    and how the angles are scaled. "linear" divides every position by `factor`; "llama3" divides long waves by it, with
    a smooth passage, between `low` and `high` turns in the first `context` tokens, to the short ones, which stay."""

    kind: str
    theta: float | None
    local: float | None = None
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    context: float = 8192


def rope_of(config: Mapping[str, Any]) -> Rope:
    """Rotary settings of a config.json; raises PetoolError for a kind beside ROPE_KINDS, and numbers that cannot be."""
    stated = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(stated, dict):
        raise _odd(f"the rotary scaling is {str(stated)[:40]}")
    local = config.get("rope_local_base_freq")
    if isinstance(stated.get("full_attention"), dict):
        local = (stated.get("sliding_attention") or {}).get("rope_theta", local)
        stated = stated["full_attention"]
    kind = str(stated.get("rope_type") or stated.get("type") or "default")[:40]
    if kind not in ROPE_KINDS:
        raise PetoolError(f"rotary scaling of the kind {kind} cannot be exported", f"known: {', '.join(ROPE_KINDS)}")
    if (stated.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1) != 1:
        raise PetoolError("rotary angles for a part of each head cannot be exported", "give another base")

    number = partial(_number, stated, least=1e-6, most=1e12, kind=float)
    theta = stated.get("rope_theta", config.get("rope_theta"))
    theta = None if theta is None else _number({"rope_theta": theta}, "rope_theta", least=1, most=1e12, kind=float)
    if kind != "llama3":
        return Rope(kind, theta, local, number("factor") if kind == "linear" else 1.0)
    if family_of(config).gguf != "llama":
        raise PetoolError("rotary scaling of the kind llama3 is Llama's", "give another base")
    low, high = number("low_freq_factor", 1.0), number("high_freq_factor", 4.0)
    if not low < high:
        raise _odd(f"low_freq_factor {low} of its rotary scaling is not below high_freq_factor {high}")
    return Rope(kind, theta, local, number("factor", 8.0), low, high, number("original_max_position_embeddings", 8192))


def rope_divisors(rope: Rope, head_size: int) -> Any:
    """Llama 3's divisor of each rotary frequency: a float32 torch tensor of shape (head_size / 2,); None for others.
    The rule published with Llama 3.1, computed in float32 as llama.cpp's converter does, to the bit."""
    import torch

    if rope.kind != "llama3":
        return None
    base = rope.theta or 10000.0
    lengths = 2 * math.pi / (1.0 / (base ** (torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)))
    blend = (rope.context / lengths - rope.low) / (rope.high - rope.low)
    divisors = 1 / ((1 - blend) / rope.factor + blend)
    divisors = torch.where(lengths > rope.context / rope.low, torch.full_like(divisors, rope.factor), divisors)
    return torch.where(lengths < rope.context / rope.high, torch.ones_like(divisors), divisors)


@lru_cache(maxsize=8)
def _gguf_names(architecture: str, layers: int) -> Any:
    import gguf

    return gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], layers)


def gguf_name(name: str, shape: Shape) -> str:
    """`model.layers.3.self_attn.q_proj.weight` -> `blk.3.attn_q.weight`, for a tensor of `tensor_shapes`."""
    return str(_gguf_names(shape.family.gguf, shape.layers).get_name(name, (".weight", ".bias")))


def tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Every tensor of a model of this shape: its Hugging Face name, and (rows, columns) or (columns,)."""
    family, width, wide = shape.family, shape.width, shape.feed_forward
    queries, keys = shape.heads * shape.head_size, shape.key_value_heads * shape.head_size
    block: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (queries, width), "self_attn.k_proj": (keys, width), "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries), "mlp.gate_proj": (wide, width), "mlp.up_proj": (wide, width),
        "mlp.down_proj": (width, wide), **dict.fromkeys(family.norms, (width,)),
    }  # fmt: skip
    if family.head_norms:
        block |= {"self_attn.q_norm": (shape.head_size,), "self_attn.k_norm": (shape.head_size,)}
    block = {f"{module}.weight": size for module, size in block.items()}
    if family.biases:
        block |= {f"self_attn.{side}_proj.bias": block[f"self_attn.{side}_proj.weight"][:1] for side in "qkv"}
    names = {f"model.layers.{layer}.{name}": size for layer in range(shape.layers) for name, size in block.items()}
    head = {} if shape.tied else {"lm_head.weight": (shape.vocabulary, width)}
    return {**names, "model.embed_tokens.weight": (shape.vocabulary, width), "model.norm.weight": (width,), **head}


def reordered_heads(name: str, shape: Shape) -> int:
    """How many heads a tensor's rows belong to where llama.cpp orders them otherwise (q and k); else 0."""
    heads = {"q_proj.weight": shape.heads, "k_proj.weight": shape.key_value_heads}
    return heads.get(name.rpartition("self_attn.")[2], 0) if shape.family.interleaved else 0


def chat_template(directory: Path) -> str:
    """The chat template of a model directory; of a list of templates the default one. chat_template.jinja goes before
    tokenizer_config.json, as in transformers; Vicuna's is known by its name. Raises PetoolError if there is none."""
    file = directory / "chat_template.jinja"
    found = read_json(directory / "tokenizer_config.json").get("chat_template")
    if file.is_file():
        found = file.read_text(encoding="utf-8")
    elif isinstance(found, list):
        named = (item for item in found if isinstance(item, dict) and item.get("name") == "default")
        found = next(named, {}).get("template")
    elif isinstance(found, dict):
        found = found.get("default")
    if found is None and (config := directory / "config.json").is_file():
        found = known_template(directory.name, str(read_json(config).get("_name_or_path")))
    if not isinstance(found, str) or not found:
        raise PetoolError(f"no chat template in {directory}", "petool-lite needs an instruct model")
    return found


def known_template(*names: str) -> str | None:
    """The chat template of a model that has none in its files, by what it is called; None for others."""
    if not any("vicuna" in name.lower() for name in names):
        return None
    return (Path(__file__).parent / "prompt" / "vicuna.jinja").read_text(encoding="utf-8").rstrip("\n")


def load_tokenizer(directory: Path) -> Any:
    """The tokenizers.Tokenizer of a model directory; raises PetoolError where its file is damaged."""
    from tokenizers import Tokenizer

    # the library raises nothing narrower than Exception
    with in_words(f"damaged tokenizer: {directory}/tokenizer.json", "get the model again", Exception):
        return Tokenizer.from_file(str(directory / "tokenizer.json"))


def special_token(directory: Path, role: str) -> str:
    """The text of the token of a role, "bos" or "eos", as tokenizer_config.json names it; empty for none."""
    found = read_json(directory / "tokenizer_config.json").get(f"{role}_token")
    text = found.get("content") if isinstance(found, dict) else found
    return text if isinstance(text, str) else ""


def end_tokens(directory: Path, tokenizer: Any = None) -> dict[str, int]:
    """Text -> ID of every token that ends a reply: the end token first, those that llama.cpp takes for one by their
    text, those of generation_config.json. Raises PetoolError where no end token is named or known to the tokenizer."""
    tokenizer, file = tokenizer or load_tokenizer(directory), directory / "generation_config.json"
    named = read_json(file).get("eos_token_id") if file.is_file() else None
    ids = [index for index in (named if isinstance(named, list) else [named]) if type(index) is int]
    more = [tokenizer.id_to_token(index) for index in ids if 0 <= index < _LARGEST]
    texts = [special_token(directory, "eos"), *_END_TEXTS, *more]
    found = {text: tokenizer.token_to_id(text) for text in texts if text}
    if found.get(texts[0]) is None:
        raise PetoolError(f"no end token in {directory}/tokenizer_config.json", "eos_token must name a known token")
    return {text: index for text, index in found.items() if index is not None}
