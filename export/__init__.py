"""`export`: adapter + base -> merged weights -> GGUF -> quantized files, then checked.

No network, no compiler, no checkout of llama.cpp: the quantizer is the one inside llama-cpp-python.
"""

import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petool_lite.export.gguf import write_gguf
from petool_lite.export.merge import Adapter, load_adapter
from petool_lite.export.quantize import TYPES, quantize
from petool_lite.export.verify import verify

from petool_lite.base import Base, cache_root, file_sha256, resolve_base
from petool_lite.console import Report, silent
from petool_lite.errors import FAILED, PetoolError
from petool_lite.runs import draft, read_manifest, versions, write_json

_WORK = ".merge-"  # folder of the 16-bit file between merge and quantizing

__all__ = ["TYPES", "Export", "export_base", "export_run"]


@dataclass(frozen=True)
class Export:
    """One finished file: its type, path, size in bytes and SHA-256."""

    type: str
    path: Path
    bytes: int
    sha256: str


def export_run(run: Path, types: list[str], report: Report = silent) -> tuple[list[Export], dict[str, Any]]:
    """Write model.<type>.gguf for each type into the run's export folder; return them and export.json's content."""
    started = time.time()
    manifest = read_manifest(run)
    base = resolve_base(manifest["base"]["name"], lambda text: report(text, 0, 0, ""))
    adapter = load_adapter(run / "adapter")
    extra = {
        "petool_lite.prompt_style": manifest["prompt_style"],
        "petool_lite.setting": manifest["setting"],
        "petool_lite.version": versions().get("petool-lite", "unknown"),
    }
    folder = run / "export"
    targets = {name: folder / f"model.{name}.gguf" for name in types}
    checks: dict[str, dict[str, Any]] = {}

    def check(name: str, path: Path) -> None:
        checks[name] = verify(path, base, report)

    merged = _write(base, adapter, extra, targets, report, check)
    exports = [Export(name, path, path.stat().st_size, file_sha256(path)) for name, path in targets.items()]
    document = {
        "base": base.name,
        "merged_tensors": merged,
        "files": [{"type": e.type, "file": e.path.name, "bytes": e.bytes, "sha256": e.sha256} for e in exports],
        "checks": checks,
        "versions": versions(),
        "seconds": round(time.time() - started, 2),
    }
    write_json(folder / "export.json", document)
    return exports, document


def export_base(base_name: str, type_name: str, report: Report = silent) -> Path:
    """The untouched base in GGUF type `type_name`, made once and cached: what a tuned file is compared with."""
    base = resolve_base(base_name, lambda text: report(text, 0, 0, ""))
    identity = file_sha256(base.gguf)[:16] if base.gguf else _weights_identity(base.directory)
    target = cache_root() / "exports" / f"{base.directory.name}-{identity}.{type_name}.gguf"
    if not target.is_file():
        _write(base, None, {}, {type_name: target}, report)
    return target


def _weights_identity(directory: Path) -> str:
    """A key for a weights directory: names, sizes and times of its files (hashing gigabytes would cost a minute)."""
    import hashlib

    facts = sorted(
        (file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in directory.glob("*.safetensors")
    )
    return hashlib.sha256(repr((str(directory), facts)).encode()).hexdigest()[:16]


def _write(
    base: Base,
    adapter: Adapter | None,
    extra: dict[str, str],
    targets: dict[str, Path],
    report: Report,
    check: Callable[[str, Path], None] = lambda name, path: None,
) -> int:
    """Write every target through one temporary 16-bit file; return how many tensors the adapter changed.

    A file gets its final name only after `check(type, path)` has passed.
    """
    unknown = [name for name in targets if name not in TYPES]
    if unknown:
        raise PetoolError(f"unknown GGUF type: {', '.join(unknown)}", f"one of: {', '.join(TYPES)}", FAILED)
    folder = next(iter(targets.values())).parent
    folder.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    _check_disk(base, folder, len(targets))
    with tempfile.TemporaryDirectory(prefix=_WORK, dir=folder) as work:
        merged_file = Path(work) / "merged.bf16.gguf"
        changed = write_gguf(base, adapter, extra, merged_file, report)
        if adapter and changed != len(adapter.modules):
            raise PetoolError(
                f"{changed} tensors changed, but the adapter has {len(adapter.modules)} modules",
                "the adapter is untrained, or belongs to another base",
            )
        for number, (name, target) in enumerate(targets.items()):
            report("quantizing", number, len(targets), name)
            with draft(target) as path:
                quantize(merged_file, path, name)
                check(name, path)
            report("quantizing", number + 1, len(targets), name)
    return changed


def _remove_leftovers(folder: Path) -> None:
    """What a killed export left behind in `folder`."""
    for leftover in [*folder.glob(".*.draft"), *folder.glob(f"{_WORK}*")]:
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _check_disk(base: Base, folder: Path, targets: int) -> None:
    weights = sum(file.stat().st_size for file in base.directory.glob("*.safetensors"))
    needed = weights + targets * weights  # an upper bound: a quantized file is smaller than its source
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise PetoolError(
            f"{folder} has {free / 2**30:.1f} GiB free, the export may need {needed / 2**30:.1f}",
            "free some space, or move the run to a larger disk",
        )
