"""The element-wise steps of a decoder layer and of its backward pass: one Triton kernel each on a GPU, torch on a CPU.

Sums run in float32, results are stored in the dtype of the input. Rows are tokens.
"""

from functools import cache
from typing import Any


def rms_norm(x: Any, weight: Any, epsilon: float) -> tuple[Any, Any]:
    """The root-mean-square norm of `x` times `weight`, and 1 / rms (float32, one a token)."""
    import torch

    if not x.is_cuda:
        inverse = torch.rsqrt(x.float().pow(2).mean(-1) + epsilon)
        return (x.float() * inverse[:, None] * weight.float()).to(x.dtype), inverse
    tokens, width = x.shape
    normed, inverse = torch.empty_like(x), torch.empty(tokens, dtype=torch.float32, device=x.device)
    _triton().rms_norm[(tokens,)](x, normed, inverse, weight, width, epsilon, BLOCK=_power(width), num_warps=8)
    return normed, inverse


def rms_norm_backward(gradient: Any, x: Any, inverse: Any, weight: Any, added: Any) -> Any:
    """Gradient of rms_norm with regard to `x`, plus `added` (the gradient that passes beside the norm)."""
    import torch

    if not x.is_cuda:
        scaled = gradient.float() * weight.float()
        hat = x.float() * inverse[:, None]
        own = inverse[:, None] * (scaled - hat * (scaled * hat).mean(-1, keepdim=True))
        return (own + added.float()).to(x.dtype)
    tokens, width = x.shape
    result = torch.empty_like(x)
    _triton().rms_norm_backward[(tokens,)](
        gradient, x, inverse, weight, added, result, width, BLOCK=_power(width), num_warps=8
    )
    return result


def rotate(heads: Any, cos: Any, sin: Any, positions: Any, backward: bool = False) -> Any:
    """Rotary embedding of `heads` (tokens, heads, size), in place; angles' `cos` and `sin` (positions, size / 2).

    `backward` turns the other way, which is the gradient's turn.
    """
    tokens, count, size = heads.shape
    if not heads.is_cuda:
        c, s = (table[positions][:, None, :] for table in (cos, -sin if backward else sin))
        first, second = heads[..., : size // 2].float(), heads[..., size // 2 :].float()
        turned = (first * c - second * s, second * c + first * s)
        heads[..., : size // 2], heads[..., size // 2 :] = (half.to(heads.dtype) for half in turned)
        return heads
    _triton().rotate[(tokens,)](
        heads, cos, sin, positions, heads.stride(0), heads.stride(1), count, size // 2,
        BACKWARD=backward, HEADS=_power(count), HALF=_power(size // 2), num_warps=4,
    )  # fmt: skip
    return heads


def swiglu(gate_up: Any) -> Any:
    """silu(gate) * up of (tokens, 2 * width), gate first."""
    import torch

    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    if not gate_up.is_cuda:
        gate, up = gate_up[:, :width].float(), gate_up[:, width:].float()
        return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)
    result = torch.empty(tokens, width, dtype=gate_up.dtype, device=gate_up.device)
    _triton().swiglu[(tokens, -(-width // 1024))](gate_up, result, width, BLOCK=1024)
    return result


def swiglu_backward(gate_up: Any, gradient: Any) -> None:
    """In place: `gate_up` becomes its own gradient, `gradient` (of silu(gate) * up) becomes silu(gate) * up."""
    import torch

    tokens, width = gradient.shape
    if not gate_up.is_cuda:
        gate, up, given = gate_up[:, :width].float(), gate_up[:, width:].float(), gradient.float()
        share = torch.sigmoid(gate)
        found = (given * up * share * (1 + gate * (1 - share)), given * gate * share)
        gradient.copy_(gate * share * up)  # in float32 `given` is the same memory, as `gate` and `up` are below
        gate_up[:, :width], gate_up[:, width:] = found
        return
    _triton().swiglu_backward[(tokens, -(-width // 1024))](gate_up, gradient, width, BLOCK=1024)


def dropped(x: Any, chance: float, seed: int, added: Any = None) -> Any:
    """`x` with each element zeroed by `chance` and the others times 1 / (1 - chance), plus `added` (in place there).

    The same seed and shape drop the same elements again, so a backward pass keeps no mask.
    """
    import torch

    if not x.is_cuda:
        generator = torch.Generator().manual_seed(seed)
        kept = torch.rand(x.shape, generator=generator) >= chance
        result = (x * kept / (1 - chance)).to(x.dtype)
        return result if added is None else added.add_(result)
    tokens, width = x.shape
    result = torch.empty_like(x) if added is None else added
    _triton().dropped[(tokens, -(-width // 2048))](x, result, width, chance, seed, ADDED=added is not None, BLOCK=512)
    return result


def _power(width: int) -> int:
    return 1 << (width - 1).bit_length()


@cache
def _triton() -> Any:
    from petool_lite.train import triton_kernels

    return triton_kernels
