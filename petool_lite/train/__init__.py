"""`train`: a recipe becomes a LoRA adapter in a run directory.

Unsloth patches the model's layers; TRL's trainer runs the loop.
"""

import shutil
import time
from pathlib import Path

from petool_lite.console import Report, silent
from petool_lite.errors import PetoolError
from petool_lite.recipe import Recipe, to_toml
from petool_lite.runs import create_run, write_text
from petool_lite.train.checkpoints import newest_checkpoint
from petool_lite.train.loop import Job, train_into
from petool_lite.train.plan import plan

__all__ = ["plan", "train"]


def train(name: str, recipe: Recipe, report: Report = silent, resume: Path | None = None) -> Path:
    """Train `recipe` and return the complete run directory; `resume` continues an unfinished one."""
    started = time.time()
    base, chat, prepared = plan(recipe, report)
    run = resume or create_run(name)
    if resume is None:
        write_text(run / "recipe.toml", to_toml(recipe))
    try:
        train_into(Job(name, run, recipe, base, chat, prepared, started, report, resume is not None))
    except PetoolError:
        if resume is None and newest_checkpoint(run) is None:
            shutil.rmtree(run)  # nothing to resume from
        raise
    return run
