"""What several test files use and that is no fixture."""

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path


def own_runs(root: Path) -> dict[str, str]:
    """Variables for a process whose runs lie under `root`."""
    return os.environ | {"PETOOL_LITE_RUNS": str(root / "runs")}


def tiny_settings(tiny: Path) -> list[str]:
    """Options that make of the demo recipe 10 steps on a tiny model, with dropout, so that random numbers matter."""
    pairs = [
        f"model.base={tiny}",
        "data.train=demo:train:20",
        "train.batch_size=2",
        "train.learning_rate=2e-3",
        "train.save_every=5",
    ]
    return [part for pair in [*pairs, "lora.dropout=0.1"] for part in ("--set", pair)]


def full_settings(tiny: Path) -> list[str]:
    """Options that make of the demo recipe 10 steps of full fine-tuning on a tiny model."""
    pairs = [
        "train.method=full",
        f"model.base={tiny}",
        "data.train=demo:train:20",
        "train.batch_size=2",
        "train.learning_rate=2e-3",
        "train.save_every=5",
    ]
    return [part for pair in pairs for part in ("--set", pair)]


def wait_for(process: subprocess.Popen, seen: Callable[[], bool]) -> None:
    """Wait until `seen`; fails when the process ends before."""
    deadline = time.time() + 200
    while not seen() and time.time() < deadline:
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.01)
