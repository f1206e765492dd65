"""`train`: a recipe becomes a LoRA adapter, or a model of its own, in a run directory; TRL's trainer runs the loop."""

import os
import shutil
import time
from contextlib import ExitStack, redirect_stderr
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from petool_lite.console import Report, silent
from petool_lite.errors import MACHINE, PetoolError, first_line
from petool_lite.inference.gpu import gpu_available
from petool_lite.places import library_places
from petool_lite.prompt.render import LAYOUTS
from petool_lite.recipe import Recipe, to_toml
from petool_lite.runs import TRAINED, create_run, draft, is_complete, locked, versions, write_json, write_text
from petool_lite.train import devices, evaluate, load, records
from petool_lite.train.devices import Stop, stop_signals
from petool_lite.train.evaluate import EvaluationSet
from petool_lite.train.memory import Plan, peak_bytes, plan
from petool_lite.train.records import Guarded, Progress, check_reporters, log_to
from petool_lite.train.step import MicroBatch, answer_loss, answer_trainer, micro_batches, preference_trainer

# Size of a checkpoint with AdamW's two states, in what is saved: an adapter in float32, or a model in bfloat16.
_CHECKPOINT = {"lora": 3.1, "full": 6.1}


@dataclass(frozen=True)
class Job:
    """One run to train: where it lies, what it trains on, when it began (epoch seconds), and who hears of it."""

    name: str
    run: Path
    planned: Plan
    held_out: EvaluationSet | None
    started: float
    report: Report
    stop: Stop
    resume: bool
    progress: Progress = field(default_factory=Progress)


def train(name: str, recipe: Recipe, report: Report = silent, resume: Path | None = None) -> Path:
    """Train `recipe` and return the complete run directory; `resume` continues an unfinished one. Ctrl-C or SIGTERM
    while it trains saves a checkpoint and raises PetoolError with the command that continues, exit code 130 or 143; a
    second one ends the process. A new run that has not trained a step leaves nothing."""
    started = time.time()
    library_places()
    devices.grow_in_place()
    run: Path | None = resume
    report = report if devices.is_first() else silent
    done = records.steps_at(records.newest_checkpoint(resume)) if resume else 0
    with stop_signals() as stop, devices.joined(), ExitStack() as held:
        try:
            if devices.is_first() and resume is not None:
                held.enter_context(locked(resume))
                if is_complete(resume):  # by a process that this one has just missed
                    raise PetoolError(f"the run {resume} is complete", "start a new one: petool-lite train RECIPE")
            planned = devices.first_then_others(lambda: plan(recipe, report, done))
            recipe, way = devices.from_first((planned.recipe, planned.way))  # GPUs may differ a little in what is free
            planned = replace(planned, recipe=recipe, way=way)
            held_out = evaluate.load_evaluation_set(recipe, planned.chat, report)
            if devices.is_first():
                facts = records.start_facts(recipe, planned.base, planned.prepared)
                if resume is not None:
                    records.check_resume(resume, facts)
                else:
                    run = create_run(name)
                    write_text(run / "recipe.toml", to_toml(recipe))
                    write_json(run / records.START, facts)
                    held.enter_context(locked(run))
            begun: Path = devices.from_first(run)
            _train_into(Job(name, begun, planned, held_out, started, report, stop, resume is not None))
        except (PetoolError, KeyboardInterrupt) as error:
            stepped = run is not None and (run / "metrics.jsonl").is_file()
            if devices.is_first() and run is not None and resume is None and not stepped:
                shutil.rmtree(run)  # nothing to look at or to resume from
            if isinstance(error, PetoolError):
                raise
            when = "while loading or saving" if stepped else "before the first step"
            hint = f"continue: petool-lite train --resume {run}" if stepped or resume else ""
            raise stop.error(when, hint) from error
    return begun


def _train_into(job: Job) -> None:
    """Train, save the result, then the manifest; raises PetoolError, also where a signal stopped it with all saved."""
    import torch

    recipe = job.planned.recipe
    checkpoint = devices.first_then_others(lambda: _continued(job)) if job.resume else None
    through = "" if recipe.train.method == "full" or devices.sharded() else " through Unsloth"
    job.report(f"loading {job.planned.base.name}{through}", 0, 0, "")
    # on a GPU dpo computes layers' inner values twice, too; its memory is not predicted
    twice = job.planned.way.checkpointing if job.planned.way else gpu_available()
    log_file = job.run / "train.log" if devices.is_first() else Path(os.devnull)
    try:
        with log_to(log_file) as log:
            with redirect_stderr(log):
                model, tokenizer = load.load_model(recipe, job.planned.base, twice, plain=devices.sharded())
                if job.planned.compiled:
                    load.compile_layers(model)
                trainer = _trainer(job, model, tokenizer)
            if job.planned.way is not None and not devices.sharded():  # a parted model is on the GPUs when it trains
                job = replace(job, planned=_dry_step(job, trainer))
            with job.stop.between_steps():
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.OutOfMemoryError as error:
        smaller = "train.method=lora" if recipe.train.method == "full" else "model.precision=nf4"
        hint = f"set a smaller train.token_budget, {smaller} or a smaller model.max_tokens"
        raise PetoolError(f"out of GPU memory: {first_line(error)}", hint, MACHINE) from error
    if devices.is_first():
        records.draw_curve(job.run)
    state, stop = trainer.state, job.stop
    if stop.caught and not job.progress.stopped_early and state.global_step < state.max_steps:
        when = f"after step {state.global_step} of {state.max_steps}, all of it saved"
        raise stop.error(when, f"continue: petool-lite train --resume {job.run}")
    tuned = None
    if devices.sharded():  # the adapter's weights, of which every process holds a part
        tuned = {name: part.full_tensor() for name, part in trainer.model.named_parameters() if part.requires_grad}
    if devices.is_first():
        _complete(job, model, state.global_step, tuned)


def _dry_step(job: Job, trainer: Any) -> Plan:
    """Before the first update on a GPU: the largest micro-batch forward and backward, one evaluation, one save, so that
    a run fails now or never; nothing is learned. Returns the plan, with smaller micro-batches where they did not fit
    and plain layers where they did not compile. Raises torch.OutOfMemoryError, or PetoolError for a full disk."""
    import torch

    planned, model = job.planned, trainer.model
    assert planned.way is not None
    way, method = planned.way, planned.recipe.train.method
    if planned.compiled:
        planned = replace(planned, compiled=compiles(model, fullest(planned, way.token_budget), job.report))
    while devices.agreed(not _fits(model, batch := fullest(planned, way.token_budget))):
        fewer = max(max(planned.load.lengths), int(0.85 * way.token_budget))
        if fewer == way.token_budget:
            raise torch.OutOfMemoryError(f"the longest row has {fewer:,} tokens")
        job.report(f"{way.token_budget:,} tokens a micro-batch do not fit after all; trying {fewer:,}", 0, 0, "")
        way = replace(way, token_budget=fewer)
    peak = torch.cuda.max_memory_allocated() / 2**30
    trainer.token_budget = way.token_budget
    if (held_out := job.held_out) is not None and devices.is_first():
        longest = max(held_out.rows, key=lambda row: len(row[0]))
        evaluate.evaluate(replace(held_out, rows=(longest,), too_long=0, reply_tokens=2), model, 0, silent)
    if devices.is_first():  # beside its place, and removed; there must be room for three checkpoints of it
        with records.disk_errors(job.run, TRAINED[method]), draft(job.run / "dry-step") as folder:
            load.save_trained(model, folder, planned.base)
            needed = 3 * _CHECKPOINT[method] * sum(file.stat().st_size for file in folder.iterdir())
        shutil.rmtree(job.run / "dry-step")
        if (room := shutil.disk_usage(job.run).free) < needed:
            what = f"the checkpoints of this run take {needed / 1e9:.1f} GB, {room / 1e9:.1f} GB are free on {job.run}"
            raise PetoolError(what, "make room, or set PETOOL_LITE_RUNS to a larger disk")
    tokens, shape = len(batch.ids), (way.precision, way.checkpointing)
    predicted = peak_bytes(planned.shape, planned.recipe, shape, tokens, planned.load, False, planned.compiled)
    figures = f"peak {peak:.2f} GiB, predicted {predicted / 2**30:.2f}"
    job.report(f"dry step: a micro-batch of {tokens:,} tokens ({figures}), a save", 0, 0, "")
    return replace(planned, way=way)


def compiles(model: Any, batch: MicroBatch, report: Report) -> bool:
    """Whether the layers compile, tried with a first micro-batch; if not, it is told, and they run as they were."""
    report("compiling the layers, about half a minute", 0, 0, "")
    try:
        _fits(model, batch)
        return True
    except Exception as error:  # whatever a compiler meets; what the layers themselves do wrong comes again
        told = first_line(getattr(error, "inner_exception", error))
    load.exchange_compiled(model)
    report(f"the layers do not compile and run as they are: {told}", 0, 0, "")
    return False


def _fits(model: Any, batch: MicroBatch) -> bool:
    """Whether a micro-batch goes forward and backward within the GPU's memory; the model is left as it was."""
    import torch

    torch.cuda.reset_peak_memory_stats()
    try:
        with evaluate.same_randomness():
            (answer_loss(model, batch) / len(batch.answers)).backward()
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()


def fullest(planned: Plan, budget: int) -> MicroBatch:
    """About the fullest micro-batch there can be: the longest row, and of the others, longest first, what has room."""
    lengths = planned.load.lengths
    chosen: list[int] = []
    left = most = max(budget, *lengths)
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if lengths[index] <= left and len(chosen) < planned.recipe.train.rows:
            chosen.append(index)
            left -= lengths[index]
    (batch,) = micro_batches(list(planned.prepared.table.select(chosen)), most)
    return batch


def _complete(job: Job, model: Any, step: int, tuned: dict[str, Any] | None) -> None:
    """Write what was trained, the best evaluated weights or the last ones, then the manifest."""
    import torch

    planned, progress, method = job.planned, job.progress, job.planned.recipe.train.method
    base, data, name = planned.base, planned.recipe.data, TRAINED[method]
    best = evaluate.best_score(job.run) if job.held_out else None
    with records.disk_errors(job.run, name), draft(job.run / name) as folder:
        if best is None:
            load.save_trained(model, folder, base, tuned)
        else:
            shutil.copytree(job.run / "best" / f"step-{best.step}", folder, ignore=shutil.ignore_patterns("eval.json"))
        if method == "lora":  # a whole model may be a base again, with its own template
            load.save_tokenizer(folder, base, data.style)
    seconds = {"train": progress.seconds, "evaluation": progress.evaluation_seconds, "all": time.time() - job.started}
    manifest = {
        "name": job.name, "recipe": asdict(planned.recipe), "method": method,
        "base": {"name": base.name, "directory": str(base.directory), "gguf": base.gguf and str(base.gguf)},
        "data": {"source": data.train, "sha256": planned.prepared.data_sha256, **planned.prepared.summary},
        "template_sha256": planned.chat.template_sha256,
        "prompt_style": data.style, "prompt_layout": LAYOUTS[data.style], "setting": data.setting,
        "device": torch.cuda.get_device_name() if gpu_available() else f"CPU, {torch.get_num_threads()} threads",
        "arithmetic": devices.arithmetic_name(), "versions": versions(),
        "steps": step, f"{name}_step": best.step if best else step,
        "evaluation": best and {"best": asdict(best), "stopped_early": progress.stopped_early},
        "seconds": {part: round(value, 2) for part, value in seconds.items()},
        "tokens_per_s": round(progress.tokens / progress.seconds, 1),
        **dict(zip(("peak_memory_gb", "reserved_memory_gb"), records.peak_memory_gb(), strict=True)),
        "memory": planned.way and asdict(planned.way), "compiled": planned.compiled,
        "final_loss": progress.last_loss,
    }  # fmt: skip
    write_json(job.run / "manifest.json", manifest)
    shutil.rmtree(job.run / "best", ignore_errors=True)


def _continued(job: Job) -> Path | None:
    """The checkpoint to go on from; what metrics.jsonl and eval.jsonl hold up to there is kept and taken in."""
    for path in (path for place in ("checkpoints", "best") for path in job.run.glob(f"{place}/.*.draft")):
        job.report(f"removing the half-written {path.name.removeprefix('.').split('.')[0]}", 0, 0, "")
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    checkpoint = records.newest_checkpoint(job.run)
    step = records.steps_at(checkpoint)
    job.report(f"continuing {job.run} after step {step}", 0, 0, "")
    progress = job.progress
    progress.scores = records.cut_after(job.run / "eval.jsonl", step, job.report)
    if rows := records.cut_after(job.run / "metrics.jsonl", step, job.report):
        progress.seconds, progress.tokens, progress.last_loss = (rows[-1][key] for key in ("seconds", "tokens", "loss"))
        progress.tokens_before = progress.tokens
    return checkpoint


def _arguments(recipe: Recipe, run: Path, total: int, compiled: bool) -> Any:
    from trl import DPOConfig, SFTConfig

    settings = recipe.train
    common = {
        "output_dir": str(run / "checkpoints"), "max_steps": total,  # the one count; epochs follow from it
        "optim": settings.optimizer + ("_fused" if compiled and settings.optimizer == "adamw_torch" else ""),
        "learning_rate": settings.learning_rate,  # the highest; over time it is as `Guarded` has it
        "weight_decay": settings.weight_decay, "max_grad_norm": settings.clip_norm,
        # of a parted model accelerate would make float32 copies; answer_loss computes in bfloat16 anyway
        "bf16": devices.arithmetic_name() == "bfloat16" and not devices.sharded(),
        "seed": settings.seed, "data_seed": settings.seed, "logging_steps": 1,
        "logging_nan_inf_filter": False,  # it would hide such a loss; Guarded looks once an update
        "save_steps": settings.save_every or total, "report_to": check_reporters(settings.report_to) or "none",
        "disable_tqdm": True,  # it prints to train.log instead
        "max_length": None, "remove_unused_columns": False,
        "ddp_find_unused_parameters": False, "ddp_broadcast_buffers": False,
    }  # fmt: skip
    if settings.objective == "dpo":  # one pair after the other
        each, left = divmod(settings.rows, devices.count())
        if left:
            told = f"{settings.rows} rows an update cannot be shared by {devices.count()} devices"
            raise PetoolError(told, "choose train.rows as a multiple of the devices")
        return DPOConfig(**common, beta=settings.beta, per_device_train_batch_size=1, gradient_accumulation_steps=each)
    # a batch is a whole update; AnswerTrainer parts it among the devices and cuts it into micro-batches
    common |= {"per_device_train_batch_size": settings.rows, "gradient_accumulation_steps": 1}
    common |= {"use_cpu": not gpu_available()} if settings.method == "full" else {}
    # `load` sees to checkpointing
    return SFTConfig(**common, gradient_checkpointing=False, dataset_kwargs={"skip_prepare_dataset": True})


def _trainer(job: Job, model: Any, tokenizer: Any) -> Any:
    """The trainer of a job, which records its updates, evaluates after some, and ends after a signal."""
    recipe, total = job.planned.recipe, job.planned.prepared.summary["steps"]
    kind: Any = preference_trainer() if recipe.train.objective == "dpo" else answer_trainer()
    arguments = _arguments(recipe, job.run, total, job.planned.compiled)
    arguments._n_gpu = min(1, arguments.n_gpu)  # a process has one, whatever else the machine has
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(job.run / "tensorboard"))
    kind, table = type("Trainer", (Guarded, kind), {}), job.planned.prepared.table
    trainer = kind(model=model, processing_class=tokenizer, train_dataset=table, args=arguments)
    trainer.token_budget, trainer.compiled = recipe.train.token_budget, job.planned.compiled
    trainer.schedule = recipe.train.schedule, recipe.train.warmup_ratio, total
    for parameter in model.parameters():
        if parameter.requires_grad:  # TRL rounds them to bfloat16 over a 4-bit base; small steps would be lost
            parameter.data = parameter.data.float()

    def before_update() -> None:
        if not job.progress.clock:
            job.progress.clock = time.time()
            job.report("training", trainer.state.global_step, total, "")

    def after_update(logs: dict[str, Any]) -> None:
        row = job.progress.update(trainer.state.global_step, trainer.tokens_seen, logs)
        if devices.is_first():
            records.append_row(job.run / "metrics.jsonl", row)
        job.report("training", row["step"], total, records.note(row))
        if job.held_out is not None and (row["step"] % recipe.train.eval_every == 0 or row["step"] == total):
            _evaluate(job, job.held_out, trainer)
        if devices.agreed(job.stop.caught is not None):
            trainer.control.should_save = trainer.control.should_training_stop = True

    trainer.before_update, trainer.after_update = before_update, after_update
    return trainer


def _evaluate(job: Job, held_out: EvaluationSet, trainer: Any) -> None:
    """Evaluate, and stop the training where `early_stop` evaluations in a row brought nothing better."""
    step, patience = trainer.state.global_step, job.planned.recipe.train.early_stop
    progress, scores = job.progress, job.progress.scores
    if devices.is_first():  # the other processes wait
        scores.append(evaluate.keep_best(job.run, job.planned.base, held_out, trainer.model, step, job.report))
        progress.evaluation_seconds += scores[-1]["seconds"]
        progress.clock = time.time()
        trainer.log({f"eval_{key}": scores[-1][key] for key in ("tool_acc", "param_acc", "joint_acc")})
    if devices.agreed(bool(patience) and evaluate.waited(scores) >= patience and step < trainer.state.max_steps):
        progress.stopped_early = trainer.control.should_training_stop = True
        job.report(f"stopping early: {evaluate.waited(scores)} evaluations in a row brought nothing better", 0, 0, "")
