"""Exact causal attention of rows that are packed side by side: no row sees another, and nothing is padded.

On a GPU long rows go through cuDNN one by one where that is faster, the others through torch's variable-length flash
kernel together; on a CPU each through scaled_dot_product_attention. On one H200 two rows of 8,100 tokens take cuDNN
6.1 ms forward and backward in a layer of the 3B shape and the flash kernel 9.9, 16 rows of 1,000 take 5.6 and 2.3.
transformers finds it as the attention implementation PACKED; Unsloth's layers have a dispatch of their own: `teach`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from typing import Any

PACKED = "petool_packed"  # what `packed_attention` is called among transformers' ways to attend
_UNKNOWN = ("softcap", "s_aux", "head_mask")  # arguments of other kinds of attention
LONG = 7680  # tokens of a row from which on cuDNN is faster by a third; at 3,500 it is no faster
_BUCKET = 256  # cuDNN plans anew for each length, in a tenth of a second: rows are filled up to a multiple of this


@dataclass(frozen=True)
class Bounds:
    """Where packed rows begin and end: `ends` (rows + 1, int32) on the device, `lengths` on the host."""

    ends: Any
    lengths: tuple[int, ...]


def bounds_of(lengths: Sequence[int], device: Any) -> Bounds:
    """Bounds of rows of these lengths."""
    import torch

    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return Bounds(ends.to(device, non_blocking=True), tuple(lengths))


def offer_to_transformers() -> None:
    """Make `packed_attention` one of the ways to attend that a model's configuration can name."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED, packed_attention)


def packed_attention(
    module: Any, query: Any, key: Any, value: Any, attention_mask: None, *, scaling: float, bounds: Bounds, **more: Any
) -> tuple[Any, None]:
    """Attention of one batch of packed rows inside a model of transformers: (1, heads, tokens, size) to (1, tokens,
    heads, size). The caller of the model gives the `bounds`; there is no mask, so without them it cannot run.

    Raises ValueError for attention that is more than causal, or that sees less than a whole row.
    """
    import torch

    other = [name for name in _UNKNOWN if more.get(name) is not None]
    if other or (more.get("sliding_window") or max(bounds.lengths)) < max(bounds.lengths):
        raise ValueError(f"packed rows know no {other[0] if other else 'window shorter than a row'}")
    if not query.is_cuda:
        return _row_by_row(query, key, value, bounds, scaling), None
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else value.dtype
    q, k, v = (item.squeeze(0).transpose(0, 1).to(dtype).contiguous() for item in (query, key, value))
    return attend(q, k, v, bounds, scaling)[None], None


def attend(query: Any, key: Any, value: Any, bounds: Bounds, scaling: float) -> Any:
    """Attention on a GPU of (tokens, heads, size) in 16 bits; keys and values may have fewer heads."""
    long = len(list(takewhile(lambda length: length >= LONG, bounds.lengths)))  # the longest rows come first
    return _function().apply(query, key, value, bounds, long if _cudnn() else 0, scaling)


@cache
def _cudnn() -> bool:
    """Whether cuDNN attends faster than the flash kernel: on Hopper and the Blackwell of data centres."""
    import torch

    return torch.backends.cuda.cudnn_sdp_enabled() and torch.cuda.get_device_capability()[0] in (9, 10)


def _filled(rows: Any, place: slice) -> Any:
    """One row of (tokens, heads, size) as (1, heads, tokens, size), zeros behind it: no token sees what comes after."""
    from torch.nn.functional import pad

    more = (place.start - place.stop) % _BUCKET
    row = rows[place]
    return (pad(row, (0, 0, 0, 0, 0, more)) if more else row).transpose(0, 1)[None]


def _cudnn_forward(query: Any, key: Any, value: Any, place: slice, out: Any, scale: float) -> list[Any]:
    """Write the result of one row into `out`; returns the five tensors that its backward pass wants."""
    import torch

    row = (_filled(item, place) for item in (query, key, value))
    found, sums, ends_q, ends_k, _, _, seed, offset, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *row, None, True, 0.0, True, False, scale=scale
    )
    out[place] = found[0].transpose(0, 1)[: place.stop - place.start]
    return [sums, ends_q, ends_k, seed, offset]


def _cudnn_backward(items: Sequence[Any], place: slice, state: Sequence[Any], scale: float) -> list[Any]:
    """Gradients of query, key and value of one row; `items` are the result's gradient, query, key, value and result."""
    import torch

    row = [_filled(item, place) for item in items]
    sums, ends_q, ends_k, seed, offset = state
    length = row[0].shape[2]
    found = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *row, sums, seed, offset, None, ends_q, ends_k, length, length, 0.0, True, scale=scale
    )
    return [item[0].transpose(0, 1)[: place.stop - place.start] for item in found]


@cache
def _function() -> Any:
    """Both kernels as one step of autograd, which keeps query, key, value and result and copies a row at a time; made
    in a function because torch is slow to import."""
    import torch

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, query: Any, key: Any, value: Any, bounds: Bounds, long: int, scale: float) -> Any:
            lengths, states = bounds.lengths, []
            ctx.places = [slice(sum(lengths[:n]), sum(lengths[: n + 1])) for n in range(long)]
            ctx.rest = slice(sum(lengths[:long]), None)
            ctx.longest, ctx.scale = (lengths[long] if long < len(lengths) else 0), scale
            ends = bounds.ends[long:] - ctx.rest.start
            out = torch.empty_like(query) if long else None
            for place in ctx.places:
                states += _cudnn_forward(query, key, value, place, out, scale)
            if ctx.longest:
                tail = (item[ctx.rest] for item in (query, key, value))
                found, *state, _ = torch.ops.aten._flash_attention_forward(
                    *tail, ends, ends, ctx.longest, ctx.longest, 0.0, True, False, scale=scale
                )
                states += [ends, *state]
                if out is None:
                    out = found
                else:
                    out[ctx.rest] = found
            ctx.save_for_backward(query, key, value, out, *states)
            return out

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            items, states = [gradient.contiguous(), *ctx.saved_tensors[:4]], ctx.saved_tensors[4:]
            found = [torch.empty_like(item) for item in items[1:4]]
            for n, place in enumerate(ctx.places):
                parts = _cudnn_backward(items, place, states[5 * n : 5 * n + 5], ctx.scale)
                for whole, part in zip(found, parts, strict=True):
                    whole[place] = part
            if ctx.longest:
                ends, sums, seed, unused = states[-4:]
                tail = (item[ctx.rest] for item in items)
                parts = torch.ops.aten._flash_attention_backward(
                    *tail, sums, ends, ends, ctx.longest, ctx.longest, 0.0, True, seed, unused, scale=ctx.scale
                )
                for whole, part in zip(found, parts, strict=True):
                    whole[ctx.rest] = part
            return *found, None, None, None

    return Attention


def _row_by_row(query: Any, key: Any, value: Any, bounds: Bounds, scaling: float) -> Any:
    """(1, heads, tokens, size) to (1, tokens, heads, size) on a CPU; keys and values may have fewer heads."""
    import torch

    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else value.dtype
    parts = (item.to(dtype).split(bounds.lengths, 2) for item in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    found = [
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
        for q, k, v in zip(*parts, strict=True)
    ]
    return (found[0] if len(found) == 1 else torch.cat(found, 2)).transpose(1, 2)


def teach(dispatch: Any) -> str:
    """Give `dispatch` (unsloth.utils.attention_dispatch) this attention for packed rows, and say what it uses.

    flash-attn and xformers do not load beside every torch; where neither does, Unsloth takes torch's variable-length
    kernel from torch 2.12 on, and calls each row apart before. The names are those of Unsloth 2026.10.9.
    """
    if dispatch.HAS_FLASH_ATTENTION:
        return "flash-attn"
    if dispatch.HAS_XFORMERS:
        return "xformers"

    def packed(query: Any, key: Any, value: Any, info: Any, *, sliding_window: int | None, scale: Any, **_: Any) -> Any:
        lengths = dispatch.packed_segment_lengths(info, query.shape[2])  # known to the host: no wait for the GPU
        if sliding_window and sliding_window < max(lengths):
            raise ValueError("packed rows know no window shorter than a row")
        q, k, v = (item.squeeze(0).transpose(0, 1).contiguous() for item in (query, key, value))
        return attend(q, k, v, Bounds(info[1], lengths), scale or query.shape[-1] ** -0.5)[None]

    dispatch._TORCH_VARLEN_ATTN = dispatch._torch_varlen_packed = packed
    dispatch._torch_varlen_beats_segments = lambda *_: True
    return "petool-lite's, in Unsloth's layers"
