"""The one pass: each tensor is read once, merged in float32, and written in every target type, by bands of rows."""

import math
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from petool_lite.console import Report
from petool_lite.errors import PetoolError, in_words
from petool_lite.export.gguf import ROPE, Places, file_order, permute, write_header
from petool_lite.export.quantize import quantize_rows, tensor_bytes
from petool_lite.export.source import Source, Tensor, nf4_round_trip
from petool_lite.families import gguf_name, reordered_heads, rope_divisors, rope_of
from petool_lite.places import default_threads

_BAND = 1 << 19  # weights in a band: 2 MiB as float32, about what a core's cache holds


@dataclass
class Change:
    """How far training moved one tensor: sums of squares of the difference and of the base's weights."""

    delta: float = 0.0
    base: float = 0.0
    changed: bool = False

    def __add__(self, other: "Change") -> "Change":
        return Change(self.delta + other.delta, self.base + other.base, self.changed or other.changed)


Changes = dict[str, Change]  # by the name of a trained tensor
Target = tuple[int, Places]  # handle of a file that is written, and where each tensor goes


def write_files(source: Source, paths: Mapping[str, Path], report: Report) -> Changes:
    """Write one GGUF file for each type in `paths`; raises PetoolError for a full disk, and weights not to be read."""
    failing = in_words("cannot write the export; nothing of it is left", "make room, or check the disk", OSError)
    with failing, ExitStack() as held:
        return _run(source, _targets(source, paths, held), report)


def _targets(source: Source, paths: Mapping[str, Path], held: ExitStack) -> list[Target]:
    """Files with their header written, of their whole size; a disk that is too small shows before the work."""
    shapes = {gguf_name(tensor.name, source.shape): tensor.shape for tensor in source.tensors.values()}
    if rope_of(source.config).kind == "llama3":
        shapes[ROPE] = (source.shape.head_size // 2,)
    shapes = {name: shapes[name] for name in sorted(shapes, key=file_order)}
    targets, sizes = list[Target](), []
    for name, path in paths.items():
        places, size = write_header(path, source, name, shapes)
        handle = os.open(path, os.O_RDWR)
        held.callback(os.close, handle)
        targets.append((handle, places))
        sizes.append(size)
    folder = next(iter(paths.values())).parent
    free = shutil.disk_usage(folder).free
    if free < sum(sizes):
        what = f"{folder} has {free / 2**30:.2f} GiB free, the export needs {sum(sizes) / 2**30:.2f}"
        raise PetoolError(what, "free some space, or move the run to a larger disk")
    for (handle, _), size in zip(targets, sizes, strict=True):
        os.ftruncate(handle, size)
    return targets


def _run(source: Source, targets: list[Target], report: Report) -> Changes:
    import torch

    changes = dict[str, Change]()
    divisors = rope_divisors(rope_of(source.config), source.shape.head_size)
    if divisors is not None:
        _write(targets, ROPE, divisors.reshape(1, -1), 0, None)
    stage = "merging and quantizing" if source.adapter else f"quantizing the {'model' if source.before else 'base'}"
    before = torch.get_num_threads()
    # one thread a band: torch must not start threads of its own inside them
    with ThreadPoolExecutor(default_threads(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            work = []
            for tensor in source.tensors.values():
                bands = _Bands(source, targets, tensor)
                work.append((tensor.name, [pool.submit(bands.work, *rows) for rows in bands.all_rows()]))
            for done, (name, futures) in enumerate(work, 1):
                changes[name] = sum((future.result() for future in futures), Change())
                report(stage, done, len(work), name.removeprefix("model."))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            torch.set_num_threads(before)
    return {name: changes.get(name, Change()) for name in (source.adapter.modules if source.adapter else source.before)}


class _Bands:
    """One tensor on its way into every file, a band of rows at a time."""

    def __init__(self, source: Source, targets: list[Target], tensor: Tensor) -> None:
        self.source, self.targets, self.tensor = source, targets, tensor
        self.heads = reordered_heads(tensor.name, source.shape)
        self._lock = Lock()
        self._nf4: Any = None

    def all_rows(self) -> Iterator[tuple[int, int]]:
        """First row and end of each band; where rows are reordered within a head, a band holds whole heads."""
        rows, step = self.tensor.rows, max(1, _BAND // self.tensor.shape[-1])
        if self.heads:
            size = rows // self.heads
            step = max(1, step // size) * size
        return ((first, min(first + step, rows)) for first in range(0, rows, step))

    def work(self, first: int, last: int) -> Change:
        """Read, merge, check, reorder, quantize and write the rows [first, last); how training moved them."""
        weight, change = self._weight(first, last)
        if self.heads:
            weight = permute(weight, self.heads * (last - first) // self.tensor.rows)
        if self.tensor.rows == 1 and "norm" in self.tensor.name:
            weight = weight + self.source.shape.family.shift
        # a sum shows any NaN or infinity in one pass; the quantizer itself would hide some
        if not math.isfinite(float(weight.sum())):
            raise PetoolError(f"{self.tensor.name} holds values that are not finite", "a damaged model or base")
        name = gguf_name(self.tensor.name, self.source.shape)
        _write(self.targets, name, weight.contiguous(), first, (self.source.importance or {}).get(name))
        return change

    def _weight(self, first: int, last: int) -> tuple[Any, Change]:
        """The rows as they are exported, in float32, and how training moved them."""
        adapter, name = self.source.adapter, self.tensor.name
        if adapter is not None and name in adapter.modules:
            with self._lock:  # the 4-bit round trip is made by the thread that needs it first
                if self.source.nf4 and self._nf4 is None:
                    self._nf4 = nf4_round_trip(self.tensor.read())
            before = self.tensor.read(first, last) if self._nf4 is None else self._nf4[first:last].float()
            delta = adapter.delta(name, first, last)
            weight = before + delta
        else:
            weight = self.tensor.read(first, last)
            if name not in self.source.before:
                return weight, Change()
            before = self.source.before[name].read(first, last)
            delta = weight - before
        return weight, Change(_square(delta), _square(before), not weight.equal(before))


def _square(part: Any) -> float:
    return float(part.reshape(-1).dot(part.reshape(-1)))


def _write(targets: list[Target], name: str, weight: Any, first: int, importance: Any) -> None:
    """Quantize a band that starts at row `first` and put it into its place in every file."""
    made: dict[str, Any] = {}
    for handle, places in targets:
        kind, start = places[name]
        if kind not in made:
            made[kind] = quantize_rows(weight, kind, importance)
        position = start + first * tensor_bytes(kind, weight.shape[1])
        view = memoryview(made[kind])
        while len(view):
            count = os.pwrite(handle, view, position)
            view, position = view[count:], position + count
