"""The training loop of one run: model and trainer, the weights it leaves, and the manifest that completes it."""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from petool_lite.console import Report
from petool_lite.errors import MACHINE, PetoolError
from petool_lite.prompt.render import LAYOUTS
from petool_lite.recipe import Recipe, TrainSettings
from petool_lite.runs import TRAINED, draft, versions, write_json
from petool_lite.train.checkpoints import Guarded, disk_errors, newest_checkpoint, remove_drafts
from petool_lite.train.devices import arithmetic, arithmetic_name, count, first_then_others, is_first
from petool_lite.train.evaluation import Exam, Mark, best_folder, best_mark, examiner
from petool_lite.train.microstep import answer_trainer
from petool_lite.train.model import load_model, save_trained
from petool_lite.train.plan import Plan, load_of, rows_a_device
from petool_lite.train.planner import dimensions, pieces
from petool_lite.train.preference import preference_trainer
from petool_lite.train.proof import prove
from petool_lite.train.records import (
    Progress,
    check_reporters,
    cut_after,
    device_name,
    draw_curve,
    log_to,
    peak_memory_gb,
    recorder,
    reserved_memory_gb,
    resumed_progress,
)
from petool_lite.train.shelf import pinning
from petool_lite.train.stop import Stop, stopper


@dataclass(frozen=True)
class Job:
    """One run to train: where it lies, what it trains on, when it began (epoch seconds), and who hears of it."""

    name: str
    run: Path
    planned: Plan
    exam: Exam | None
    started: float
    report: Report
    resume: bool


def train_into(job: Job, stop: Stop) -> None:
    """Train, save the result, then the manifest; raises PetoolError, also where a signal stopped it with all saved."""
    checkpoint, progress, exams = first_then_others(lambda: _continued(job))
    through = "" if job.planned.recipe.train.method == "full" else " through Unsloth"
    job.report(f"loading {job.planned.base.name}{through}", 0, 0, "")
    with log_to(job.run / "train.log" if is_first() else Path(os.devnull)) as log:
        with redirect_stderr(log), pinning(*_pieces(job.planned)):
            model, tokenizer = load_model(job.planned.recipe, job.planned.base)
            trainer = _trainer(job, model, tokenizer, progress, exams, stop)
        with memory_errors(job.planned.recipe):
            if job.planned.forecast is not None:
                prove(job.run, job.planned, trainer, job.exam, job.report)
            _fit(trainer, checkpoint, stop)
    state = trainer.state
    if is_first():
        draw_curve(job.run)
    if stop.caught and not progress.stopped_early and state.global_step < state.max_steps:
        raise PetoolError(
            f"stopped by {stop.name} after step {state.global_step} of {state.max_steps}, all of it saved",
            f"continue: petool-lite train --resume {job.run}",
            stop.exit_code,
        )
    if is_first():
        _complete(job, model, state.global_step, progress)


def _pieces(planned: Plan) -> tuple[int, int]:
    """How much memory to pin while the model loads: pieces and bytes of each."""
    if planned.forecast is None:
        return 0, 0
    model, load = dimensions(planned.base.directory), load_of(planned.prepared)
    return pieces(model, planned.recipe, planned.forecast.choice, load)


def _complete(job: Job, model: Any, step: int, progress: Progress) -> None:
    """Write what was trained, then the manifest."""
    best = _save(job, model)
    write_json(
        job.run / "manifest.json",
        _identity(job)
        | {
            "steps": step,
            f"{TRAINED[job.planned.recipe.train.method]}_step": best.step if best else step,
            "evaluation": best and {"best": asdict(best), "stopped_early": progress.stopped_early},
            "seconds": {
                "train": round(progress.seconds, 2),
                "evaluation": round(progress.exam_seconds, 2),
                "all": round(time.time() - job.started, 2),
            },
            "tokens_per_s": round(progress.tokens / progress.seconds, 1),
            "peak_memory_gb": round(peak_memory_gb(), 3),
            "reserved_memory_gb": reserved_memory_gb(),
            "predicted": job.planned.forecast and asdict(job.planned.forecast),
            "final_loss": progress.last_loss,
        },
    )
    shutil.rmtree(job.run / "best", ignore_errors=True)


def _continued(job: Job) -> tuple[Path | None, Progress, list[dict[str, Any]]]:
    """The checkpoint to go on from, and what metrics.jsonl and eval.jsonl hold up to there."""
    if not job.resume:
        return None, Progress(), []
    remove_drafts(job.run, job.report)
    checkpoint = newest_checkpoint(job.run)
    step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    job.report(f"continuing {job.run} after step {step}", 0, 0, "")
    rows = cut_after(job.run / "metrics.jsonl", step, job.report)
    return checkpoint, resumed_progress(rows), cut_after(job.run / "eval.jsonl", step, job.report)


def _save(job: Job, model: Any) -> Mark | None:
    """Write the run's adapter or model: the best evaluated one, whose mark is returned, or the last one."""
    name = TRAINED[job.planned.recipe.train.method]
    best = best_mark(job.run) if job.exam else None
    with disk_errors(job.run, name), draft(job.run / name) as folder:
        if best is None:
            save_trained(model, folder, job.planned.base)
        else:
            shutil.copytree(best_folder(job.run, best), folder, ignore=shutil.ignore_patterns("eval.json"))
    return best


def _identity(job: Job) -> dict[str, Any]:
    """What the run was made from, for its manifest."""
    base, data = job.planned.base, job.planned.recipe.data
    return {
        "name": job.name,
        "recipe": asdict(job.planned.recipe),
        "method": job.planned.recipe.train.method,
        "base": {"name": base.name, "directory": str(base.directory), "gguf": base.gguf and str(base.gguf)},
        "data": {"source": data.train, "sha256": job.planned.prepared.data_sha256, **job.planned.prepared.summary},
        "template_sha256": job.planned.chat.template_sha256,
        "prompt_style": data.style,
        "prompt_layout": LAYOUTS[data.style],
        "setting": data.setting,
        "device": device_name(),
        "arithmetic": arithmetic_name(),
        "versions": versions(),
    }


def _fit(trainer: Any, checkpoint: Path | None, stop: Stop) -> None:
    with stop.between_steps():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


@contextmanager
def memory_errors(recipe: Recipe) -> Iterator[None]:
    """Turn memory that is too little into a PetoolError with what would take less."""
    import torch

    smaller = "train.method=lora" if recipe.train.method == "full" else "model.precision=nf4"
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise PetoolError(
            f"out of GPU memory: {str(error).splitlines()[0]}",
            f"set a smaller train.token_budget, train.checkpointing=true, {smaller} or a smaller "
            "model.max_tokens; --dry-run shows what each takes",
            MACHINE,
        ) from error


def optimizer_arguments(settings: TrainSettings, total: int) -> dict[str, Any]:
    """How weights move in a run of `total` updates, as the arguments of transformers' trainers."""
    return {
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.schedule,
        "warmup_steps": max(1, round(total * settings.warmup_ratio)) if settings.warmup_ratio else 0,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.clip_norm,
        "optim": settings.optimizer,
    }


def _arguments(recipe: Recipe, run: Path, total: int) -> Any:
    import torch
    from trl import DPOConfig, SFTConfig

    settings = recipe.train
    common = {
        "output_dir": str(run / "checkpoints"),
        "num_train_epochs": settings.epochs,
        "max_steps": settings.max_steps or -1,
        **optimizer_arguments(settings, total),
        "bf16": arithmetic() == torch.bfloat16,
        "seed": settings.seed,
        "data_seed": settings.seed,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # it would hide such a loss; Guarded looks once an update
        "save_strategy": "steps",
        "save_steps": settings.save_every or total,
        "report_to": check_reporters(settings.report_to) or "none",
        "disable_tqdm": True,
        "max_length": None,
        "remove_unused_columns": False,
        "ddp_find_unused_parameters": False,
        "ddp_broadcast_buffers": False,
        "ddp_timeout": 7200,  # seconds; the others wait while the first evaluates
    }
    if settings.objective == "dpo":
        return DPOConfig(
            **common,
            beta=settings.beta,
            per_device_train_batch_size=settings.batch_size,
            gradient_accumulation_steps=rows_a_device(recipe, count()) // settings.batch_size,
        )
    return SFTConfig(
        **common,
        # a batch is a whole update; AnswerTrainer parts it among the devices and cuts it into micro-steps
        per_device_train_batch_size=settings.batch_size * settings.accumulate,
        gradient_accumulation_steps=1,
        **(_without_unsloth(recipe) if settings.method == "full" else {}),
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )


def _without_unsloth(recipe: Recipe) -> dict[str, Any]:
    """What Unsloth and petool-lite's layers see to themselves where there is an adapter."""
    import torch

    return {
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": recipe.train.checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    }


def _trainer(job: Job, model: Any, tokenizer: Any, progress: Progress, exams: list[dict[str, Any]], stop: Stop) -> Any:
    """The trainer of a job with its callbacks."""
    from transformers import PrinterCallback, ProgressCallback

    recipe = job.planned.recipe
    kind = preference_trainer() if recipe.train.objective == "dpo" else answer_trainer(recipe)

    total = job.planned.prepared.summary["steps"]
    own = [recorder(job.run, total, progress, job.report), stopper(stop)]
    if job.exam:
        own.insert(
            1, examiner(job.run, job.planned.base, job.exam, job.planned.recipe.train, exams, progress, job.report)
        )
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(job.run / "tensorboard"))
    trainer: Any = type("Trainer", (Guarded, kind), {})(
        model=model,
        processing_class=tokenizer,
        args=_arguments(job.planned.recipe, job.run, total),
        train_dataset=job.planned.prepared.table,
        callbacks=own,
    )
    for parameter in model.parameters():
        if parameter.requires_grad:  # TRL rounds them to bfloat16 over a 4-bit base; small steps would be lost
            parameter.data = parameter.data.float()
    for callback in own:
        callback.trainer = trainer
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer
