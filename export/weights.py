"""A model's weights: where each tensor lies in the safetensors files, read some rows at a time.

Read by position into small buffers, so that the files' pages never count as this process's memory and several threads
read at once. The library's own reader takes a map of the whole file, or, by position, a whole tensor for every slice.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petool_lite.console import Report, silent
from petool_lite.errors import PetoolError
from petool_lite.families import COMPUTED, Shape, gguf_name, tensor_shapes
from petool_lite.models import sound_weight_files

_TYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}  # safetensors' name -> torch's


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

    def read(self, first: int = 0, last: int | None = None) -> Any:
        """Rows [first, last), or all, as a float32 torch tensor (rows, columns); PetoolError if the file ends there."""
        import numpy as np
        import torch

        kind = getattr(torch, _TYPES[self.dtype])
        rows, width = (self.rows if last is None else last) - first, self.columns * kind.itemsize
        raw: Any = np.fromfile(self.file, np.uint8, rows * width, offset=self.offset + first * width)
        if raw.size < rows * width:
            raise PetoolError(f"{self.file} ends inside {self.name}", "get the model again")
        return torch.from_numpy(raw).view(kind).reshape(rows, self.columns).float()


def find_tensors(directory: Path, shape: Shape, report: Report = silent) -> list[Tensor]:
    """Every tensor of a model directory, one file or shards, without a tied output head.

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
                found[tensor.name] = _fitting(tensor, expected, shape)
    missing = set(expected) - set(found)
    if missing:
        what = f"incomplete weights in {directory}: {min(missing)} is missing, {len(missing)} in all"
        raise PetoolError(what, "get the model again")
    if computed:
        report(f"left out: {computed} tensors of rotary angles ({COMPUTED[0]}), which are computed anew", 0, 0, "")
    return list(found.values())


def _fitting(tensor: Tensor, expected: dict[str, tuple[int, ...]], shape: Shape) -> Tensor:
    """The tensor, if a model of the expected shapes has it."""
    if tensor.dtype not in _TYPES:
        hint = "give the model in bfloat16, float16 or float32; --set model.precision=nf4 quantizes it for training"
        raise PetoolError(f"{tensor.name} in {tensor.file} has the type {tensor.dtype}", hint)
    if tensor.name not in expected:
        gguf_name(tensor.name, shape.family)  # which has words for what no model of the family has
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
