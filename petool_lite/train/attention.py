"""Causal attention of packed rows, forward and backward, without a compiled package: torch's own flash kernel."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

PACKED = "petool_packed"  # what `packed_attention` is called among transformers' ways to attend


@dataclass(frozen=True)
class Bounds:
    """Where the rows of a micro-step begin and end: `queries` and `keys` (rows + 1, int32) on the device, their
    lengths on the host. A row's queries are its last tokens."""

    queries: Any
    keys: Any
    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]


def bounds_of(lengths: Sequence[int], device: Any) -> Bounds:
    """Bounds of rows of which every token asks."""
    import torch

    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device, non_blocking=True)
    return Bounds(ends, ends, tuple(lengths), tuple(lengths))


def attend(query: Any, key: Any, value: Any, bounds: Bounds, scale: float) -> tuple[Any, Any]:
    """Attention of (tokens, heads, size), keys and values with fewer heads; and what `attend_backward` needs of it."""
    import torch

    if not query.is_cuda:
        return _reference(query, key, value, bounds, scale), None
    out, sums, state, unused, _ = torch.ops.aten._flash_attention_forward(
        query, key, value, bounds.queries, bounds.keys, max(bounds.query_lengths), max(bounds.key_lengths),
        0.0, True, False, scale=scale,
    )  # fmt: skip
    return out, (sums, state, unused)


def attend_backward(
    gradient: Any, query: Any, key: Any, value: Any, out: Any, kept: Any, bounds: Bounds, scale: float
) -> tuple[Any, Any, Any]:
    """Gradients of query, key and value; `kept` is the second result of `attend`."""
    import torch

    if not query.is_cuda:
        with torch.enable_grad():
            q, k, v = (item.detach().requires_grad_() for item in (query, key, value))
            dq, dk, dv = torch.autograd.grad(_reference(q, k, v, bounds, scale), (q, k, v), gradient)
        return dq, dk, dv
    sums, state, unused = kept
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        gradient, query, key, value, out, sums, bounds.queries, bounds.keys,
        max(bounds.query_lengths), max(bounds.key_lengths), 0.0, True, state, unused, scale=scale,
    )  # fmt: skip
    return dq, dk, dv


def _reference(query: Any, key: Any, value: Any, bounds: Bounds, scale: float) -> Any:
    """Row by row through scaled_dot_product_attention."""
    import torch

    parts = []
    keys, values = key.split(bounds.key_lengths), value.split(bounds.key_lengths)
    for q, k, v in zip(query.split(bounds.query_lengths), keys, values, strict=True):
        mask = None
        if len(q) != len(k):
            mask = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril(len(k) - len(q))
        parts.append(
            torch.nn.functional.scaled_dot_product_attention(
                *(item.transpose(0, 1)[None] for item in (q, k, v)),
                attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True,
            )[0].transpose(0, 1)
        )  # fmt: skip
    return torch.cat(parts)


def offer_to_transformers() -> None:
    """Make `packed_attention` one of the ways to attend that a model's configuration can name."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED, packed_attention)


def packed_attention(
    module: Any, query: Any, key: Any, value: Any, attention_mask: None, *, scaling: float, bounds: Bounds, **_: Any
) -> tuple[Any, None]:
    """Attention of one batch of packed rows inside a model of transformers: (1, heads, tokens, size) to (1, tokens,
    heads, size). The caller of the model gives the `bounds`; there is no mask, so without them it cannot run."""
    import torch

    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    parts = (item[0].transpose(0, 1).to(dtype).contiguous() for item in (query, key, value))
    return _function().apply(*parts, bounds, scaling)[None], None


@cache
def _function() -> Any:
    """`attend` and its backward pass as one step of autograd; made in a function because torch is slow to import."""
    import torch

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, query: Any, key: Any, value: Any, bounds: Bounds, scale: float) -> Any:
            out, kept = attend(query, key, value, bounds, scale)
            ctx.bounds, ctx.scale = bounds, scale
            # all of it as saved tensors: with checkpointing they are dropped and computed again
            ctx.save_for_backward(query, key, value, out, *(kept or ()))
            return out

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            query, key, value, out, *kept = ctx.saved_tensors
            rest = (query, key, value, out, kept, ctx.bounds, ctx.scale)
            return *attend_backward(gradient.contiguous(), *rest), None, None

    return Attention
