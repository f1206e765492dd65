"""What a run leaves: checkpoints and resume.json to continue from, and metrics, their picture and train.log to read."""

import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

from petool_lite.adapters import WEIGHTS, start_adapter
from petool_lite.console import Report
from petool_lite.data.files import source_sha256
from petool_lite.errors import PetoolError, first_line
from petool_lite.models import Base, file_sha256, weight_files
from petool_lite.prompt.prepare import Prepared
from petool_lite.recipe import Recipe, flat
from petool_lite.runs import draft, versions, write_json, write_text
from petool_lite.train.devices import arithmetic_name, count, together

START = "resume.json"  # of a run
_KEPT = 2
# Settings that change nothing in what is trained, so they may differ when a run is continued, and such packages.
_FREE = ("train.save_every", "train.report_to", "bench.")
_OTHER_PACKAGES = ("llama-cpp-python", "gguf")
# Trackers, as trainer and packages call them (TensorBoard has two). Asking transformers would import it before unsloth.
_TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "clearml", "swanlab", "dvclive")
_Trainer: Any = object  # the class that `Guarded` is mixed into


def steps_at(checkpoint: Path | None) -> int:
    """Updates that were taken before this checkpoint."""
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0


def newest_checkpoint(run: Path) -> Path | None:
    """The checkpoint with the most steps, or None. A half-written one has another name: see `Guarded`."""
    return next(reversed(_checkpoints(run / "checkpoints")), None)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted((path.parent for path in folder.glob("checkpoint-*/trainer_state.json")), key=steps_at)


def _sync(*paths: Path) -> None:
    """Have the disk hold these files, and the names in these folders."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


@contextmanager
def disk_errors(run: Path, what: str) -> Iterator[None]:
    """Turn the failure to write `what` into `run` into a PetoolError that says what is left to continue from."""
    from safetensors import SafetensorError

    try:
        yield
    except Exception as error:  # torch, safetensors and tokenizers wrap the disk's own error, the last in a plain one
        wrapped = isinstance(error, OSError | RuntimeError | SafetensorError) or "(os error " in str(error)
        if isinstance(error, PetoolError) or not wrapped:
            raise
        told = f"cannot write {run / what}: {first_line(error)}; {shutil.disk_usage(run).free / 1e9:.1f} GB are free"
        hint = "make room, or set PETOOL_LITE_RUNS to a larger disk, and train again"
        if kept := newest_checkpoint(run):
            hint = f"make room, then: petool-lite train --resume {run} (continues from {kept.name})"
        raise PetoolError(told, hint) from error


def rate_at(done: int, shape: str, warmup: float, total: int) -> float:
    """Share of the peak learning rate for the update after `done` of `total`: a rise over the share `warmup` of them,
    then `shape` (cosine, linear, constant_with_warmup). Above 0 for every update, and at its peak for one at least."""
    rise = min(round(total * warmup), total - 1)
    if done < rise:
        return (done + 1) / (rise + 1)
    if shape == "constant_with_warmup":
        return 1.0
    left = 1 - min(done - rise, total - rise) / (total - rise)
    return 0.5 * (1 - math.cos(math.pi * left)) if shape == "cosine" else left


class Guarded(_Trainer):
    """Mixin in front of a trainer class: checkpoints are whole or absent, and a loss that is not finite ends the run. A
    checkpoint is written as `.checkpoint-N.draft/checkpoint-N` and renamed when the disk has it all. A trainer adds its
    micro-batches to `update` (entry ids, loss, sum of gradient norms after it): they name the rows that went wrong."""

    update: tuple[tuple[Sequence[str], Any, Any], ...] = ()
    _tr_loss: Any
    schedule: tuple[str, float, int]  # its shape, the share of updates that warm up, all updates
    compiled = False  # layers of the one device, which would wait for a second transfer an update, that of the loss
    before_update: Callable[[], None]  # called before every step
    after_update: Callable[[dict[str, Any]], None]  # called with what is logged of an update, before it is saved
    lr_scheduler: Any = None
    _draft: Path | None = None

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The learning rate over time, as the recipe says it: see `rate_at`."""
        from torch.optim.lr_scheduler import LambdaLR

        if self.lr_scheduler is None:
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, lambda done: rate_at(done, *self.schedule))
        return self.lr_scheduler

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        """One step of the trainer."""
        self.before_update()
        if self.compiled:
            self._tr_loss = self._tr_loss.to(self.args.device)  # the sum of losses since the trainer told the last
        return super().training_step(model, inputs, num_items_in_batch)

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Tell the trackers, then whoever waits for an update."""
        super().log(logs, start_time)
        if "loss" in logs:
            self.after_update(logs)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        # Called once an update, after the last backward and before the optimizer: one transfer for all figures.
        import torch

        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of a parted model
        parts = [figure.float() for _, loss, reached in self.update for figure in (loss, reached)]
        *figures, norm = torch.stack([*parts, torch.as_tensor(norm, device=parts[0].device)]).tolist()
        names, losses, norms = [names for names, _, _ in self.update], figures[::2], figures[1::2]
        if not all(map(math.isfinite, (*figures, norm))):
            bad = [rows for rows, loss in zip(names, losses, strict=True) if not math.isfinite(loss)]
            # or else the first micro-batch after which the gradient is not finite
            bad = bad or [rows for rows, reached in zip(names, norms, strict=True) if not math.isfinite(reached)][:1]
            named = ", ".join(together(list(chain(*bad))) or chain(*names))
            step = f"step {self.state.global_step + 1}: loss {sum(losses):g}, gradient norm {norm:g}"
            hint = "look at these entries (petool-lite data preview), or lower train.learning_rate"
            raise PetoolError(f"not finite in {step}; entries {named}", f"{hint}; the step was not taken")
        self.update = ()
        if self.compiled:
            self._tr_loss = torch.tensor(sum(losses))
        return norm

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._draft) if self._draft else str(super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        self._draft = folder / f".{name}.draft"
        try:
            with disk_errors(folder.parent, f"checkpoints/{name}"):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    draft = self._draft / name
                    # dpo's reference comes from the recipe, and its folder here would hide the adapter from PEFT
                    shutil.rmtree(draft / "ref", ignore_errors=True)
                    _sync(*draft.rglob("*"), draft)  # before it gets its name
                    shutil.rmtree(folder / name, ignore_errors=True)
                    draft.rename(folder / name)
                    _sync(folder)
                    for old in _checkpoints(folder)[:-_KEPT]:
                        shutil.rmtree(old)
                self.accelerator.wait_for_everyone()
        finally:
            shutil.rmtree(self._draft, ignore_errors=True)
            self._draft = None


def start_facts(recipe: Recipe, base: Base, prepared: Prepared) -> dict[str, dict[str, Any]]:
    """Everything that decides what a run trains: recipe, data, base, processes, versions, each as name -> value."""
    import xxhash  # takes no more time than reading a file, which loading it does again, from memory

    def xxh3(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()

    adapter, held_out = start_adapter(recipe.model.adapter), recipe.train.eval_data if recipe.train.eval_every else ""
    return {
        "recipe": flat(recipe),
        "data": {
            "sha256 of the source": prepared.data_sha256,
            "sha256 of the token ids": file_sha256(Path(prepared.table.cache_files[0]["filename"])),
            **({"sha256 of the first adapter": file_sha256(adapter / WEIGHTS)} if adapter else {}),
            **({"sha256 of train.eval_data": source_sha256(held_out)} if held_out else {}),
        },
        "base": {
            **{f"xxh3 of {path.name}": xxh3(path) for path in weight_files(base.directory)},
            "sha256 of config.json": file_sha256(base.directory / "config.json"),
            "arithmetic": arithmetic_name(),
        },
        "run": {"processes": count()},
        "versions": {name: found for name, found in versions().items() if name not in _OTHER_PACKAGES},
    }


def check_resume(run: Path, facts: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise PetoolError that names every difference between the run's start and now, or what is missing."""
    path = run / START
    if not path.is_file():
        if newest_checkpoint(run):
            raise PetoolError(f"{run} has no {START}: nobody can tell what it was started with", "train anew")
        write_json(path, facts)  # killed before its first step
        return
    before = {part: {} for part in facts} | json.loads(path.read_text())

    def plain(value: Any) -> str:
        text = "absent" if value is None else str(value)
        return f"{text[:12]}..." if len(text) >= 32 else text

    found = [
        f"{part} {key} was {plain(before[part].get(key))}, is {plain(now.get(key))}"
        for part, now in facts.items()
        for key in {**before[part], **now}
        if before[part].get(key) != now.get(key) and not (part == "recipe" and key.startswith(_FREE))
    ]
    if found:
        what = f"{run} was started with something else: {'; '.join(found)}"
        raise PetoolError(what, "put that back as it was, or start a new run: petool-lite train RECIPE")


@contextmanager
def log_to(path: Path) -> Iterator[Any]:
    """Libraries print banners and advice to stdout, which is for data here: keep it in the run's train.log instead."""
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # warns about torchao's enums at import
    with path.open("a") as log, redirect_stdout(log):
        yield log


def peak_memory_gb() -> tuple[float, float | None]:
    """Peak memory of this process in GiB: of tensors on the GPU, and what torch held for them; on a CPU, and None."""
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
    speed = f"{row['tokens_per_s']:,.0f} tokens/s, peak {row['peak_memory_gb']:.1f} GB"
    return f"loss {row['loss']:.3f}, {margin}lr {row['learning_rate']:.1e}, {speed}"


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
