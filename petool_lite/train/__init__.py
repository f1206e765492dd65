"""`train`: a recipe becomes a LoRA adapter, or a model of its own, in a run directory.

Unsloth patches the layers under an adapter; TRL's trainer runs the loop.
"""

import shutil
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from petool_lite.console import Report, silent
from petool_lite.errors import PetoolError
from petool_lite.recipe import Recipe, to_toml
from petool_lite.runs import create_run, is_complete, locked, write_text
from petool_lite.train.devices import first_then_others, from_first, grow_in_place, is_first, joined, repeatable
from petool_lite.train.evaluation import load_exam
from petool_lite.train.loop import Job, train_into
from petool_lite.train.plan import Plan, dry_run, plan
from petool_lite.train.resume import check_resume, start_facts, write_start
from petool_lite.train.stop import Stop, stop_signals

__all__ = ["dry_run", "is_first", "plan", "train"]


def train(name: str, recipe: Recipe, report: Report = silent, resume: Path | None = None) -> Path:
    """Train `recipe` and return the complete run directory; `resume` continues an unfinished one.

    Ctrl-C or SIGTERM while it trains saves a checkpoint and raises PetoolError with the command that continues, exit
    code 130 or 143; a second one ends the process. A new run that has not trained a step leaves nothing.
    """
    started = time.time()
    grow_in_place()
    run: Path | None = resume
    report = report if is_first() else silent
    with stop_signals() as stop, joined(), repeatable(recipe.train.deterministic), ExitStack() as held:
        try:
            if is_first() and resume is not None:
                held.enter_context(locked(resume))
                if is_complete(resume):  # by a process that this one has just missed
                    raise PetoolError(f"the run {resume} is complete", "start a new one: petool-lite train RECIPE")
            planned = _same_choice(first_then_others(lambda: plan(recipe, report)))
            exam = load_exam(recipe, planned.chat, report)
            if is_first():
                run = _begun(name, planned, resume)
                if resume is None:
                    held.enter_context(locked(run))
            begun: Path = from_first(run)
            train_into(Job(name, begun, planned, exam, started, report, resume is not None), stop)
        except (PetoolError, KeyboardInterrupt) as error:
            if is_first() and run is not None and resume is None and not (run / "metrics.jsonl").is_file():
                shutil.rmtree(run)  # nothing to look at or to resume from
            if isinstance(error, PetoolError):
                raise
            raise _stopped(stop, run, resume is not None) from error
    return begun


def _stopped(stop: Stop, run: Path | None, resumed: bool) -> PetoolError:
    """What a signal came to while no step was being taken: before the first one or after the last."""
    if run is None or not (run / "metrics.jsonl").is_file():
        hint = f"continue: petool-lite train --resume {run}" if resumed else ""
        return PetoolError(f"stopped by {stop.name} before the first step", hint, stop.exit_code)
    what = "loading or saving" if resumed else "saving"  # figures of a resumed run were there before
    return PetoolError(
        f"stopped by {stop.name} while {what}", f"continue: petool-lite train --resume {run}", stop.exit_code
    )


def _begun(name: str, planned: Plan, resume: Path | None) -> Path:
    """The directory of a new run, or of one that may be continued."""
    facts = start_facts(planned.recipe, planned.base, planned.prepared)
    if resume is not None:
        check_resume(resume, facts)
        return resume
    run = create_run(name)
    write_text(run / "recipe.toml", to_toml(planned.recipe))
    write_start(run, facts)
    return run


def _same_choice(planned: Plan) -> Plan:
    """The plan with the first process's choice: GPUs may differ a little in what is free."""
    recipe, forecast = from_first((planned.recipe, planned.forecast))
    return replace(planned, recipe=recipe, forecast=forecast)
