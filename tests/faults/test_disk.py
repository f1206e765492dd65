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
from support_faults import finish, incomplete, one_line

from petool_lite.runs import create_run, find_run, write_json, write_text

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


@pytest.mark.parametrize("size", [100, 1000])
def test_a_bench_on_a_full_disk(whole, tmp_path, size) -> None:
    refused_then_done(whole, tmp_path, size, "bench", *DATA)


@pytest.mark.faults
@pytest.mark.parametrize("size", [2_000, 200_000, 2_000_000, 10_000_000])
def test_training_on_a_full_disk(tiny, tmp_path, size) -> None:
    """The rows, a checkpoint and the adapter are written, in this order, until a limit is met."""
    command = ["train", "demo", *tiny_settings(tiny)]
    code, said = finish(tmp_path, *command, preexec_fn=limited(size))
    if code:
        assert code == 1, said
        one_line(said)
    assert incomplete(tmp_path) == []
    unfinished = [
        path.parent for path in tmp_path.glob("runs/*/recipe.toml") if not (path.parent / "manifest.json").exists()
    ]
    if code:
        code, said = finish(tmp_path, *(["train", "--resume", unfinished[0]] if unfinished else command))
    assert code == 0, said
    assert incomplete(tmp_path, running=False) == []


@pytest.mark.faults
@pytest.mark.parametrize("size", [100_000, 10_000_000])
def test_an_export_on_a_full_disk(whole, tmp_path, size) -> None:
    refused_then_done(whole, tmp_path, size, "export", *TYPES)


@pytest.mark.faults
@pytest.mark.parametrize("verb", ["train", "export", "bench"])
def test_each_verb_on_a_small_disk(whole, tiny, tmp_path, verb) -> None:
    with small_disk(tmp_path / "disk", {"train": "5m", "export": "25m", "bench": "60m"}[verb]) as disk:
        if verb != "train":
            left_out = ["checkpoints", "tensorboard", *(["export"] if verb == "export" else [])]
            shutil.copytree(whole, disk / "runs" / "one", ignore=shutil.ignore_patterns(*left_out))
        if verb == "bench":
            with (disk / "filler").open("wb", buffering=0) as filler, pytest.raises(OSError, match="No space"):
                while True:
                    filler.write(b"0" * 4096)
        line = {
            "train": ["train", "demo", *tiny_settings(tiny)],
            "export": ["export", "--run", "one", *TYPES],
            "bench": ["bench", "--run", "one", *DATA],
        }[verb]
        refused(disk, *line)


@pytest.mark.faults
@pytest.mark.parametrize("verb", ["train", "export", "bench"])
def test_each_verb_on_a_read_only_run(whole, tmp_path, verb) -> None:
    with small_disk(tmp_path / "runs", "300m") as disk:
        shutil.copytree(whole, disk / "one")
        if verb == "train":
            (disk / "one" / "manifest.json").unlink()
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        line = {
            "train": ["train", "--resume", disk / "one"],
            "export": ["export", "--run", disk / "one", *TYPES],
            "bench": ["bench", "--run", disk / "one", *DATA],
        }[verb]
        assert "Read-only file system" in refused(tmp_path, *line)


def test_runs_made_while_the_clock_stands_still_or_goes_back_do_not_meet(tmp_path, monkeypatch) -> None:
    import datetime

    import petool_lite.runs as module

    class Clock(datetime.datetime):
        times = iter([datetime.datetime(2026, 3, 1), datetime.datetime(2026, 3, 1), datetime.datetime(2020, 1, 1)])

        @classmethod
        def now(cls, tz=None):
            return next(cls.times)

    monkeypatch.setattr(module, "datetime", Clock)
    monkeypatch.setenv("PETOOL_LITE_RUNS", str(tmp_path))
    made = [create_run("demo") for _ in range(3)]
    assert len(set(made)) == 3
    for run in made:
        write_text(run / "recipe.toml", "")
        write_json(run / "manifest.json", {})
    assert find_run(None) in made


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
