"""The training loop of one run: model and trainer, the adapter it leaves, and the manifest that completes it."""

import time
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from petool_lite.base import Base
from petool_lite.console import Report
from petool_lite.errors import MACHINE, PetoolError
from petool_lite.prepare import Prepared
from petool_lite.prompt import Chat
from petool_lite.recipe import Recipe
from petool_lite.runs import draft, versions, write_json
from petool_lite.train.checkpoints import newest_checkpoint
from petool_lite.train.microstep import answer_trainer
from petool_lite.train.model import load_model, name_base
from petool_lite.train.records import device_name, log_to, peak_memory_gb, recorder


@dataclass(frozen=True)
class Job:
    """One run to train: where it lies, what it trains on, when it began (epoch seconds), and who hears of it."""

    name: str
    run: Path
    recipe: Recipe
    base: Base
    chat: Chat
    prepared: Prepared
    started: float
    report: Report
    resume: bool


def train_into(job: Job) -> None:
    """Train, save the adapter, then the manifest; raises PetoolError."""
    job.report(f"loading {job.base.name} through Unsloth", 0, 0, "")
    with log_to(job.run / "train.log") as log:
        with redirect_stderr(log):
            model, tokenizer = load_model(job.recipe, job.base)
        trainer, record = _trainer(job, model, tokenizer)
        checkpoint = newest_checkpoint(job.run) if job.resume else None
        trained_from = time.time()
        _fit(trainer, checkpoint)
        seconds = time.time() - trained_from
    with draft(job.run / "adapter") as folder:
        model.save_pretrained(str(folder))
        name_base(folder, job.base)
    figures = {
        "seconds": {"train": round(seconds, 2), "all": round(time.time() - job.started, 2)},
        "tokens_per_s": round(trainer.tokens_seen / seconds, 1),
        "peak_memory_gb": round(peak_memory_gb(), 3),
        "final_loss": record.last_loss,
    }
    write_json(job.run / "manifest.json", _identity(job) | figures)


def _identity(job: Job) -> dict[str, Any]:
    """What the run was made from, for its manifest."""
    base, data = job.base, job.recipe.data
    return {
        "name": job.name,
        "recipe": asdict(job.recipe),
        "base": {"name": base.name, "directory": str(base.directory), "gguf": base.gguf and str(base.gguf)},
        "data": {"source": data.train, "sha256": job.prepared.data_sha256, **job.prepared.summary},
        "template_sha256": job.chat.template_sha256,
        "prompt_style": data.style,
        "setting": data.setting,
        "device": device_name(),
        "versions": versions(),
    }


def _fit(trainer: Any, checkpoint: Path | None) -> None:
    import torch

    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.OutOfMemoryError as error:
        raise PetoolError(
            f"out of GPU memory: {str(error).splitlines()[0]}",
            "set train.checkpointing=true, model.precision=nf4, train.batch_size=1 or a smaller model.max_tokens",
            MACHINE,
        ) from error


def _arguments(recipe: Recipe, run: Path, total: int) -> Any:
    from trl import SFTConfig

    settings = recipe.train
    return SFTConfig(
        output_dir=str(run / "checkpoints"),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=max(1, round(total * settings.warmup_ratio)) if settings.warmup_ratio else 0,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.clip_norm,
        optim=settings.optimizer,
        bf16=True,
        seed=settings.seed,
        data_seed=settings.seed,
        logging_steps=1,
        save_strategy="steps",
        save_steps=settings.save_every or total,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        max_length=None,
        packing=False,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )


def _trainer(job: Job, model: Any, tokenizer: Any) -> tuple[Any, Any]:
    """The trainer of a job and its recorder."""
    from transformers import PrinterCallback, ProgressCallback

    total = job.prepared.summary["steps"]
    record = recorder(job.run, total, job.report)
    trainer = answer_trainer()(
        model=model,
        processing_class=tokenizer,
        args=_arguments(job.recipe, job.run, total),
        train_dataset=job.prepared.table,
        callbacks=[record],
    )
    record.trainer = trainer
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer, record
