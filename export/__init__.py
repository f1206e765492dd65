"""`export`: adapter + base -> GGUF files in one pass over the base, then checked.

No network, no compiler, no checkout of llama.cpp, no 16-bit copy of the model: weights are quantized as they are
merged, by the C functions inside llama-cpp-python.
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from petool_lite.export.merge import Adapter, check_fit
from petool_lite.export.stream import Change, Source, bytes_needed, check_disk, plan, write_files
from petool_lite.export.tensor_types import TYPES
from petool_lite.export.weights import find_tensors

from petool_lite.base import Base, cache_root, file_sha256, resolve_base
from petool_lite.console import Report, silent
from petool_lite.errors import PetoolError
from petool_lite.runs import draft

__all__ = ["TYPES", "export_base", "load_source", "write_targets"]


def export_base(base_name: str, type_name: str, report: Report = silent) -> Path:
    """The untouched base in GGUF type `type_name`, made once and cached: what a tuned file is compared with."""
    check_types([type_name])
    base = resolve_base(base_name, lambda text: report(text, 0, 0, ""))
    identity = file_sha256(base.gguf)[:16] if base.gguf else _weights_identity(base.directory)
    target = cache_root() / "exports" / f"{base.directory.name}-{identity}.{type_name}.gguf"
    if not target.is_file():
        write_targets(load_source(base), {type_name: target}, {}, report)
    return target


def _weights_identity(directory: Path) -> str:
    """A key for a weights directory: names, sizes and times of its files (hashing gigabytes would cost a minute)."""
    import hashlib

    facts = sorted(
        (file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in directory.glob("*.safetensors")
    )
    return hashlib.sha256(repr((str(directory), facts)).encode()).hexdigest()[:16]


def check_types(types: list[str]) -> None:
    """Raise PetoolError for a GGUF type that petool-lite does not write."""
    unknown = [name for name in types if name not in TYPES]
    if unknown or not types:
        raise PetoolError(f"unknown GGUF type: {', '.join(unknown) or 'none given'}", f"one of: {', '.join(TYPES)}")


def load_source(base: Base, adapter: Adapter | None = None, nf4: bool = False) -> Source:
    """The base's tensors, checked to be whole and to fit the adapter."""
    config = json.loads((base.directory / "config.json").read_text())
    tensors = find_tensors(base.directory, config)
    if adapter is not None:
        check_fit(adapter, tensors, base.name)
    return Source(base, config, tensors, adapter, nf4=nf4)


def write_targets(
    source: Source,
    targets: dict[str, Path],
    extra: dict[str, str],
    report: Report = silent,
    check: Callable[[dict[str, Path]], None] = lambda paths: None,
) -> dict[str, Change]:
    """Write a GGUF file for each type in `targets`, all in one folder; return how each adapted tensor changed.

    No file gets its final name before all are written and `check` has passed on them.
    """
    folder = next(iter(targets.values())).parent
    folder.mkdir(parents=True, exist_ok=True)
    with _only_writer(folder), ExitStack() as drafts:
        check_disk(folder, bytes_needed(plan(source, list(targets))))
        paths = {name: drafts.enter_context(draft(target)) for name, target in targets.items()}
        changes = write_files(source, paths, extra, _cores(), report)
        still = [name for name, change in changes.items() if not change.changed]
        if still:
            raise PetoolError(
                f"{len(changes) - len(still)} tensors changed, but the adapter has {len(changes)} modules: "
                f"{still[0]} did not",
                "the adapter is untrained, or belongs to another base",
            )
        check(paths)
    return changes


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Hold the folder against other exports, and remove what a killed one left in it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PetoolError(f"another export is writing to {folder}", "wait for it to end") from error
        for leftover in folder.glob(".*.draft"):
            leftover.unlink()
        yield
    finally:
        os.close(handle)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
