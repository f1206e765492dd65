"""Before step 1 on a GPU: the largest micro-step, one evaluation and one save, so that a run fails now or never."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from petool_lite.console import Report, silent
from petool_lite.errors import PetoolError
from petool_lite.prompt.prepare import Prepared
from petool_lite.recipe import Recipe
from petool_lite.runs import TRAINED, draft
from petool_lite.train.checkpoints import disk_errors
from petool_lite.train.devices import is_first
from petool_lite.train.evaluation import Exam, evaluate, same_randomness
from petool_lite.train.microstep import MicroStep, micro_steps
from petool_lite.train.model import save_trained
from petool_lite.train.plan import Plan, load_of
from petool_lite.train.planner import dimensions, peak_bytes

# Size of a checkpoint with AdamW's two states, in what is saved: an adapter in float32, or a model in bfloat16.
_CHECKPOINT = {"lora": 3.1, "full": 6.1}


def prove(run: Path, planned: Plan, trainer: Any, exam: Exam | None, report: Report) -> None:
    """Run the largest micro-step forward and backward, evaluate the longest prompt, save what is trained and remove it.

    Nothing is learned and no random number is used up. Raises torch.OutOfMemoryError, or PetoolError where the disk
    cannot take a checkpoint.
    """
    import torch

    assert planned.forecast is not None
    step = largest_step(planned.prepared, planned.recipe)
    with same_randomness():
        if trainer.stack:
            trainer.stack.refresh()
        (trainer.step_loss(step, 0) / len(step.answers)).backward()
        peak = torch.cuda.max_memory_allocated() / 2**30
        trainer.model.zero_grad(set_to_none=True)
    if exam is not None and is_first():
        longest = max(range(len(exam.prompts)), key=lambda index: len(exam.prompts[index]))
        one = (exam.prompts[longest],), (exam.golds[longest],)
        evaluate(replace(exam, prompts=one[0], golds=one[1], too_long=0, reply_tokens=2), trainer.model, 0, silent)
    if is_first():
        _save(run, trainer.model, planned)
    model, load = dimensions(planned.base.directory), load_of(planned.prepared)
    predicted = peak_bytes(model, planned.recipe, planned.forecast.choice, load, optimizer=False) / 2**30
    pinned = ""
    if trainer.stack and trainer.stack.shelf:
        pinned = f"; {trainer.stack.shelf.reserved / 2**30:.1f} GiB pinned, predicted {planned.forecast.host_gb:.1f}"
    report(
        f"proved before step 1: a micro-step of {len(step.ids):,} tokens (peak {peak:.2f} GiB, predicted "
        f"{predicted:.2f}{pinned}), {'an evaluation, ' if exam else ''}a save",
        0,
        0,
        "",
    )


def largest_step(prepared: Prepared, recipe: Recipe) -> MicroStep:
    """About the fullest micro-step there can be: the longest row, and of the others, longest first, what has room."""
    lengths = load_of(prepared).lengths
    chosen: list[int] = []
    left = max(recipe.train.token_budget, max(lengths))
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if lengths[index] <= left and len(chosen) < recipe.train.batch_size * recipe.train.accumulate:
            chosen.append(index)
            left -= lengths[index]
    (step,) = micro_steps(list(prepared.table.select(chosen)), max(recipe.train.token_budget, max(lengths)))
    return step


def _save(run: Path, model: Any, planned: Plan) -> None:
    """Write what is trained beside its place and remove it; there must be room for three checkpoints of it."""
    method = planned.recipe.train.method
    with disk_errors(run, TRAINED[method]), draft(run / "proof") as folder:
        save_trained(model, folder, planned.base)
        needed = 3 * _CHECKPOINT[method] * sum(file.stat().st_size for file in folder.iterdir())
    shutil.rmtree(run / "proof")
    free = shutil.disk_usage(run).free
    if free < needed:
        raise PetoolError(
            f"the checkpoints of this run take {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free on {run}",
            "make room, or set PETOOL_LITE_RUNS to a larger disk",
        )
