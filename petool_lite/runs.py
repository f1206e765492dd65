"""Run directories: made, found and described here. The manifest is written last, so its presence means complete."""

import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from petool_lite.errors import PetoolError, in_words
from petool_lite.text import read_object

# What a run trained lies in a folder of its own: train.method -> its name.
TRAINED = {"lora": "adapter", "full": "model"}
_PACKAGES = (
    "petool-lite", "unsloth", "unsloth_zoo", "torch", "transformers", "trl", "peft", "bitsandbytes", "datasets",
    "tokenizers", "llama-cpp-python", "gguf",
)  # fmt: skip


def runs_root() -> Path:
    """Folder that holds the runs: $PETOOL_LITE_RUNS, else ./runs."""
    return Path(os.environ.get("PETOOL_LITE_RUNS") or "runs")


@contextmanager
def draft(target: Path) -> Iterator[Path]:
    """Yield a path beside `target` to write to; it becomes `target` on success and is removed on any failure."""
    target.parent.mkdir(parents=True, exist_ok=True)
    path = target.parent / f".{target.name}.{os.urandom(4).hex()}.draft"
    try:
        yield path
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        elif target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
    except OSError as error:
        if error.filename == str(path):  # whoever reads of it knows the file's own name
            error.filename = str(target)
        raise
    finally:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_text(target: Path, text: str) -> None:
    """Write a whole text file, never half of one."""
    with draft(target) as path:
        path.write_text(text)


def write_json(target: Path, value: Any) -> None:
    """Write a whole JSON file, never half of one."""
    write_text(target, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` against other commands that write to it, drafts of killed ones removed; under torchrun the first
    process holds it for all. Raises PetoolError that names the holder; the kernel lets go when a process ends."""
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    from filelock import FileLock, Timeout

    lock = folder / ".lock"
    with in_words(f"cannot write to {lock.parent}", "check its permissions and disk", OSError):
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            held = FileLock(lock, blocking=False).acquire()
        except Timeout as error:  # an OSError, too
            other = writer(lock) or "another process"
            raise PetoolError(f"{other} is writing to {folder}", "wait for it to end, or stop it") from error
    with held:
        for path in folder.glob(".*.draft"):  # of one that was killed
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        name = Path(sys.argv[0]).name
        line = shlex.join(["petool-lite" if name == "__main__.py" else name, *sys.argv[1:]])
        lock.write_text(f"{os.getpid()} {line[:400]}\n")
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def writer(lock: Path) -> str:
    """The process that holds a lock file, by its text; nothing where none does, or one that was killed did."""
    try:
        pid, _, command = lock.read_text(errors="replace").strip().partition(" ")
        os.kill(int(pid), 0)
    except (OSError, ValueError, OverflowError):
        return ""
    return f"process {pid} ({command})"


def create_run(name: str) -> Path:
    """Make a new run directory, `<name>-<date>-<time>`; a number is added where that is taken."""
    first = path = runs_root() / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    with in_words(f"cannot write to {first.parent}", "set PETOOL_LITE_RUNS to another folder", OSError):
        for number in count(2):
            with suppress(FileExistsError):
                path.mkdir(parents=True)
                break
            path = first.with_name(f"{first.name}-{number}")
    return path


def is_complete(run: Path) -> bool:
    """Whether the run has its manifest."""
    return (run / "manifest.json").is_file()


def list_runs() -> list[Path]:
    """All run directories, the newest last; a draft (see `draft`) is none."""
    found = sorted(runs_root().glob("[!.]*/recipe.toml"), key=lambda path: path.stat().st_mtime)
    return [path.parent for path in found]


def state(run: Path) -> str:
    """Whether a run is complete, running just now, or unfinished."""
    return "complete" if is_complete(run) else "running" if writer(run / ".lock") else "unfinished"


def find_run(name: str | None) -> Path:
    """A complete run as in `named_run`; the newest for None. Raises PetoolError for none."""
    if name is None:
        complete = [path for path in list_runs() if is_complete(path)]
        if not complete:
            raise PetoolError(f"no complete run in {runs_root()}", "train one first: petool-lite train demo")
        return complete[-1]
    path = named_run(name)
    if state(path) == "running":
        raise PetoolError(f"{writer(path / '.lock')} is training the run {path}", "wait for it to end")
    if not is_complete(path):
        raise PetoolError(f"the run {path} is not finished", f"finish it: petool-lite train --resume {path}")
    return path


def named_run(name: str) -> Path:
    """A run, complete or not, by path, name or the beginning of one name; raises PetoolError for none or several."""
    named = [path for path in (Path(name).expanduser(), runs_root() / name) if path.is_dir()]
    begun = named[:1] or [run for run in list_runs() if name and run.name.startswith(name)]
    if len(begun) != 1:
        several = f"; {len(begun)} begin so, such as {begun[0].name}" if begun else ""
        raise PetoolError(f"no such run: {name}{several}", "`petool-lite runs list` shows them")
    return begun[0]


def read_manifest(run: Path) -> dict[str, Any]:
    """The manifest of a complete run."""
    return read_object(run / "manifest.json", f"{run} has no sound manifest", "train again, or give another run")


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide a result."""
    from importlib import metadata

    found = {}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
