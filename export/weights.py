"""The base's weights: where each tensor lies in the safetensors files, read a band of rows at a time.

Tensors are read with positioned reads into small buffers, not through a map of the whole file, so that the base's
pages never count as this process's memory and several threads can read at once.
"""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petool_lite.errors import PetoolError
from petool_lite.models import BLOCK_TENSORS, sound_weight_files

_BYTES = {"BF16": 2, "F16": 2, "F32": 4}


@dataclass(frozen=True)
class Tensor:
    """One tensor of the base: `shape` (rows, columns) or (columns,), `offset` in bytes from the file's start."""

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

    @property
    def bytes(self) -> int:
        """Size in the base's own type."""
        return self.rows * self.columns * _BYTES[self.dtype]


def find_tensors(directory: Path, config: dict[str, Any]) -> list[Tensor]:
    """Every tensor of a Llama model directory, one file or shards, without a tied output head.

    Raises PetoolError if a file is damaged or cut, a tensor is missing, double, of another type or not of Llama.
    """
    found: dict[str, Tensor] = {}
    for file in sound_weight_files(directory):
        for tensor in _tensors_of(file):
            if tensor.name == "lm_head.weight" and config.get("tie_word_embeddings"):
                continue
            if tensor.name in found:
                raise PetoolError(f"{directory} holds {tensor.name} twice", "remove the files of another format")
            found[tensor.name] = tensor
    missing = _expected(config) - set(found)
    if missing:
        raise PetoolError(
            f"incomplete weights in {directory}: {min(missing)} is missing, {len(missing)} in all",
            "get the base model again",
        )
    return list(found.values())


def _tensors_of(file: Path) -> Iterator[Tensor]:
    """Read a safetensors header: a length of 8 bytes, then JSON of that length, then the data."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if not 1 <= len(entry["shape"]) <= 2 or 0 in entry["shape"]:
            raise PetoolError(f"{name} in {file} has the shape {entry['shape']}", "give a model of the Llama family")
        if entry["dtype"] not in _BYTES:
            raise PetoolError(
                f"{name} in {file} has the type {entry['dtype']}", "give the base in bfloat16, float16 or float32"
            )
        yield Tensor(name, tuple(entry["shape"]), entry["dtype"], file, 8 + length + entry["data_offsets"][0])


def _expected(config: dict[str, Any]) -> set[str]:
    layers = range(config["num_hidden_layers"])
    blocks = {f"model.layers.{layer}.{module}.weight" for layer in layers for module in BLOCK_TENSORS.values()}
    head = set() if config.get("tie_word_embeddings") else {"lm_head.weight"}
    return blocks | {"model.embed_tokens.weight", "model.norm.weight"} | head


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
                raise PetoolError(f"{tensor.file} ends inside {tensor.name}", "get the base model again")
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
