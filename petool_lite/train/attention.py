"""Exact causal attention of rows that are packed side by side: no row sees another, and nothing is padded. On a GPU by
torch's own variable-length flash kernel, on a CPU by scaled_dot_product_attention row by row. transformers finds it as
the attention implementation PACKED; Unsloth's layers have a dispatch of their own, which `teach` it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

PACKED = "petool_packed"  # what `packed_attention` is called among transformers' ways to attend
_UNKNOWN = ("softcap", "s_aux", "head_mask")  # arguments of other kinds of attention
_LONG = 5000  # tokens of the mean row from which on Unsloth's way, one row after the other, is faster


@dataclass(frozen=True)
class Bounds:
    """Where packed rows begin and end: `ends` (rows + 1, int32) on the device, `lengths` and the `longest` of them on
    the host, that one as a tensor: a number would be compiled into a layer."""

    ends: Any
    lengths: tuple[int, ...]
    longest: Any


def bounds_of(lengths: Sequence[int], device: Any) -> Bounds:
    """Bounds of rows of these lengths."""
    import torch

    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return Bounds(ends.to(device, non_blocking=True), tuple(lengths), torch.tensor(max(lengths), dtype=torch.int32))


def attend_packed(causal: Any) -> None:
    """Let a model of transformers attend with `packed_attention`."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED, packed_attention)
    causal.set_attn_implementation(PACKED)
    kernels()


def packed_attention(
    module: Any, query: Any, key: Any, value: Any, attention_mask: None, *, scaling: float, bounds: Bounds, **more: Any
) -> tuple[Any, None]:
    """Attention of packed rows inside a model of transformers: (1, heads, tokens, size) to (1, tokens, heads, size).
    Whoever calls the model gives the `bounds`. With a `sliding_window` a token sees so many tokens of its row at most,
    itself included. Raises ValueError for attention that is more than causal."""
    import torch

    if other := [name for name in _UNKNOWN if more.get(name) is not None]:
        raise ValueError(f"packed rows know no {other[0]}")
    window = more.get("sliding_window") or 0
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    if kind == "cpu" and not torch.compiler.is_compiling():
        parts = (item.to(dtype).split(bounds.lengths, 2) for item in (query, key, value))
        found = [_alone(q, k, v, scaling, window) for q, k, v in zip(*parts, strict=True)]
        return (found[0] if len(found) == 1 else torch.cat(found, 2)).transpose(1, 2), None
    q, k, v = (item.squeeze(0).transpose(0, 1).to(dtype).contiguous() for item in (query, key, value))
    rows = (bounds.ends, bounds.longest, scaling, window)
    if torch.compiler.is_compiling():
        return torch.ops.petool_lite.packed(q, k, v, *rows)[0][None], None
    return kernels()[0].apply(q, k, v, *rows)[None], None


def _alone(q: Any, k: Any, v: Any, scaling: float, window: int) -> Any:
    """One row's attention on a CPU, (1, heads, tokens, size); keys and values may have fewer heads."""
    import torch

    length, grouped = q.shape[2], q.shape[1] != k.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril().triu(1 - window) if 0 < window < length else None
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(q, k, v, attn_mask=seen, is_causal=seen is None, scale=scaling, enable_gqa=grouped)


@cache
def kernels() -> tuple[Any, Any]:
    """The flash kernel: once as a step of autograd, for layers that are not compiled, and once as the operator
    petool_lite::packed, which torch.compile takes as it is. Queries are (tokens, heads, size), keys and values with
    fewer heads; rows end at `ends`, none longer than `longest`; a token sees `window` tokens (0: all of its row). The
    operator gives logarithms of the sums (heads, tokens) besides, for its backward pass."""
    import torch

    aten, make = torch.ops.aten, partial(torch.library.custom_op, mutates_args=())
    heads, rows = "Tensor q, Tensor k, Tensor v", "Tensor ends, Tensor longest, float scale, SymInt window"

    def given(ends: Any, longest: Any, scale: float, window: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        most = int(longest)
        seen = {"window_size_left": window - 1, "window_size_right": 0} if 0 < window < most else {}
        return (ends, ends, most, most, 0.0, True), {"scale": scale, **seen}

    def forward(q: Any, k: Any, v: Any, *rows: Any) -> tuple[Any, ...]:
        places, options = given(*rows)
        return tuple(aten._flash_attention_forward(q, k, v, *places, False, **options)[:2])

    def backward(gradient: Any, q: Any, k: Any, v: Any, out: Any, sums: Any, *rows: Any) -> tuple[Any, ...]:
        places, options = given(*rows)
        seed = torch.empty(2, dtype=torch.uint64, device=q.device)  # of a dropout that is 0
        places = *places, seed, torch.empty_like(seed[0])
        return tuple(aten._flash_attention_backward(gradient.contiguous(), q, k, v, out, sums, *places, **options))

    def keep(ctx: Any, inputs: Any, output: Any) -> None:
        q, k, v, ends, longest, ctx.scale, ctx.window = inputs
        ctx.save_for_backward(q, k, v, *output, ends, longest)

    class Flash(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = forward(*inputs)
            keep(ctx, inputs, output)
            return output[0]

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            return *backward(gradient, *ctx.saved_tensors, ctx.scale, ctx.window), None, None, None, None

    def step_back(ctx: Any, gradient: Any, _: Any) -> Any:
        return *packed_backward(gradient, *ctx.saved_tensors, ctx.scale, ctx.window), None, None, None, None

    packed = make("petool_lite::packed", forward, schema=f"({heads}, {rows}) -> (Tensor, Tensor)")
    packed.register_fake(lambda q, *_: (torch.empty_like(q), q.new_empty(q.shape[1::-1], dtype=torch.float32)))
    schema = f"(Tensor gradient, {heads}, Tensor out, Tensor sums, {rows}) -> (Tensor, Tensor, Tensor)"
    packed_backward = make("petool_lite::packed_backward", backward, schema=schema)
    packed_backward.register_fake(lambda gradient, *heads: tuple(map(torch.empty_like, heads[:3])))
    packed.register_autograd(step_back, setup_context=keep)
    return Flash, packed


def teach(dispatch: Any) -> str:
    """Give `dispatch` (unsloth.utils.attention_dispatch of Unsloth 2026.10.9) the flash kernel for packed rows where
    flash-attn and xformers do not load, and say what it uses. Long rows are called apart, where cuDNN is faster: two of
    8,100 tokens take 6.1 ms in a layer of the 3B shape, together 9.9; 16 of 1,000 take 5.6 and 2.3 (one H200)."""
    if dispatch.HAS_FLASH_ATTENTION:
        return "flash-attn"
    if dispatch.HAS_XFORMERS:
        return "xformers"

    def packed(query: Any, key: Any, value: Any, info: Any, *, sliding_window: int | None, scale: Any, **_: Any) -> Any:
        _, ends, longest = info
        if sliding_window and sliding_window < longest:
            raise ValueError("packed rows know no window shorter than a row")
        q, k, v = (item.squeeze(0).transpose(0, 1).contiguous() for item in (query, key, value))
        scale = scale or query.shape[-1] ** -0.5
        return kernels()[0].apply(q, k, v, ends, ends.new_tensor(longest, device="cpu"), scale, 0)[None]

    def together(query: Any, key: Any, lengths: Sequence[int], *_: Any) -> bool:
        rows = [length for length in lengths if length >= 8] or lengths  # the others fill up the last eight tokens
        return sum(rows) < _LONG * len(rows)

    dispatch._TORCH_VARLEN_ATTN = dispatch._torch_varlen_packed = packed
    dispatch._torch_varlen_beats_segments = together
    return "torch's flash kernel, in Unsloth's layers"
