"""Attention over packed rows where no compiled package helps: torch's own variable-length kernel under Unsloth's path.

flash-attn and xformers do not load beside every torch. Unsloth then calls attention once a row, or uses torch's
variable-length kernel, but that only from torch 2.12 on, which knows grouped heads. Torch 2.11 has the same kernel
without them, so here the key and value heads are repeated before it.
"""

from typing import Any


def use_varlen(dispatch: Any) -> str:
    """Give `dispatch` (unsloth.utils.attention_dispatch) torch's kernel where it has none; the name of what it uses."""
    import torch

    if dispatch.HAS_FLASH_ATTENTION:
        return "flash-attn"
    if dispatch.HAS_XFORMERS:
        return "xformers"
    if not torch.cuda.is_available():
        return "sdpa, row by row"
    if dispatch._TORCH_VARLEN_ATTN is None and _kernel() is not None:
        dispatch._TORCH_VARLEN_ATTN = varlen_attention
    return "sdpa, row by row" if dispatch._TORCH_VARLEN_ATTN is None else "torch varlen"


def varlen_attention(
    query: Any,
    key: Any,
    value: Any,
    starts_q: Any,
    starts_k: Any,
    longest_q: int,
    longest_k: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Any:
    """Attention of packed rows (tokens, heads, head size) whose bounds are `starts_*` (rows + 1); the interface of
    `torch.nn.attention.varlen.varlen_attn` in torch 2.12."""
    kernel = _kernel()
    if enable_gqa and query.shape[1] != key.shape[1]:
        groups = query.shape[1] // key.shape[1]
        key, value = (item.repeat_interleave(groups, dim=1) for item in (key, value))
    return kernel(
        query, key, value, starts_q, starts_k, longest_q, longest_k, scale=scale, window_size=tuple(window_size)
    )


def _kernel() -> Any:
    """torch's `varlen_attn` with `window_size` (torch 2.11), or None."""
    import inspect

    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "window_size" in inspect.signature(varlen_attn).parameters else None
