"""Everything that is checked, counted and chosen before a model is loaded, above all how many tokens fit the memory.
Predictions follow from what a layer keeps of a token for its backward pass; tests compare them with peaks of the 3B
shape on one H200, with and without checkpointing, from 4 to 104 GiB: all within 5 % of this. A dry step proves them."""

import math
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from petool_lite.console import Report, plain, silent
from petool_lite.errors import MACHINE, PetoolError
from petool_lite.export import check_exportable
from petool_lite.families import Shape, read_json, shape_of, tensor_shapes
from petool_lite.inference.gpu import gpu_available, gpu_facts
from petool_lite.models import Base, resolve_base
from petool_lite.prompt.prepare import Prepared, prepare
from petool_lite.prompt.render import Chat, chat_from_directory
from petool_lite.recipe import Recipe, builtin_recipes, load_recipe
from petool_lite.train.devices import arithmetic, count, sharded
from petool_lite.train.evaluate import check_evaluation
from petool_lite.train.load import check_start
from petool_lite.train.records import check_reporters

LEAN = (8 - 0.6) * 2**30  # bytes of a card of 8 GB, less CUDA's own memory and what the allocator cannot use
_SHARE = 0.9  # of that, or of the free memory: torch holds more than tensors take
CPU_BUDGET = 2048  # tokens of a micro-batch on a CPU, where longer ones gain nothing
_MOST = 65536  # tokens of a micro-batch: from 16,000 on more gain little
_FEWEST = 4096  # in a shorter one on a GPU the fixed time of a micro-batch decides
_FIXED = 0.25 * 2**30  # bytes of rotary tables, staging buffers and the like
# Of what layers keep, where they are compiled: eleven runs of SmolLM2-135M on H200s, to 3 %; with windows one run of
# Gemma's 270M shape, whose many norms are computed again.
_COMPILED, _COMPILED_LOCAL = 0.56, 0.37
# Bytes that an optimizer holds of a weight; paged states lie in the machine's memory.
_STATES = {"adamw_torch": 8, "adamw_8bit": 2, "paged_adamw_32bit": 0}
_COMPILED_FROM = 10_000_000  # tokens to go: compiling takes 26 to 40 s, and saves 2.3 to 4.3 us a token
_PAGED = "paged"  # how optimizers begin that need a GPU
_CAPABILITY = (8, 0)  # of a GPU, the least: bfloat16 in its tensor cores, and torch's flash attention

Kind = tuple[str, bool]  # a way to train: precision of the base, and whether checkpointing is on


@dataclass(frozen=True)
class Load:
    """The rows: their lengths in tokens, and the share of tokens that are answers."""

    lengths: tuple[int, ...]
    answers: float


@dataclass(frozen=True)
class Way:
    """One way to train on a GPU: precision of the base, whether layers compute their inner values twice
    (`checkpointing`), tokens of a micro-batch, and the predicted peak of allocated memory in GiB."""

    precision: str
    checkpointing: bool
    token_budget: int
    peak_gb: float


@dataclass(frozen=True)
class Plan:
    """A run before its model is loaded: the recipe with what was chosen written into it, and how memory is used on the
    GPU (None on a CPU and for dpo), and whether its decoder layers are compiled."""

    recipe: Recipe
    base: Base
    shape: Shape
    chat: Chat
    prepared: Prepared
    load: Load
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
    shape, load, rows, gpu = counted.shape, counted.load, counted.prepared.summary, gpu_facts()
    if not gpu:
        check_cpu_memory(recipe, counted.base)
    if recipe.train.objective == "dpo":  # one pair after the other
        return counted
    way = choose(shape, recipe, load, gpu["free_gb"] * 2**30) if gpu else None
    precision, budget = (way.precision, way.token_budget) if way else (recipe.model.precision, CPU_BUDGET)
    tokens_to_go = recipe.train.rows * (rows["steps"] - done) * rows["tokens"] / rows["kept"]
    compiled = pays_to_compile(recipe, way, tokens_to_go)
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


def pays_to_compile(recipe: Recipe, way: Way | None, tokens: float) -> bool:
    """Whether decoder layers are compiled, with `tokens` to go: where all weights learn on one GPU that keeps all, and
    triton finds a compiler of C. Layers with an adapter would take longer than a minute to compile."""
    able = recipe.train.method == "full" and count() == 1 and way is not None and not way.checkpointing
    return able and tokens >= _COMPILED_FROM and any(map(shutil.which, ("gcc", "clang")))


def dry_run(recipe: Recipe, report: Report = silent) -> dict[str, Any]:
    """The rows' counts, and the `ways` to use a GPU with train.memory = lean and auto, by name alone if none fits."""
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
            ways[-1] |= asdict(choose(counted.shape, wanted, counted.load, free))
    trains_here = gpu is not None or not recipe.train.optimizer.startswith(_PAGED)
    return {**counted.prepared.summary, "gpu": gpu, "trains_here": trains_here, "ways": ways}


def _counted(recipe: Recipe, report: Report) -> Plan:
    import pyarrow.compute

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
        raise PetoolError(f"lora.r = {recipe.lora.r} is more than {base.name}'s width {shape.width}", "--set lora.r=32")
    chat = chat_from_directory(base.directory)
    prepared = prepare(recipe, base, chat, report)
    lengths = pyarrow.compute.list_value_length(prepared.table.data.column("input_ids")).to_pylist()
    load = Load(tuple(lengths), prepared.summary["loss_tokens"] / prepared.summary["tokens"])
    longest = max(lengths)
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
    return Plan(recipe, base, shape, chat, prepared, load)


def update_count(recipe: Recipe, rows: int) -> int:
    """Updates of the whole run, the one count that the trainer and its schedule follow too: a begun update counts."""
    return recipe.train.max_steps or max(1, math.ceil(math.ceil(rows / recipe.train.rows) * recipe.train.epochs - 1e-9))


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


def peak_bytes(
    model: Shape, recipe: Recipe, way: Kind, tokens: int, load: Load, optimizer: bool = True, compiled: bool = False
) -> float:
    """Predicted peak of GPU memory, in bytes, with micro-batches of `tokens` of `load` and the `optimizer`'s state."""
    precision, checkpointing = way
    full = recipe.train.method == "full"
    resident = resident_bytes(model, recipe, precision, optimizer=optimizer)
    if sharded():  # each device holds its part, and two layers in whole
        resident = resident / count() + 2 * resident / model.layers
    resident += _FIXED
    plain = full or model.family.local or sharded()
    share = (_COMPILED_LOCAL if model.family.local else _COMPILED) if compiled else 1.0
    kept, inside = (share * part for part in (_whole if plain else _adapted)(model, recipe))
    head = load.answers * model.vocabulary * 12  # logarithms of probabilities, their gradients and those of logits
    if not checkpointing:
        return resident + tokens * (model.layers * kept + max(inside, head))
    inputs = 4 * model.width * model.layers if full or sharded() else 0  # Unsloth keeps them in the machine's memory
    return resident + tokens * (inputs + max(kept + inside, head))


def resident_bytes(model: Shape, recipe: Recipe, precision: str, width: int = 2, optimizer: bool = True) -> float:
    """Bytes of weights, gradients, optimizer and what 4-bit weights are unpacked into; products have `width` bytes."""
    states = _STATES[recipe.train.optimizer] if optimizer else 0
    shapes = tensor_shapes(model)
    weights = sum(map(math.prod, shapes.values()))
    if recipe.train.method == "full":  # float32 weights and gradients, and copies to compute with in bfloat16
        return weights * (4 + 4 + (2 if width == 2 else 0) + states)
    linears = {name: size for name, size in shapes.items() if name.startswith("model.layers.") and len(size) == 2}
    inside = sum(map(math.prod, linears.values()))
    a_weight = 0.5 + 1 / 64 + 4 / 64 / 256 if precision == "nf4" else width
    unpacked = 2 * model.feed_forward * model.width if precision == "nf4" else 0
    learned = [size for name, size in linears.items() if name.split(".")[-2] in recipe.lora.targets]
    tuned = recipe.lora.r * sum(map(sum, learned))
    return inside * a_weight + (weights - inside) * width + unpacked + tuned * (4 + 4 + states)


def _adapted(model: Shape, recipe: Recipe) -> tuple[float, float]:
    """Bytes of a token that a layer under an adapter keeps, and that its backward pass works with beside them: inputs
    and norms of both halves, heads, their result, gate and up; with dropout masks of a byte and dropped inputs. They
    agree with peaks of 3B, 4B and 7B shapes of four families on one H200 to 4 %."""
    own, keys, hidden, inner = _widths(model)
    kept, inside = 2 * (5 * hidden + 2 * own + 2 * keys + 2 * inner) + 4 * model.heads, 4 * (inner + hidden)
    if model.family.biases:  # Qwen2's, which keep what the heads were without them
        kept += 2 * (own + 2 * keys) + hidden
    if model.family.head_norms:
        kept += 2 * (own + keys) + hidden
    if recipe.lora.dropout:
        kept, inside = kept + 5 * hidden + own + inner, inside + 2 * (inner + hidden)
    return kept, inside


def _whole(model: Shape, recipe: Recipe) -> tuple[float, float]:
    """The same for transformers' layers: sums and norms in float32, and what autograd casts. Three runs of SmolLM2-135M
    on H200s took 2 % less than this says, three of Gemma-3-270M's shape 7 %."""
    own, keys, hidden, inner = _widths(model)
    norms = len(model.family.norms) * (4 + 4) * hidden + (3 + 2) * 2 * hidden
    norms += (4 + 4) * (own + keys) if model.family.head_norms else 0
    kept = norms + 2 * (own + 2 * keys) + 2 * own + 4 * model.heads + 4 * 2 * inner
    return kept, 2 * 4 * inner + 3 * 4 * hidden


def _widths(model: Shape) -> tuple[int, int, int, int]:
    """Numbers of a token: all heads, all heads of keys, between layers, inside an MLP."""
    return model.heads * model.head_size, model.key_value_heads * model.head_size, model.width, model.feed_forward


def largest_batch(recipe: Recipe, budget: int, load: Load) -> int:
    """Tokens of the largest micro-batch that can come: no more than the longest rows of an update."""
    return min(max(budget, *load.lengths), sum(sorted(load.lengths)[-recipe.train.rows :]))


def choose(model: Shape, recipe: Recipe, load: Load, free: float) -> Way:
    """The first of `_ways` that fits `free` bytes of a GPU, for lean also a card of 8 GB, with the largest micro-batch
    that does, or train.token_budget; raises PetoolError (exit code 3) where nothing fits."""
    limit = _SHARE * (free if recipe.train.memory == "auto" else min(LEAN, free))
    ways, budget = _ways(recipe), recipe.train.token_budget
    least = budget or max(load.lengths)
    for way, tokens, room in (*((way, budget, limit) for way in ways), (ways[-1], least, free)):
        if found := _fitting(model, recipe, way, load, tokens, room):
            return found
    peak = peak_bytes(model, recipe, ways[-1], largest_batch(recipe, least, load), load)
    what = f"this recipe needs about {peak / 2**30:.1f} GiB of GPU memory, {free / 2**30:.1f} GiB are free"
    raise PetoolError(what, _way_out(model, recipe, load, free), MACHINE)


def _ways(recipe: Recipe) -> list[Kind]:
    """Precisions and checkpointing to try, the fastest first; lean keeps the recipe's precision, and checkpoints."""
    if recipe.train.method == "lora" and recipe.train.memory == "lean":
        return [(recipe.model.precision, True)]
    precisions = ("bf16", "nf4") if recipe.train.method == "lora" else ("bf16",)
    return [(precision, again) for again in (False, True) for precision in precisions]


def _fitting(model: Shape, recipe: Recipe, way: Kind, load: Load, budget: int, limit: float) -> Way | None:
    """The way with a micro-batch of `budget` tokens, or (0) the largest within `limit` bytes; None where none fits."""
    longest = max(load.lengths)
    none, one = (peak_bytes(model, recipe, way, tokens, load) for tokens in (0, 1))
    most = int((limit - none) / (one - none))
    least = largest_batch(recipe, budget or max(longest, min(_FEWEST, sum(load.lengths))), load)
    if most < least:
        return None
    budget = budget or max(longest, min(most, _MOST) // 1024 * 1024)
    peak = peak_bytes(model, recipe, way, largest_batch(recipe, budget, load), load)
    return Way(*way, budget, round(peak / 2**30, 2))


def _way_out(model: Shape, recipe: Recipe, load: Load, free: float) -> str:
    full = recipe.train.method == "full"
    way = _ways(recipe)[-1] if full else ("nf4", True)
    for tokens in (max(load.lengths), 4096, 2048, 1024, 512):
        short = Load(tuple(min(length, tokens) for length in load.lengths), load.answers)
        if _fitting(model, recipe, way, short, tokens, _SHARE * free):
            shorter = f"--set train.token_budget=0 --set model.max_tokens={tokens}"
            return f"would fit: --set model.precision={way[0]} {shorter}"
    return f"{'--set train.method=lora, or ' if full else ''}take a smaller base, or a GPU with more memory"


def check_cpu_memory(recipe: Recipe, base: Base) -> None:
    """Refuse a base that cannot fit the machine's memory where no GPU is: the kernel would end the process."""
    import psutil

    free = psutil.virtual_memory().available + psutil.swap_memory().free
    width, config = arithmetic().itemsize, read_json(base.directory / "config.json")
    model, packed = shape_of(config), config.get("quantization_config") is not None  # 4 bits already, or 8

    def needed(method: str, precision: str) -> float:
        wanted = replace(recipe, train=replace(recipe.train, method=method))
        return count() * resident_bytes(model, wanted, "nf4" if packed else precision, width)

    if (mine := needed(recipe.train.method, recipe.model.precision)) > free:
        fitting = (f"would fit: --set train.method=lora --set model.precision={kind}"
                   for kind in ("bf16", "nf4") if needed("lora", kind) <= free)  # fmt: skip
        what = f"{base.name} needs at least {mine / 2**30:.1f} GiB of memory on a CPU, {free / 2**30:.1f} GiB are free"
        smaller = "take a smaller base, such as smollm2-135m, fewer processes or a larger machine"
        raise PetoolError(what, next(fitting, smaller), MACHINE)
