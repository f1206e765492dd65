"""Frozen base weights of one or several linears that read the same input, side by side as one matrix.

Two kinds: bfloat16, or float32 on most CPUs; NF4, unpacked for each use into memory that all layers share.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any


class Plain:
    """One matrix (outputs, inputs) in the dtype of the model; the modules' own weights become views of it."""

    def __init__(self, linears: Sequence[Any]) -> None:
        import torch

        weights = [linear.weight for linear in linears]
        if len(weights) == 1:
            self.matrix = weights[0].data
            return
        self.matrix = torch.cat([weight.data for weight in weights])
        start = 0
        for weight in weights:
            weight.data = self.matrix[start : start + len(weight)]
            start += len(weight)

    def forward(self, x: Any) -> Any:
        """x W^T."""
        return x @ self.matrix.T

    def backward(self, gradient: Any) -> Any:
        """gradient W."""
        return gradient @ self.matrix


class Nf4:
    """Packed 4-bit matrices of bitsandbytes."""

    def __init__(self, linears: Sequence[Any], dtype: Any) -> None:
        self.dtype = dtype
        self.weights = [(linear.weight.data, linear.weight.quant_state) for linear in linears]
        self.rows = [state.shape[0] for _, state in self.weights]
        self.columns = self.weights[0][1].shape[1]

    def matrix(self) -> Any:
        """The weights in `dtype` (outputs, inputs), valid until the next call for a matrix of this size."""
        scratch = _scratch(sum(self.rows), self.columns, self.dtype, self.weights[0][0].device)
        if scratch.owner is not self:
            start = 0
            for (packed, state), rows in zip(self.weights, self.rows, strict=True):
                _unpack(packed, state, scratch.matrix[start : start + rows])
                start += rows
            scratch.owner = self
        return scratch.matrix

    def forward(self, x: Any) -> Any:
        """x W^T."""
        return x @ self.matrix().T

    def backward(self, gradient: Any) -> Any:
        """gradient W."""
        return gradient @ self.matrix()


class _Scratch:
    """Memory for one unpacked matrix, and whose weights lie in it."""

    owner: Any = None

    def __init__(self, rows: int, columns: int, dtype: Any, device: Any) -> None:
        import torch

        self.matrix = torch.empty(rows, columns, dtype=dtype, device=device)


@cache
def _scratch(rows: int, columns: int, dtype: Any, device: Any) -> _Scratch:
    return _Scratch(rows, columns, dtype, device)


def _unpack(packed: Any, state: Any, result: Any) -> None:
    if packed.is_cuda and state.nested and state.blocksize == 64 and state.state2.blocksize == 256:
        from petool_lite.train.triton_kernels import unpacked_nf4

        count = result.numel() // 2
        unpacked_nf4[(-(-count // 1024),)](
            packed, state.code, state.state2.code, state.absmax, state.state2.absmax, state.offset, result, count,
            BLOCK=1024,
        )  # fmt: skip
        return
    from bitsandbytes.functional import dequantize_4bit

    result.copy_(dequantize_4bit(packed, state).to(result.dtype))
