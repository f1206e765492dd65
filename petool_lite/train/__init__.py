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
from petool_lite.train.evaluation import load_exam
from petool_lite.train.loop import Job, train_into
from petool_lite.train.plan import plan
from petool_lite.train.resume import check_resume, start_facts, write_start
from petool_lite.train.stop import stop_signals

__all__ = ["plan", "train"]


def train(name: str, recipe: Recipe, report: Report = silent, resume: Path | None = None) -> Path:
    """Train `recipe` and return the complete run directory; `resume` continues an unfinished one.

    Ctrl-C or SIGTERM while it trains saves a checkpoint and raises PetoolError with the command that continues, exit
    code 130 or 143; a second one ends the process. A new run that has not trained a step leaves nothing.
    """
    started = time.time()
    run = resume
    with stop_signals() as stop:
        try:
            base, chat, prepared = plan(recipe, report)
            exam = load_exam(recipe, chat, report)
            facts = start_facts(recipe, base, prepared)
            if resume is None:
                run = create_run(name)
                write_text(run / "recipe.toml", to_toml(recipe))
                write_start(run, facts)
            else:
                check_resume(resume, facts)
            assert run is not None
            train_into(Job(name, run, recipe, base, chat, prepared, exam, started, report, resume is not None), stop)
        except (PetoolError, KeyboardInterrupt) as error:
            if run is not None and resume is None and not (run / "metrics.jsonl").is_file():
                shutil.rmtree(run)  # nothing to look at or to resume from
            if isinstance(error, PetoolError):
                raise
            raise PetoolError(f"stopped by {stop.name} before the first step", exit_code=stop.exit_code) from error
    return run
