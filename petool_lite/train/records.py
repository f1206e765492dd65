"""What a run leaves to read: metrics.jsonl, the live view, the machine's figures, the libraries' talk."""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from petool_lite.console import Report
from petool_lite.errors import PetoolError


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


def peak_memory_gb() -> float:
    """Peak memory of this process in GiB: allocated on the GPU, or resident on a CPU."""
    import resource

    import torch

    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated()) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def recorder(run: Path, total: int, report: Report) -> Any:
    """A trainer callback that appends metrics.jsonl and reports progress; a loss that is not finite stops the run.

    Its `trainer` is to be set to the trainer it serves; `last_loss` is the newest loss.
    """
    from transformers import TrainerCallback

    class Record(TrainerCallback):
        trainer: Any
        last_loss: float | None = None
        started = time.time()

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.started = time.time()
            report("training", state.global_step, total, "")

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            if not logs or "loss" not in logs:
                return
            loss = float(logs["loss"])
            if loss != loss or loss in (float("inf"), float("-inf")):
                raise PetoolError(f"the loss is {loss} at step {state.global_step}", "lower train.learning_rate")
            self.last_loss = loss
            seconds = time.time() - self.started
            tokens = self.trainer.tokens_seen
            row = {
                "step": state.global_step,
                "loss": loss,
                "learning_rate": float(logs["learning_rate"]),
                "grad_norm": float(logs["grad_norm"]),
                "seconds": round(seconds, 3),
                "tokens": tokens,
                "tokens_per_s": round(tokens / seconds, 1),
                "peak_memory_gb": round(peak_memory_gb(), 3),
            }
            with (run / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            report("training", state.global_step, total, f"loss {loss:.3f}, {row['tokens_per_s']:.0f} tokens/s")

    return Record()
