"""What several test files use and that is no fixture."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

# petool-lite, waiting for a line of stdin where the figures of a step are written: signals come when the test says so.
HELD = """
import sys
from petool_lite.cli import main
from petool_lite.train import records
write = records.append_row
def append_row(path, row):
    write(path, row)
    if row["step"] == int(sys.argv[1]):
        print("held", file=sys.__stdout__, flush=True)
        sys.stdin.readline()
records.append_row = append_row
main(sys.argv[2:])
"""
LIGHT = ("data", "recipes", "runs", "rate", "history")  # verbs that load no model: no process of their own is started


def run_inline(
    arguments: list[str], cwd: Path | None = None, env: Mapping[str, str] | None = None, input: str | None = None
) -> subprocess.CompletedProcess:
    """`petool-lite ARGS` in this process, which has imported what it needs once."""
    from click.testing import CliRunner

    from petool_lite.cli import main

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd or Path.cwd())
        for name, value in (env or {}).items():
            patch.setenv(name, value)
        done = CliRunner().invoke(main, arguments, prog_name="petool-lite", input=input, catch_exceptions=False)
    return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)


def own_runs(root: Path) -> dict[str, str]:
    """Variables for a process whose runs lie under `root`."""
    return os.environ | {"PETOOL_LITE_RUNS": str(root / "runs")}


def wait_until(seen: Callable[[], object], what: str, seconds: float = 250.0) -> None:
    """Wait for a state; the limit is far beyond what a slow machine needs, and passing it fails."""
    end = time.monotonic() + seconds
    while not seen():
        assert time.monotonic() < end, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.01)


def options(*pairs: str) -> list[str]:
    """Settings as options of `train`."""
    return [part for pair in pairs for part in ("--set", pair)]


def tiny_settings(tiny: Path, *more: str) -> list[str]:
    """Options that make of the demo recipe 10 steps on a tiny model, with dropout, so that random numbers matter."""
    pairs = [f"model.base={tiny}", "data.train=demo:train:20", "train.rows=2", "train.learning_rate=2e-3"]
    return options(*pairs, "train.save_every=5", *(more or ["lora.dropout=0.1"]))


def train_demo(command: Callable[..., Any], root: Path, *arguments: str) -> tuple[Path, str]:
    """The complete run of `petool-lite train demo ARGUMENTS` under `root`, and what it said."""
    result = command("train", "demo", *arguments, "--json", cwd=root, env=own_runs(root))
    assert result.returncode == 0, result.stderr
    return root / json.loads(result.stdout)["run"], result.stderr


def rows_of(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """What a run recorded, line by line."""
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def loss_row_by_row(model: Any, rows: Sequence[Mapping[str, Any]]) -> Any:
    """Cross entropy of the rows' answers through a plain model of transformers, one row at a time, the head for all."""
    import torch

    total = torch.zeros(())
    for row in rows:
        logits = model(torch.tensor([row["input_ids"]])).logits[0, row["answer_start"] - 1 : -1]
        answers = torch.tensor(row["input_ids"][row["answer_start"] :])
        total = total + torch.nn.functional.cross_entropy(logits, answers, reduction="sum")
    return total


def start(root: Path, *line: str | Path) -> subprocess.Popen:
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen([sys.executable, *map(str, line)], cwd=root, env=own_runs(root), text=True, **pipes)


def held_after(step: int, root: Path, *arguments: str | Path) -> subprocess.Popen:
    """A training that has taken `step` steps and takes none further until it gets a line."""
    process = start(root, "-c", HELD, str(step), "train", *arguments)
    assert process.stdout.readline() == "held\n", process.stderr.read()
    return process


def ended(process: subprocess.Popen) -> str:
    """The rest of what it says, and how it ends."""
    with process:
        return f"{process.stderr.read()}exit {process.wait()}"
