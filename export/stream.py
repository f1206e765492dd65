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

from petool_lite.export.gguf import ROPE, Content, file_order, gguf_name, permute, rope_factors, write_header
from petool_lite.export.merge import Adapter, delta_rows
from petool_lite.export.quantize import quantize_rows, tensor_bytes
from petool_lite.export.tensor_types import Architecture, choose_types
from petool_lite.export.weights import Reader, Tensor, open_weights

from petool_lite.console import Report
from petool_lite.errors import PetoolError
from petool_lite.models import Base

_BAND = 1 << 19  # weights in a band: 2 MiB as float32, about what a core's cache holds
_AHEAD = 3  # tensors in work at once, so that no thread waits at the end of one
_METADATA = 32 << 20  # room for keys and tokenizer in the disk estimate


@dataclass(frozen=True)
class Source:
    """What is exported: the base, the config and tensors, and the adapter and importance, if any.

    The tensors are the base's, or those of a model of its own that training made of it: then `before` has the base's.
    `importance` maps GGUF tensor names to float32 arrays (columns,). `nf4` takes the weights of adapted matrices as
    4-bit training saw them.
    """

    base: Base
    config: dict[str, Any]
    tensors: list[Tensor]
    adapter: Adapter | None = None
    importance: dict[str, Any] | None = None
    nf4: bool = False
    before: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass
class Change:
    """How far training moved one tensor: sums of squares of the difference and of the base's weights."""

    delta: float = 0.0
    base: float = 0.0
    changed: bool = False
    lock: Lock = field(default_factory=Lock)

    def add(self, delta: float, base: float, changed: bool) -> None:
        """Count one band."""
        with self.lock:
            self.delta += delta
            self.base += base
            self.changed |= changed


@dataclass(frozen=True)
class Target:
    """A file being written: where each tensor starts, and its type."""

    handle: int
    types: dict[str, str]
    starts: dict[str, int]


def plan(source: Source, types: list[str]) -> dict[str, dict[str, tuple[str, tuple[int, ...]]]]:
    """File type -> GGUF tensor name -> (type, shape), in file order."""
    config = source.config
    shapes = {gguf_name(tensor.name): tensor.shape for tensor in source.tensors}
    factors = rope_factors(config)
    if factors is not None:
        shapes[ROPE] = tuple(factors.shape)
    heads = config["num_attention_heads"]
    tied = "output.weight" not in shapes
    model = Architecture(config["num_hidden_layers"], heads, config.get("num_key_value_heads", heads), tied)
    columns = {name: shapes[name][-1] for name in sorted(shapes, key=file_order)}
    plans = {}
    for name in types:
        chosen = choose_types(columns, name, model, source.importance is not None)
        plans[name] = {tensor: (kind, shapes[tensor]) for tensor, kind in chosen.items()}
    return plans


def bytes_needed(plans: dict[str, dict[str, tuple[str, tuple[int, ...]]]]) -> int:
    """Disk space that the files of `plans` take, metadata estimated from above."""
    total = 0
    for tensors in plans.values():
        total += _METADATA
        for kind, shape in tensors.values():
            total += tensor_bytes(kind, shape[0] if len(shape) == 2 else 1, shape[-1]) + 32
    return total


def check_disk(folder: Path, needed: int) -> None:
    """Raise PetoolError if `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise PetoolError(
            f"{folder} has {free / 2**30:.2f} GiB free, the export needs {needed / 2**30:.2f}",
            "free some space, or move the run to a larger disk",
        )


def write_files(
    source: Source, paths: dict[str, Path], extra: dict[str, str], threads: int, report: Report
) -> dict[str, Change]:
    """Write one GGUF file for each type in `paths`; return how each trained tensor changed, by its name.

    Raises PetoolError if the disk is full, the base cannot be read, or a weight is not finite.
    """
    plans = plan(source, list(paths))
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
    source: Source, paths: dict[str, Path], plans: dict[str, Any], extra: dict[str, str]
) -> Iterator[list[Target]]:
    """Files with their header written and their whole size reserved, so that a full disk shows before the work."""
    targets: list[Target] = []
    try:
        for name, path in paths.items():
            starts, size = write_header(path, source.base, source.config, Content(name, plans[name], extra))
            handle = os.open(path, os.O_RDWR)
            types = {tensor: kind for tensor, (kind, _) in plans[name].items()}
            targets.append(Target(handle, types, starts))
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
    factors = rope_factors(source.config)
    if factors is not None:
        _write(targets, ROPE, factors.reshape(1, -1), 0, None)
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
                    waiting.append((tensor, _submit(pool, source, reader, targets, tensor, changes.get(tensor.name))))
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


def _submit(
    pool: ThreadPoolExecutor,
    source: Source,
    reader: Reader,
    targets: list[Target],
    tensor: Tensor,
    change: Change | None,
) -> list[Future[None]]:
    """Hand a tensor's bands to the pool."""
    heads = _heads(tensor.name, source.config)
    step = max(1, _BAND // tensor.columns)
    if heads:  # rows are reordered within a head, so a band holds whole heads
        size = tensor.rows // heads
        step = max(1, step // size) * size
    nf4 = _Once(reader, tensor) if source.nf4 and change is not None else None
    name = gguf_name(tensor.name)
    importance = (source.importance or {}).get(name)

    def work(first: int, last: int) -> None:
        weight = nf4.rows(first, last) if nf4 else reader.rows(tensor, first, last)
        if source.adapter and change is not None:
            weight = _merge(weight, source.adapter, tensor.name, first, change)
        elif change is not None:
            _compare(reader.rows(source.before[tensor.name], first, last), weight, change)
        if heads:
            weight = permute(weight, heads * (last - first) // tensor.rows)
        # a sum shows any NaN or infinity in one pass; the quantizer itself would hide some
        if not math.isfinite(float(weight.sum())):
            raise PetoolError(
                f"{tensor.name} holds values that are not finite", "what was trained is damaged, or the base"
            )
        _write(targets, name, weight.contiguous(), first, importance)

    return [pool.submit(work, first, min(first + step, tensor.rows)) for first in range(0, tensor.rows, step)]


class _Once:
    """The 4-bit round trip of one tensor, made by the thread that needs it first."""

    def __init__(self, reader: Reader, tensor: Tensor) -> None:
        self._reader, self._tensor, self._lock = reader, tensor, Lock()
        self._weight: Any = None

    def rows(self, first: int, last: int) -> Any:
        from petool_lite.export.nf4 import round_trip

        with self._lock:
            if self._weight is None:
                self._weight = round_trip(self._reader.whole(self._tensor))
        return self._weight[first:last].float()


def _heads(name: str, config: dict[str, Any]) -> int:
    """Heads whose rows llama.cpp reorders; 0 for any other tensor."""
    if name.endswith("q_proj.weight"):
        return int(config["num_attention_heads"])
    if name.endswith("k_proj.weight"):
        return int(config.get("num_key_value_heads", config["num_attention_heads"]))
    return 0


def _merge(weight: Any, adapter: Adapter, name: str, first: int, change: Change) -> Any:
    import torch

    delta = delta_rows(adapter, name, first, first + weight.shape[0])
    merged = weight + delta
    change.add(_square(delta), _square(weight), change.changed or not torch.equal(merged, weight))
    return merged


def _compare(before: Any, weight: Any, change: Change) -> None:
    delta = weight - before
    change.add(_square(delta), _square(before), change.changed or bool(delta.any()))


def _square(part: Any) -> float:
    import torch

    return float(torch.dot(part.reshape(-1), part.reshape(-1)))


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
