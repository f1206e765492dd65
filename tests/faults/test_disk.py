"""Full disks, read-only folders and clocks that jump: one clear line, or the work done; never half a file."""

import json
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import tiny_settings
from support_faults import finish, incomplete, one_line, unfinished

CLOCK = next(
    (str(path) for path in Path("/usr/lib").glob("*/faketime/libfaketime.so.1")), os.environ.get("FAKETIME_LIB")
)
TYPES = ["--gguf", "q8_0", "--verify", "quick"]
DATA = ["--data", "demo:test:4", "--decoding", "free", "--variants", "tuned"]


def limited(size: int):
    """For preexec_fn: no file of the process grows beyond `size` bytes."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A disk of its own with little room; skips where nothing may be mounted."""
    folder.mkdir()
    line = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    if os.getuid() != 0 or subprocess.run(line, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture(scope="module")
def whole(exported) -> Path:
    """A complete run with an export, on a disk with room."""
    return exported / "runs" / "one"


def refused(root: Path, *arguments: object, **options) -> str:
    code, said = finish(root, *arguments, **options)
    assert code == 1, said
    line = one_line(said)
    assert incomplete(root) == []
    return line


def refused_then_done(whole: Path, root: Path, size: int, verb: str, *options: str) -> None:
    """The command on a run without its results meets the limit, and without a limit does the whole work."""
    shutil.copytree(whole, root / "runs" / "one", ignore=shutil.ignore_patterns(verb))
    refused(root, verb, "--run", "one", *options, preexec_fn=limited(size))
    code, said = finish(root, verb, "--run", "one", *options)
    assert code == 0, said
    assert incomplete(root, running=False) == []


def test_a_bench_on_a_full_disk(whole, tmp_path) -> None:
    refused_then_done(whole, tmp_path, 1000, "bench", *DATA)


@pytest.mark.faults
@pytest.mark.parametrize("size", [2_000, 200_000, 2_000_000, 10_000_000])
def test_training_on_a_full_disk(tiny, tmp_path, size) -> None:
    """The rows, a checkpoint and the adapter are written, in this order, until a limit is met."""
    command = ["train", "demo", *tiny_settings(tiny)]
    code, said = finish(tmp_path, *command, preexec_fn=limited(size))
    assert incomplete(tmp_path) == []
    if code:
        assert code == 1, said
        one_line(said)
        left = unfinished(tmp_path)
        code, said = finish(tmp_path, *(["train", "--resume", left[0]] if left else command))
    assert code == 0, said
    assert incomplete(tmp_path, running=False) == []


@pytest.mark.faults
@pytest.mark.parametrize("size", [100_000, 10_000_000])
def test_an_export_on_a_full_disk(whole, tmp_path, size) -> None:
    refused_then_done(whole, tmp_path, size, "export", *TYPES)


@pytest.mark.faults
@pytest.mark.parametrize("verb", ["train", "export", "bench"])
def test_each_verb_on_a_read_only_run(whole, tmp_path, verb) -> None:
    with small_disk(tmp_path / "runs", "300m") as disk:
        run = shutil.copytree(whole, disk / "one")
        if verb == "train":
            (run / "manifest.json").unlink()
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        line = {"train": ["--resume", run], "export": ["--run", run, *TYPES], "bench": ["--run", run, *DATA]}[verb]
        assert "Read-only file system" in refused(tmp_path, verb, *line)


@pytest.mark.faults
@pytest.mark.skipif(not CLOCK, reason="libfaketime is not installed")
@pytest.mark.parametrize("jump", ["-400d", "+400d"])
def test_a_clock_that_jumps(whole, tiny, tmp_path, jump) -> None:
    """A run is stopped, the clock jumps, and everything goes on: resume, export, bench."""
    shutil.copytree(whole, tmp_path / "runs" / "one", ignore=shutil.ignore_patterns("export", "manifest.json"))
    shutil.rmtree(tmp_path / "runs" / "one" / "checkpoints" / "checkpoint-10")
    clock = {"LD_PRELOAD": CLOCK, "FAKETIME": jump, "DONT_FAKE_MONOTONIC": "1"}
    for line in (["train", "--resume", "one"], ["export", *TYPES], ["bench", *DATA]):
        code, said = finish(tmp_path, *line, extra=clock)
        assert code == 0, said
    assert incomplete(tmp_path, running=False) == []
    manifest = json.loads((tmp_path / "runs" / "one" / "manifest.json").read_text())
    assert manifest["seconds"]["train"] >= 0
