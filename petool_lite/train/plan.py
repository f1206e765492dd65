"""Everything that is checked, counted and chosen before a model is loaded."""

import math
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from petool_lite.console import Report, plain, silent
from petool_lite.errors import MACHINE, PetoolError
from petool_lite.export import check_exportable
from petool_lite.families import Shape, read_json, shape_of
from petool_lite.inference.gpu import gpu_available, gpu_facts
from petool_lite.models import Base, resolve_base
from petool_lite.prompt.prepare import Prepared, prepare
from petool_lite.prompt.render import Chat, chat_from_directory
from petool_lite.recipe import Recipe, builtin_recipes, load_recipe
from petool_lite.train.devices import count, sharded
from petool_lite.train.evaluate import check_evaluation
from petool_lite.train.load import check_start
from petool_lite.train.memory import (
    CPU_BUDGET,
    Way,
    check_cpu_memory,
    choose,
    largest_batch,
    load_of,
    peak_bytes,
)
from petool_lite.train.records import check_reporters

_COMPILED_FROM = 10_000_000  # tokens to go: compiling takes 26 s, and saves 2.3 to 2.7 us a token (docs/training.md)
_PAGED = "paged"  # how optimizers begin that need a GPU
_CAPABILITY = (8, 0)  # of a GPU, the least: bfloat16 in its tensor cores, and torch's flash attention


@dataclass(frozen=True)
class Plan:
    """A run before its model is loaded: the recipe with what was chosen written into it, and how memory is used on the
    GPU (None on a CPU and for dpo), and whether its decoder layers are compiled."""

    recipe: Recipe
    base: Base
    shape: Shape
    chat: Chat
    prepared: Prepared
    way: Way | None = None
    compiled: bool = False


def plan(recipe: Recipe, report: Report = silent, done: int = 0) -> Plan:
    """Check and count a recipe's rows and choose how to train on from `done` updates; no model is loaded."""
    check_machine(recipe)
    settings = recipe.train
    odd = settings.method == "full" or settings.objective == "dpo" or settings.optimizer != "adamw_torch"
    if sharded() and (odd or settings.eval_every):
        what = "a model that FSDP parts learns an adapter with plain AdamW, and is not evaluated meanwhile"
        plain = "train.method=lora train.objective=sft train.optimizer=adamw_torch train.eval_every=0"
        raise PetoolError(what, " ".join(f"--set {pair}" for pair in plain.split()))
    counted = _counted(recipe, report)
    shape, prepared, gpu = counted.shape, counted.prepared, gpu_facts()
    if not gpu:
        check_cpu_memory(recipe, counted.base)
    if recipe.train.objective == "dpo":  # one pair after the other
        return counted
    load = load_of(prepared)
    way, precision, budget = None, recipe.model.precision, CPU_BUDGET
    if gpu:
        way = choose(shape, recipe, load, gpu["free_gb"] * 2**30)
        precision, budget = way.precision, way.token_budget
    rows = recipe.train.rows * (prepared.summary["steps"] - done)
    compiled = pays_to_compile(recipe, shape, way, rows * prepared.summary["tokens"] / prepared.summary["kept"])
    if way:
        if compiled:
            tokens = largest_batch(recipe, budget, load)
            peak = peak_bytes(shape, recipe, (precision, False), tokens, load, compiled=True)
            way = replace(way, peak_gb=round(peak / 2**30, 2))
        again = "checkpointing" if way.checkpointing else "all kept"
        chosen = f"{precision} base, {again}, {budget:,} tokens a micro-batch{', compiled layers' * compiled}"
        report(f"chosen: {chosen}; predicted peak {way.peak_gb:.1f} GiB", 0, 0, "")
    train = replace(recipe.train, token_budget=recipe.train.token_budget or budget)
    recipe = replace(recipe, model=replace(recipe.model, precision=precision), train=train)
    return replace(counted, recipe=recipe, way=way, compiled=compiled)


def pays_to_compile(recipe: Recipe, shape: Shape, way: Way | None, tokens: float) -> bool:
    """Whether decoder layers are compiled, with `tokens` to go: where all weights learn on one GPU that keeps all, and
    triton finds a compiler of C. Layers with windows of their own would be compiled apart, for longer than a minute, as
    layers with an adapter are."""
    able = recipe.train.method == "full" and count() == 1 and not shape.family.local
    able = able and way is not None and not way.checkpointing
    return able and tokens >= _COMPILED_FROM and any(map(shutil.which, ("gcc", "clang")))


def dry_run(recipe: Recipe, report: Report = silent) -> dict[str, Any]:
    """The rows' counts, and where there is a GPU how train.memory = lean and auto would use it (`ways`: a Way each, or
    its name alone where it does not fit; nothing is predicted for dpo)."""
    gpu = gpu_facts()
    if gpu:
        check_gpu()
    free = gpu["free_gb"] * 2**30 if gpu else 0.0
    counted = _counted(recipe, report)
    ways: list[dict[str, Any]] = []
    for memory in ("lean", "auto") if gpu and recipe.train.objective != "dpo" else ():
        ways.append({"memory": memory})
        with suppress(PetoolError):  # it does not fit
            wanted = replace(recipe, train=replace(recipe.train, memory=memory))
            ways[-1] |= asdict(choose(counted.shape, wanted, load_of(counted.prepared), free))
    trains_here = gpu is not None or not recipe.train.optimizer.startswith(_PAGED)
    return {**counted.prepared.summary, "gpu": gpu, "trains_here": trains_here, "ways": ways}


def _counted(recipe: Recipe, report: Report) -> Plan:
    check_reporters(recipe.train.report_to)
    check_evaluation(recipe)
    check_start(recipe, report)
    base = resolve_base(recipe.model.base, lambda text: report(text, 0, 0, ""))
    check_exportable(base.directory, report)
    config = read_json(base.directory / "config.json")
    shape = shape_of(config)
    if recipe.train.method == "full" and config.get("quantization_config"):
        what = f"{base.name} is quantized, and full fine-tuning changes the weights themselves"
        raise PetoolError(what, "give the model in 16 bits, or --set train.method=lora")
    if recipe.train.method == "lora" and recipe.lora.r > shape.width:
        what = f"lora.r = {recipe.lora.r} is more than {base.name} is wide ({shape.width})"
        raise PetoolError(what, "--set lora.r=32 is usual")
    chat = chat_from_directory(base.directory)
    prepared = prepare(recipe, base, chat, report)
    longest = max(load_of(prepared).lengths)
    if shape.window and longest > shape.window and not shape.family.local:  # llama.cpp does not apply Mistral's
        what = f"{base.name} sees the last {shape.window} tokens only (sliding_window), the longest row has {longest}"
        raise PetoolError(what, f"--set model.max_tokens={shape.window}")
    prepared.summary["steps"] = update_count(recipe, prepared.summary["kept"])
    report(f"training rows: {plain(prepared.summary)}", 0, 0, "")
    if prepared.left_out:
        names = ", ".join(prepared.left_out[:5]) + (", ..." if len(prepared.left_out) > 5 else "")
        trimmed = recipe.data.overlength == "trim-history"
        more = " even without history (tools and answers are never cut)" if trimmed else ""
        report(f"left out, more than {recipe.model.max_tokens} tokens{more}: entries {names}", 0, 0, "")
    return Plan(recipe, base, shape, chat, prepared)


def update_count(recipe: Recipe, rows: int) -> int:
    """Updates of the whole run, the one count that the trainer and its schedule follow too: a begun update counts."""
    if recipe.train.max_steps:
        return recipe.train.max_steps
    return max(1, math.ceil(math.ceil(rows / recipe.train.rows) * recipe.train.epochs - 1e-9))


def check_machine(recipe: Recipe) -> None:
    """Refuse a recipe that this machine cannot run, before anything is loaded."""
    if gpu_available():
        check_gpu()
    elif recipe.train.optimizer.startswith(_PAGED):
        all_recipes = {name: load_recipe(name)[1] for name in builtin_recipes()}
        here = " or ".join(name for name, found in all_recipes.items() if not found.train.optimizer.startswith(_PAGED))
        what = f"this recipe needs a GPU (for its optimizer {recipe.train.optimizer}), and torch finds none"
        small = "a small base trains here, slowly, with --set train.optimizer=adamw_torch"
        raise PetoolError(what, f"rent one, or run here: petool-lite train {here}; {small}", MACHINE)


def check_gpu() -> None:
    """Refuse a GPU that has no products in bfloat16 and that torch's flash attention does not run on."""
    import torch

    capability = torch.cuda.get_device_capability()
    if capability < _CAPABILITY:
        found, least = (".".join(map(str, version)) for version in (capability, _CAPABILITY))
        what = f"{torch.cuda.get_device_name()} has the compute capability {found}, training needs {least}"
        newer = "take a GPU of the Ampere generation or later (A100, RTX 30, L4, H100)"
        small = "a small base trains on the CPU, too: CUDA_VISIBLE_DEVICES= petool-lite train demo"
        raise PetoolError(what, f"{newer}; {small}", MACHINE)
