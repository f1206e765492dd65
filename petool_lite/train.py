"""`train`: a recipe becomes a LoRA adapter in a run directory. The only module that imports unsloth.

Unsloth patches the model's layers; TRL's SFTTrainer runs the loop. The loss is computed on answer tokens
only, and the output head runs for those positions only: in PEToolBench they are 1-2 % of a row.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

from petool_lite.base import Base, resolve_base
from petool_lite.console import Report, facts_text, silent
from petool_lite.errors import MACHINE, PetoolError
from petool_lite.prepare import Prepared, prepare
from petool_lite.prompt import Chat, chat_from_directory
from petool_lite.recipe import Recipe, to_toml
from petool_lite.runs import create_run, draft, versions, write_json, write_text

_IGNORED = -100  # label of a token without loss, as torch's cross entropy has it


def plan(recipe: Recipe, report: Report = silent) -> tuple[Base, Chat, Prepared]:
    """Everything that is checked and counted before a model is loaded."""
    check_machine(recipe)
    base = resolve_base(recipe.model.base, lambda text: report(text, 0, 0, ""))
    chat = chat_from_directory(base.directory)
    prepared = prepare(recipe, base, chat, report)
    prepared.summary["steps"] = steps(recipe, prepared.summary["kept"])
    report(facts_text("training rows", prepared.summary), 0, 0, "")
    if prepared.left_out:
        names = ", ".join(prepared.left_out[:5]) + (", ..." if len(prepared.left_out) > 5 else "")
        why = f"more than {recipe.model.max_tokens} tokens"
        if recipe.data.overlength == "trim-history":
            why += " even without history (tools and answers are never cut)"
        report(f"left out, {why}: entries {names}", 0, 0, "")
    return base, chat, prepared


def steps(recipe: Recipe, rows: int) -> int:
    """Optimizer steps of the whole run."""
    if recipe.train.max_steps:
        return recipe.train.max_steps
    micro = -(-rows // recipe.train.batch_size)
    return max(1, int(-(-micro // recipe.train.accumulate) * recipe.train.epochs))


def check_machine(recipe: Recipe) -> None:
    """Refuse a recipe that this machine cannot run, before anything is loaded."""
    import torch

    if recipe.train.optimizer.startswith("paged") and not torch.cuda.is_available():
        raise PetoolError(
            f"the optimizer {recipe.train.optimizer} needs a GPU, and torch finds none",
            "run on a GPU machine; here: petool-lite train demo, or --set train.optimizer=adamw_torch",
            MACHINE,
        )


def train(name: str, recipe: Recipe, report: Report = silent, resume: Path | None = None) -> Path:
    """Train `recipe` and return the complete run directory; `resume` continues an unfinished one."""
    started = time.time()
    base, chat, prepared = plan(recipe, report)
    run = resume or create_run(name)
    if resume is None:
        write_text(run / "recipe.toml", to_toml(recipe))
    try:
        _train_into(run, name, recipe, base, chat, prepared, started, report, resume is not None)
    except PetoolError:
        if resume is None and _newest_checkpoint(run) is None:
            shutil.rmtree(run)  # nothing to resume from
        raise
    return run


def _train_into(
    run: Path,
    name: str,
    recipe: Recipe,
    base: Base,
    chat: Chat,
    prepared: Prepared,
    started: float,
    report: Report,
    resume: bool,
) -> None:
    report(f"loading {base.name} through Unsloth", 0, 0, "")
    with _log_to(run / "train.log") as log:
        with redirect_stderr(log):
            model, tokenizer = _load(recipe, base)
        trainer = _trainer(recipe, model, tokenizer, prepared, run, report)
        checkpoint = _newest_checkpoint(run) if resume else None
        trained_from = time.time()
        _fit(trainer, checkpoint)
        seconds = time.time() - trained_from
    with draft(run / "adapter") as folder:
        model.save_pretrained(str(folder))
        _name_base(folder, base)
    write_json(
        run / "manifest.json",
        {
            "name": name,
            "recipe": asdict(recipe),
            "base": {"name": base.name, "directory": str(base.directory), "gguf": base.gguf and str(base.gguf)},
            "data": {"source": recipe.data.train, "sha256": prepared.data_sha256, **prepared.summary},
            "template_sha256": chat.template_sha256,
            "prompt_style": recipe.data.style,
            "setting": recipe.data.setting,
            "device": _device_name(),
            "versions": versions(),
            "seconds": {"train": round(seconds, 2), "all": round(time.time() - started, 2)},
            "tokens_per_s": round(trainer.tokens_seen / seconds, 1),
            "peak_memory_gb": round(_peak_memory_gb(), 3),
            "final_loss": trainer.last_loss,
        },
    )


@contextmanager
def _log_to(path: Path) -> Iterator[Any]:
    """Libraries print banners and advice to stdout, which is for data here: keep it in the run's train.log instead."""
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # warns about torchao's enums at import
    with path.open("a") as log, redirect_stdout(log):
        yield log


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


def _name_base(adapter: Path, base: Base) -> None:
    # PEFT records the cache directory; what a reader needs is the name that the recipe gave.
    config_file = adapter / "adapter_config.json"
    config = json.loads(config_file.read_text())
    config["base_model_name_or_path"] = base.name
    config_file.write_text(json.dumps(config, indent=2))


def _device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"


def _peak_memory_gb() -> float:
    """Peak memory of this process in GiB: allocated on the GPU, or resident on a CPU."""
    import resource

    import torch

    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated()) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _load(recipe: Recipe, base: Base) -> tuple[Any, Any]:
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from unsloth import FastLanguageModel  # must come before transformers and trl

    import torch
    from safetensors import SafetensorError

    try:
        model, tokenizer = FastLanguageModel.from_pretrained(
            str(base.directory),
            max_seq_length=recipe.model.max_tokens,
            dtype=torch.bfloat16,
            load_in_4bit=recipe.model.precision == "nf4",
        )
    except torch.OutOfMemoryError as error:
        raise PetoolError(
            f"the base {base.name} does not fit the GPU's memory", "set model.precision=nf4", MACHINE
        ) from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise PetoolError(f"the base {base.name} does not load: {first_line}", "get the model again") from error
    model = FastLanguageModel.get_peft_model(
        model,
        r=recipe.lora.r,
        lora_alpha=recipe.lora.alpha,
        lora_dropout=recipe.lora.dropout,
        target_modules=recipe.lora.targets,
        use_gradient_checkpointing="unsloth" if recipe.train.checkpointing else False,
        random_state=recipe.train.seed,
    )
    return model, tokenizer


def _newest_checkpoint(run: Path) -> Path | None:
    folders = [path for path in (run / "checkpoints").glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return max(folders, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def collate(rows: Sequence[dict[str, Any]], pad_id: int) -> dict[str, Any]:
    """Pad rows (`input_ids`, `answer_start`) on the right into (rows, longest) tensors of input_ids and labels.

    No attention mask: attention is causal, so the padding at the end is never seen by a real token.
    """
    import torch

    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.full((len(rows), longest), pad_id)
    labels = torch.full((len(rows), longest), _IGNORED)
    for index, row in enumerate(rows):
        start, end = row["answer_start"], len(row["input_ids"])
        ids[index, :end] = torch.tensor(row["input_ids"])
        labels[index, start:end] = ids[index, start:end]
    return {"input_ids": ids, "labels": labels}


def answer_loss(model: Any, ids: Any, labels: Any) -> tuple[Any, int]:
    """Summed cross entropy over the labelled tokens and their number; the head runs for those positions only.

    `ids` and `labels` have the shape (rows, length); a label of -100 carries no loss.
    """
    import torch

    causal = model.get_base_model()
    with torch.autocast(ids.device.type, dtype=torch.bfloat16):
        hidden = causal.model(input_ids=ids, use_cache=False).last_hidden_state
        targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=_IGNORED)
        keep = targets != _IGNORED
        logits = causal.lm_head(hidden[keep])
    return torch.nn.functional.cross_entropy(logits.float(), targets[keep], reduction="sum"), int(keep.sum())


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


def _trainer(recipe: Recipe, model: Any, tokenizer: Any, prepared: Prepared, run: Path, report: Report) -> Any:
    from transformers import PrinterCallback, ProgressCallback, TrainerCallback
    from trl import SFTTrainer

    total = prepared.summary["steps"]

    class AnswerTrainer(SFTTrainer):
        """SFTTrainer whose loss is `answer_loss`, each answer token of an update weighing the same."""

        tokens_seen = 0
        last_loss: float | None = None

        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            loss, count = answer_loss(self.accelerator.unwrap_model(model), inputs["input_ids"], inputs["labels"])
            self.tokens_seen += int((inputs["input_ids"] != tokenizer.pad_token_id).sum())
            loss = loss / (num_items_in_batch if num_items_in_batch is not None else count)
            return (loss, None) if return_outputs else loss

    class Record(TrainerCallback):
        """Appends metrics.jsonl and reports progress; a loss that is not finite stops the run."""

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
            trainer.last_loss = loss
            seconds = time.time() - self.started
            row = {
                "step": state.global_step,
                "loss": loss,
                "learning_rate": float(logs["learning_rate"]),
                "grad_norm": float(logs["grad_norm"]),
                "seconds": round(seconds, 3),
                "tokens": trainer.tokens_seen,
                "tokens_per_s": round(trainer.tokens_seen / seconds, 1),
                "peak_memory_gb": round(_peak_memory_gb(), 3),
            }
            with (run / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            report("training", state.global_step, total, f"loss {loss:.3f}, {row['tokens_per_s']:.0f} tokens/s")

    trainer = AnswerTrainer(
        model=model,
        processing_class=tokenizer,
        args=_arguments(recipe, run, total),
        train_dataset=prepared.table,
        data_collator=lambda batch: collate(batch, tokenizer.pad_token_id),
        callbacks=[Record()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    # answer_loss divides by the items of the whole update, which the trainer counts only for models that say so
    trainer.model_accepts_loss_kwargs = True
    return trainer
