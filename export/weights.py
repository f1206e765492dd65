"""A model's weights: where each tensor lies in the safetensors files, read a band of rows at a time.

Read by position into small buffers, so that the files' pages never count as this process's memory and several threads
read at once. The library's own reader takes a map of the whole file, or, by position, a whole tensor for every slice.
"""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petool_lite.console import Report, silent
from petool_lite.errors import PetoolError
from petool_lite.families import COMPUTED, Shape, gguf_name, tensor_shapes
from petool_lite.models import sound_weight_files

_BYTES = {"BF16": 2, "F16": 2, "F32": 4}


@dataclass(frozen=True)
class Tensor:
    """One tensor of a model: `shape` (rows, columns) or (columns,), `offset` in bytes from the file's start."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    offset: int

    @property
    def rows(self) -> int:
        """Rows of a matrix; 1 for a vector."""
        return self.shape[0] if len(self.shape) == 2 else 1

    @property
    def columns(self) -> int:
        """Length of one row."""
        return self.shape[-1]


def find_tensors(directory: Path, shape: Shape, report: Report = silent) -> list[Tensor]:
    """Every tensor of a Llama model directory, one file or shards, without a tied output head.

    Raises PetoolError if a file is damaged or cut, or a tensor is missing, double, or of a name, type or shape that
    a model of this `shape` does not have. What every program computes anew is left out and told.
    """
    expected, found, computed = tensor_shapes(shape), dict[str, Tensor](), 0
    for file in sound_weight_files(directory):
        for tensor in _tensors_of(file):
            if tensor.name.endswith(COMPUTED):
                computed += 1
            elif tensor.name in found:
                raise PetoolError(f"{directory} holds {tensor.name} twice", "remove the files of another format")
            elif not (tensor.name == "lm_head.weight" and shape.tied):
                found[tensor.name] = _fitting(tensor, expected)
    missing = set(expected) - set(found)
    if missing:
        raise PetoolError(
            f"incomplete weights in {directory}: {min(missing)} is missing, {len(missing)} in all",
            "get the model again",
        )
    if computed:
        report(f"left out: {computed} tensors of rotary angles ({COMPUTED[0]}), which are computed anew", 0, 0, "")
    return list(found.values())


def _fitting(tensor: Tensor, expected: dict[str, tuple[int, ...]]) -> Tensor:
    """The tensor, if a model of the expected shapes has it."""
    if tensor.dtype not in _BYTES:
        raise PetoolError(
            f"{tensor.name} in {tensor.file} has the type {tensor.dtype}",
            "give the model in bfloat16, float16 or float32; --set model.precision=nf4 quantizes it for training",
        )
    if tensor.name not in expected:
        gguf_name(tensor.name)  # which has words for what no Llama has
        raise PetoolError(f"{tensor.name} is more than config.json says", "get the model again")
    if tensor.shape != expected[tensor.name]:
        raise PetoolError(
            f"{tensor.name} in {tensor.file} has the shape {list(tensor.shape)}, by config.json it has "
            f"{list(expected[tensor.name])}",
            "get the model again",
        )
    return tensor


def _tensors_of(file: Path) -> Iterator[Tensor]:
    """Read a safetensors header: a length of 8 bytes, then JSON of that length, then the data."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        yield Tensor(name, tuple(entry["shape"]), entry["dtype"], file, 8 + length + entry["data_offsets"][0])


class Reader:
    """Reads bands of rows as float32. Safe to share between threads."""

    def __init__(self, handles: dict[Path, int]) -> None:
        self._handles = handles

    def rows(self, tensor: Tensor, first: int, last: int) -> Any:
        """Rows [first, last) of `tensor` as a float32 torch tensor of shape (last - first, columns)."""
        import torch

        width = tensor.columns * _BYTES[tensor.dtype]
        buffer = bytearray((last - first) * width)
        view, position = memoryview(buffer), tensor.offset + first * width
        while len(view):
            count = os.preadv(self._handles[tensor.file], [view], position)
            if count == 0:
                raise PetoolError(f"{tensor.file} ends inside {tensor.name}", "get the model again")
            view, position = view[count:], position + count
        kinds = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
        return torch.frombuffer(buffer, dtype=kinds[tensor.dtype]).reshape(last - first, tensor.columns).float()

    def whole(self, tensor: Tensor) -> Any:
        """The tensor as float32, in its own shape."""
        return self.rows(tensor, 0, tensor.rows).reshape(tensor.shape)


@contextmanager
def open_weights(tensors: list[Tensor]) -> Iterator[Reader]:
    """A Reader over the files of `tensors`; they are closed at the end."""
    with ExitStack() as stack:
        files = {tensor.file: stack.enter_context(tensor.file.open("rb", buffering=0)) for tensor in tensors}
        yield Reader({path: file.fileno() for path, file in files.items()})
