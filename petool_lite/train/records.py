"""What a run leaves to read: metrics.jsonl, its picture, the live view, the machine's figures, the libraries' talk."""

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from petool_lite.console import Report
from petool_lite.errors import PetoolError
from petool_lite.runs import draft, write_text

# The trainer's names of trackers, which are those of their packages (TensorBoard has two). Asking transformers would
# import it before unsloth, which has to come first.
_TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "clearml", "swanlab", "dvclive")


@contextmanager
def log_to(path: Path) -> Iterator[Any]:
    """Libraries print banners and advice to stdout, which is for data here: keep it in the run's train.log instead."""
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # warns about torchao's enums at import
    with path.open("a") as log, redirect_stdout(log):
        yield log


def device_name() -> str:
    """The GPU's name, or the CPU with its threads."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"


def peak_memory_gb() -> tuple[float, float | None]:
    """Peak memory of this process in GiB: what tensors took on the GPU, and what torch held for them; or what was
    resident on a CPU, and None."""
    import resource

    import torch

    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**30, 3), round(torch.cuda.max_memory_reserved() / 2**30, 3)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3), None


def check_reporters(names: str) -> list[str]:
    """The comma-separated `train.report_to` as a list; raises PetoolError for a tracker that is unknown or not here."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in _TRACKERS:
            raise PetoolError(f"train.report_to: unknown tracker {name}", f"one of: {', '.join(_TRACKERS)}")
        if not any(map(find_spec, (name, f"{name}X"))):
            raise PetoolError(f"train.report_to: {name} is not installed", f"pip install {name}, or leave it out")
    return wanted


def cut_after(path: Path, step: int, report: Report) -> list[dict[str, Any]]:
    """Keep the rows of a .jsonl file up to `step`, say how many went, and return them; a torn last line goes too."""
    lines = path.read_text().splitlines() if path.is_file() else []
    kept = []
    with suppress(ValueError):  # the process was killed while it wrote the last
        for line in lines:
            row = json.loads(line)
            if row["step"] <= step:
                kept.append(row)
    if len(kept) < len(lines):
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        report(f"{path.name}: {len(lines) - len(kept)} lines after step {step} cut, they come again", 0, 0, "")
    return kept


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add one line to a .jsonl file."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


@dataclass
class Progress:
    """How far a run is: figures of the steps so far, in all processes that it took."""

    seconds: float = 0.0  # without evaluations
    tokens: int = 0
    last_loss: float | None = None
    tokens_before: int = 0  # of processes before this one
    clock: float = 0.0  # when the figures were last brought up to date; to be set before the first step
    scores: list[dict[str, Any]] = field(default_factory=list)  # the rows of eval.jsonl
    evaluation_seconds: float = 0.0  # of this process
    stopped_early: bool = False

    def resume(self, rows: Sequence[Mapping[str, Any]], scores: Sequence[dict[str, Any]]) -> None:
        """Go on from the rows of metrics.jsonl and eval.jsonl."""
        self.scores = [*scores]
        if rows:
            self.seconds, self.tokens, self.last_loss = (rows[-1][key] for key in ("seconds", "tokens", "loss"))
            self.tokens_before = self.tokens

    def update(self, step: int, tokens: int, logs: Mapping[str, Any]) -> dict[str, Any]:
        """Take in what the trainer logs of a step, and the tokens it has read; returns the row for metrics.jsonl."""
        now = time.time()
        self.seconds, self.clock = self.seconds + now - self.clock, now
        self.tokens, self.last_loss = self.tokens_before + tokens, float(logs["loss"])
        return {
            "step": step, "loss": self.last_loss, **{key: float(logs[key]) for key in ("learning_rate", "grad_norm")},
            "seconds": round(self.seconds, 3), "tokens": self.tokens,
            "tokens_per_s": round(self.tokens / self.seconds, 1), "peak_memory_gb": peak_memory_gb()[0],
            **{key: float(value) for key, value in logs.items() if key.startswith("rewards/")},
        }  # fmt: skip


def note(row: Mapping[str, Any]) -> str:
    """A row of metrics in words."""
    margin = f"margin {row['rewards/margins']:.3f}, " if "rewards/margins" in row else ""
    return (
        f"loss {row['loss']:.3f}, {margin}lr {row['learning_rate']:.1e}, {row['tokens_per_s']:,.0f} tokens/s, "
        f"peak {row['peak_memory_gb']:.1f} GB"
    )


def draw_curve(run: Path) -> None:
    """Write loss.png: loss and learning rate by step, and joint accuracy where the run was evaluated."""
    from matplotlib.figure import Figure

    files = (run / name for name in ("metrics.jsonl", "eval.jsonl"))
    rows, scores = ([*map(json.loads, file.read_text().splitlines())] if file.is_file() else [] for file in files)
    figure = Figure(figsize=(8, 5), layout="constrained")
    top, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    right = top.twinx() if scores else top
    curves = (top, rows, "loss", "tab:blue"), (below, rows, "learning_rate", "tab:gray")
    for axes, found, key, colour in (*curves, (right, scores, "joint_acc", "tab:orange")):
        axes.plot([row["step"] for row in found], [row[key] for row in found], colour, linewidth=1)
    top.set(title=run.name, ylabel="loss")
    below.set(xlabel="step", ylabel="learning rate")
    if scores:
        right.set(ylabel="joint accuracy, % (orange)", ylim=(-3, 103))
    with draft(run / "loss.png") as path:
        figure.savefig(path, dpi=120, format="png")
