"""Causal attention of packed rows, forward and backward, without a compiled package: torch's own flash kernel."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Bounds:
    """Where the rows of a micro-step begin and end: `queries` and `keys` (rows + 1, int32) on the device, their
    lengths on the host. A row's queries are its last tokens."""

    queries: Any
    keys: Any
    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]


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
