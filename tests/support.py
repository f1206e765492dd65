"""What several test files use and that is no fixture."""

import os
import time
from collections.abc import Callable
from pathlib import Path


def own_runs(root: Path) -> dict[str, str]:
    """Variables for a process whose runs lie under `root`."""
    return os.environ | {"PETOOL_LITE_RUNS": str(root / "runs")}


def wait_until(seen: Callable[[], object], what: str, seconds: float = 250.0) -> None:
    """Wait for a state; the limit is far beyond what a slow machine needs, and passing it fails."""
    end = time.monotonic() + seconds
    while not seen():
        assert time.monotonic() < end, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.01)


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
