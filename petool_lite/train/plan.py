"""Everything that is checked, counted and chosen before a model is loaded."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from petool_lite.console import Report, facts_text, silent
from petool_lite.errors import MACHINE, PetoolError
from petool_lite.models import Base, resolve_base, sound_weight_files
from petool_lite.prompt.prepare import Prepared, prepare
from petool_lite.prompt.render import Chat, chat_from_directory
from petool_lite.recipe import Recipe, builtin_recipes, load_recipe
from petool_lite.train import full_costs
from petool_lite.train.devices import arithmetic, count
from petool_lite.train.evaluation import check_exam
from petool_lite.train.planner import (
    CPU_BUDGET,
    OTHER_BUDGET,
    Dimensions,
    Forecast,
    Load,
    Room,
    chosen,
    dimensions,
    forecasts,
    picked,
    read_config,
    resolved,
    table,
)
from petool_lite.train.rates import measured_rates
from petool_lite.train.records import check_reporters
from petool_lite.train.stack import unsuited
from petool_lite.train.start import check_start

_CAPABILITY = (8, 0)  # of a GPU, the least: bfloat16 in its tensor cores, and torch's flash attention


@dataclass(frozen=True)
class Plan:
    """A run before its model is loaded: the recipe with what was chosen written into it, and what that will take on
    the GPU (None on a CPU and for dpo)."""

    recipe: Recipe
    base: Base
    chat: Chat
    prepared: Prepared
    forecast: Forecast | None


def plan(recipe: Recipe, report: Report = silent) -> Plan:
    """Check and count a recipe's rows and choose how to train; no model is loaded."""
    check_machine(recipe)
    base, chat, prepared = _counted(recipe, report)
    check_memory(recipe, base)
    full = recipe.train.method == "full"
    other = "" if full else unsuited(read_config(base.directory))
    if other and recipe.train.offload:
        raise PetoolError(f"{base.name} has {other}, which offload does not know", "--set train.offload=false")
    if recipe.train.objective == "dpo":  # one pair after the other
        return Plan(recipe, base, chat, prepared, None)
    if not _gpu() or other:
        budget = OTHER_BUDGET if _gpu() else CPU_BUDGET
        return Plan(with_budget(recipe, budget), base, chat, prepared, None)
    best = chosen(dimensions(base.directory), recipe, load_of(prepared), measured_rates(), room_here())
    choice = best.choice
    report(
        f"chosen: {choice.precision} base, {choice.kept}, "
        f"{choice.token_budget:,} tokens a micro-step; predicted peak {best.peak_gb:.1f} GiB, "
        + (f"{best.tokens_per_s:,} tokens/s" if best.tokens_per_s else "speed not predicted"),
        0,
        0,
        "",
    )
    return Plan(resolved(recipe, choice), base, chat, prepared, best)


def dry_run(recipe: Recipe, report: Report = silent) -> dict[str, Any]:
    """The rows' counts, and every way to train with predicted memory and, where there is a GPU, speed.

    `lean`, `auto` and `chosen` are the ways that these values of train.memory and the recipe itself would take; None
    where nothing fits. Needs no GPU; without one the memory of `lean` is that of any 8 GB card. For dpo, and models
    whose layers are not petool-lite's own, nothing is predicted.
    """
    if _gpu():
        check_gpu()
    base, _, prepared = _counted(recipe, report)
    full = recipe.train.method == "full"
    facts = {**prepared.summary, "gpu": _gpu_facts(), "trains_here": _gpu() or not _needs_gpu(recipe)}
    if recipe.train.objective == "dpo" or (not full and unsuited(read_config(base.directory))):
        return {**facts, "choices": [], "lean": None, "auto": None, "chosen": None}
    model, load = dimensions(base.directory), load_of(prepared)
    rates, room = (measured_rates(), room_here()) if _gpu() else (None, Room(float("inf"), float("inf")))
    found = forecasts(model, recipe, load, rates)
    picks = {memory: picked(found, recipe, memory, room) for memory in ("lean", "auto")}
    mine = picks[recipe.train.memory] if _gpu() else None
    rows: dict[str, Any] = {name: pick and table([pick])[0] for name, pick in (*picks.items(), ("chosen", mine))}
    return {
        **facts,
        "choices": table(found),
        **(rows if rates else {**rows, "auto": None}),
    }


def _counted(recipe: Recipe, report: Report) -> tuple[Base, Chat, Prepared]:
    """Base, chat and rows of a recipe, checked, counted and told."""
    check_reporters(recipe.train.report_to)
    check_exam(recipe)
    check_start(recipe, report)
    base = resolve_base(recipe.model.base, lambda text: report(text, 0, 0, ""))
    sound_weight_files(base.directory)
    if recipe.train.method == "full" and read_config(base.directory).get("quantization_config"):
        raise PetoolError(
            f"{base.name} is quantized, and full fine-tuning changes the weights themselves",
            "give the model in 16 bits, or --set train.method=lora",
        )
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


def load_of(prepared: Prepared) -> Load:
    """Lengths of the prepared rows."""
    import pyarrow.compute

    lengths = pyarrow.compute.list_value_length(prepared.table.data.column("input_ids")).to_pylist()
    return Load(tuple(lengths), prepared.summary["loss_tokens"] / prepared.summary["tokens"])


def with_budget(recipe: Recipe, tokens: int) -> Recipe:
    """The recipe with `tokens` a micro-step unless it says how many."""
    budget = recipe.train.token_budget or tokens
    return replace(recipe, train=replace(recipe.train, token_budget=budget))


def room_here() -> Room:
    """Free memory of the current GPU, and a third of the machine's memory for each of its processes."""
    import os

    import torch

    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Room(float(torch.cuda.mem_get_info()[0]), whole / 3 / count())


def _gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def _gpu_facts() -> dict[str, Any] | None:
    import torch

    if not _gpu():
        return None
    free, total = (round(size / 2**30, 1) for size in torch.cuda.mem_get_info())
    return {"name": torch.cuda.get_device_name(), "memory_gb": total, "free_gb": free}


def steps(recipe: Recipe, rows: int) -> int:
    """Optimizer steps of the whole run."""
    if recipe.train.max_steps:
        return recipe.train.max_steps
    return max(1, int(-(-rows // (recipe.train.batch_size * recipe.train.accumulate)) * recipe.train.epochs))


def rows_a_device(recipe: Recipe, devices: int) -> int:
    """Rows of an update that each of `devices` takes; raises PetoolError where they cannot share them evenly."""
    rows = recipe.train.batch_size * recipe.train.accumulate
    if rows % (devices * recipe.train.batch_size):
        raise PetoolError(
            f"{rows} rows an update cannot be shared by {devices} devices",
            "choose train.accumulate as a multiple of the devices",
        )
    return rows // devices


def check_machine(recipe: Recipe) -> None:
    """Refuse a recipe that this machine cannot run, before anything is loaded."""
    if _gpu():
        check_gpu()
    elif _needs_gpu(recipe):
        here = [name for name in builtin_recipes() if not _needs_gpu(load_recipe(name)[1])]
        why = f"for its optimizer {recipe.train.optimizer}"
        raise PetoolError(
            f"this recipe needs a GPU ({why}), and torch finds none",
            f"rent one, or run here: petool-lite train {' or '.join(here)}; a small base trains here, slowly, with "
            "--set train.optimizer=adamw_torch; --dry-run tells what a GPU would need",
            MACHINE,
        )


def check_gpu() -> None:
    """Refuse a GPU that has no products in bfloat16 and that torch's flash attention does not run on."""
    import torch

    capability = torch.cuda.get_device_capability()
    if capability < _CAPABILITY:
        found, least = (".".join(map(str, version)) for version in (capability, _CAPABILITY))
        raise PetoolError(
            f"{torch.cuda.get_device_name()} has the compute capability {found}, training needs {least}",
            "take a GPU of the Ampere generation or later (A100, RTX 30, L4, H100); a small base trains on the CPU, "
            "too: CUDA_VISIBLE_DEVICES= petool-lite train demo",
            MACHINE,
        )


def _needs_gpu(recipe: Recipe) -> bool:
    return recipe.train.optimizer.startswith("paged")


def check_memory(recipe: Recipe, base: Base) -> None:
    """Refuse a base that cannot fit the machine's memory where no GPU is: the kernel would end the process."""
    if _gpu():
        return
    model, free = dimensions(base.directory), free_memory()
    packed = read_config(base.directory).get("quantization_config") is not None  # a file in 4 bits already, or in 8

    def needed(method: str, precision: str) -> float:
        return count() * least_on_cpu(model, method, "nf4" if packed else precision, recipe.train.optimizer)

    mine = needed(recipe.train.method, recipe.model.precision)
    if mine <= free:
        return
    fitting = [
        f"would fit: --set train.method=lora --set model.precision={kind}"
        for kind in ("bf16", "nf4")
        if needed("lora", kind) <= free
    ]
    raise PetoolError(
        f"this recipe needs at least {mine / 2**30:.1f} GiB of memory on a CPU, {free / 2**30:.1f} GiB are free",
        fitting[0] if fitting else "take a smaller base, such as smollm2-135m, fewer processes or a larger machine",
        MACHINE,
    )


def least_on_cpu(model: Dimensions, method: str, precision: str, optimizer: str) -> float:
    """Bytes of a process on a CPU: the base's weights or, where all of them learn, weights, gradients, optimizer state
    and copies to compute with. Rows, adapter and libraries come on top, for a small base more than this."""
    width: int = arithmetic().itemsize
    weights = full_costs.parameters(model)
    if method == "full":
        copies = 2 * weights if width == 4 else 0  # of float32 none are made
        return full_costs.resident(model, optimizer) - copies
    linears = model.layers * model.weights()
    return (weights - linears) * width + linears * (0.5 if precision == "nf4" else width)


def free_memory(meminfo: Path = Path("/proc/meminfo")) -> float:
    """Bytes that this machine can still give, those of its swap included; infinite where it does not tell."""
    try:
        rows = (line.split() for line in meminfo.read_text().splitlines())
    except OSError:
        return float("inf")
    found = {row[0]: int(row[1]) * 1024 for row in rows if row and row[0] in ("MemAvailable:", "SwapFree:")}
    return sum(found.values()) if "MemAvailable:" in found else float("inf")
