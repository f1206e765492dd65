"""The one pass: each tensor is read once, an adapter's delta added in float32, and written in every target type.

Threads take bands of rows: read, merge, quantize, write in place. Nothing larger than a band is held per thread,
and nothing in 16 bits is written unless it was asked for.
"""

import errno
import math
import os
import shutil
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from petool_lite.export.gguf import ROPE, Plan, file_order, permute, write_header
from petool_lite.export.merge import nf4_round_trip
from petool_lite.export.quantize import choose_types, quantize_rows, tensor_bytes
from petool_lite.export.source import Source
from petool_lite.export.weights import Reader, Tensor, open_weights

from petool_lite.console import Report
from petool_lite.errors import PetoolError
from petool_lite.families import gguf_name, reordered_heads, rope_divisors

_BAND = 1 << 19  # weights in a band: 2 MiB as float32, about what a core's cache holds
_AHEAD = 3  # tensors in work at once, so that no thread waits at the end of one
_METADATA = 32 << 20  # room for keys and tokenizer in the disk estimate


@dataclass
class Change:
    """How far training moved one tensor: sums of squares of the difference and of the base's weights."""

    delta: float = 0.0
    base: float = 0.0
    changed: bool = False
    lock: Lock = field(default_factory=Lock)

    def add(self, delta: Any, base: Any, changed: bool) -> None:
        """Count one band, given as tensors."""
        squares = _square(delta), _square(base)
        with self.lock:
            self.delta += squares[0]
            self.base += squares[1]
            self.changed |= changed


def _square(part: Any) -> float:
    import torch

    return float(torch.dot(part.reshape(-1), part.reshape(-1)))


@dataclass(frozen=True)
class Target:
    """A file being written: where each tensor starts, and its type."""

    handle: int
    types: Mapping[str, str]
    starts: Mapping[str, int]


def plan(source: Source, types: list[str]) -> dict[str, Plan]:
    """The tensors of each file type."""
    shapes = {gguf_name(tensor.name): tensor.shape for tensor in source.tensors}
    if source.rope.kind == "llama3":
        shapes[ROPE] = (source.shape.head_size // 2,)
    columns = {name: shapes[name][-1] for name in sorted(shapes, key=file_order)}
    plans: dict[str, Plan] = {}
    for name in types:
        chosen = choose_types(columns, name, source.shape, source.importance is not None)
        plans[name] = {tensor: (kind, shapes[tensor]) for tensor, kind in chosen.items()}
    return plans


def check_disk(folder: Path, plans: dict[str, Plan]) -> None:
    """Raise PetoolError if `folder` has too little room for the files of `plans`, metadata estimated from above."""
    needed = len(plans) * _METADATA
    for kind, shape in (tensor for tensors in plans.values() for tensor in tensors.values()):
        needed += tensor_bytes(kind, shape[0] if len(shape) == 2 else 1, shape[-1]) + 32
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise PetoolError(
            f"{folder} has {free / 2**30:.2f} GiB free, the export needs {needed / 2**30:.2f}",
            "free some space, or move the run to a larger disk",
        )


def write_files(
    source: Source, paths: Mapping[str, Path], extra: Mapping[str, str], threads: int, report: Report
) -> dict[str, Change]:
    """Write one GGUF file for each type in `paths`; return how each trained tensor changed, by its name.

    Raises PetoolError if the disk is or gets full, the base cannot be read, or a weight is not finite.
    """
    plans = plan(source, list(paths))
    check_disk(next(iter(paths.values())).parent, plans)
    try:
        with (
            open_weights([*source.tensors, *source.before.values()]) as reader,
            _targets(source, paths, plans, extra) as targets,
        ):
            return _run(source, reader, targets, threads, report)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise PetoolError("the disk is full; what was written is removed", "free some space") from error
        raise PetoolError(f"cannot write the export: {error}", "check the folder and the disk") from error


@contextmanager
def _targets(
    source: Source, paths: Mapping[str, Path], plans: dict[str, Plan], extra: Mapping[str, str]
) -> Iterator[list[Target]]:
    """Files with their header written and their whole size reserved, so that a full disk shows before the work."""
    targets: list[Target] = []
    try:
        for name, path in paths.items():
            starts, size = write_header(path, source, name, plans[name], extra)
            handle = os.open(path, os.O_RDWR)
            targets.append(Target(handle, {tensor: kind for tensor, (kind, _) in plans[name].items()}, starts))
            os.ftruncate(handle, size)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle, 0, size)
        yield targets
    finally:
        for target in targets:
            os.close(target.handle)


def _run(source: Source, reader: Reader, targets: list[Target], threads: int, report: Report) -> dict[str, Change]:
    import torch

    changes = {name: Change() for name in (source.adapter.modules if source.adapter else source.before)}
    divisors = rope_divisors(source.rope, source.shape.head_size)
    if divisors is not None:
        _write(targets, ROPE, divisors.reshape(1, -1), 0, None)
    tensors = sorted(source.tensors, key=lambda tensor: file_order(gguf_name(tensor.name)))
    stage = "merging and quantizing" if source.adapter else f"quantizing the {'model' if source.before else 'base'}"
    before = torch.get_num_threads()
    waiting: deque[tuple[Tensor, list[Future[None]]]] = deque()
    done = 0
    # one thread a band: torch must not start threads of its own inside them
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for tensor in [*tensors, *[None] * _AHEAD]:
                if tensor is not None:
                    band = _Bands(source, reader, targets, tensor, changes.get(tensor.name))
                    waiting.append((tensor, [pool.submit(band.work, *rows) for rows in band.all_rows()]))
                if len(waiting) >= _AHEAD or (tensor is None and waiting):
                    finished, futures = waiting.popleft()
                    for future in futures:
                        future.result()
                    done += 1
                    report(stage, done, len(tensors), finished.name.removeprefix("model."))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            torch.set_num_threads(before)
    return changes


class _Bands:
    """One tensor on its way into every file, a band of rows at a time."""

    def __init__(
        self, source: Source, reader: Reader, targets: list[Target], tensor: Tensor, change: Change | None
    ) -> None:
        self.source, self.reader, self.targets, self.tensor, self.change = source, reader, targets, tensor, change
        self.heads = reordered_heads(tensor.name, source.shape)
        self.name = gguf_name(tensor.name)
        self.importance = (source.importance or {}).get(self.name)
        self._lock = Lock()
        self._nf4: Any = None

    def all_rows(self) -> Iterator[tuple[int, int]]:
        """First row and end of each band; where rows are reordered within a head, a band holds whole heads."""
        rows, step = self.tensor.rows, max(1, _BAND // self.tensor.columns)
        if self.heads:
            size = rows // self.heads
            step = max(1, step // size) * size
        return ((first, min(first + step, rows)) for first in range(0, rows, step))

    def work(self, first: int, last: int) -> None:
        """Read, merge, check, reorder, quantize and write the rows [first, last)."""
        weight = self._weight(first, last)
        if self.heads:
            weight = permute(weight, self.heads * (last - first) // self.tensor.rows)
        # a sum shows any NaN or infinity in one pass; the quantizer itself would hide some
        if not math.isfinite(float(weight.sum())):
            raise PetoolError(
                f"{self.tensor.name} holds values that are not finite", "what was trained is damaged, or the base"
            )
        _write(self.targets, self.name, weight.contiguous(), first, self.importance)

    def _weight(self, first: int, last: int) -> Any:
        """The rows as they are exported, in float32; how training moved them is counted."""
        import torch

        adapter, change, name = self.source.adapter, self.change, self.tensor.name
        if change is None:
            return self.reader.rows(self.tensor, first, last)
        if adapter is None:
            weight = self.reader.rows(self.tensor, first, last)
            before = self.reader.rows(self.source.before[name], first, last)
            delta = weight - before
            change.add(delta, before, bool(delta.any()))
            return weight
        before = self._as_trained(first, last)
        delta = adapter.delta(name, first, last)
        weight = before + delta
        change.add(delta, before, not torch.equal(weight, before))
        return weight

    def _as_trained(self, first: int, last: int) -> Any:
        """The base's rows as training had them; the 4-bit round trip is made by the thread that needs it first."""
        if not self.source.nf4:
            return self.reader.rows(self.tensor, first, last)
        with self._lock:
            if self._nf4 is None:
                self._nf4 = nf4_round_trip(self.reader.whole(self.tensor))
        return self._nf4[first:last].float()


def _write(targets: list[Target], name: str, weight: Any, first: int, importance: Any) -> None:
    """Quantize a band that starts at row `first` and put it into its place in every file."""
    made: dict[str, Any] = {}
    for target in targets:
        kind = target.types[name]
        if kind not in made:
            made[kind] = quantize_rows(weight, kind, importance)
        position = target.starts[name] + first * tensor_bytes(kind, 1, weight.shape[1])
        view = memoryview(made[kind])
        while len(view):
            count = os.pwrite(target.handle, view, position)
            view, position = view[count:], position + count
