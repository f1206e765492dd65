"""How many tokens fit: memory of a run, predicted before anything is loaded, and the dry step that proves it.

Predictions follow from what a layer keeps of a token for its backward pass; tests compare them with peaks of the 3B
shape on one H200, with and without checkpointing, from 4 to 104 GiB: all within 5 % of this.
"""

import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from petool_lite.console import Report, silent
from petool_lite.errors import MACHINE, PetoolError, first_line
from petool_lite.families import Shape, read_json, shape_of, tensor_shapes
from petool_lite.models import Base
from petool_lite.prompt.prepare import Prepared
from petool_lite.recipe import Recipe
from petool_lite.runs import TRAINED, draft
from petool_lite.train.checkpoints import disk_errors
from petool_lite.train.devices import agreed, arithmetic, count, is_first, sharded
from petool_lite.train.evaluate import EvaluationSet, evaluate, same_randomness
from petool_lite.train.load import exchange_compiled, save_trained
from petool_lite.train.step import MicroBatch, answer_loss, micro_batches

if TYPE_CHECKING:
    from petool_lite.train.plan import Plan

LEAN = (8 - 0.6) * 2**30  # bytes of a card of 8 GB, less CUDA's own memory and what the allocator cannot use
_SHARE = 0.9  # of that, or of the free memory: torch holds more than tensors take
CPU_BUDGET = 2048  # tokens of a micro-batch on a CPU, where longer ones gain nothing
_MOST = 65536  # tokens of a micro-batch: from 16,000 on more gain little
_FEWEST = 4096  # in a shorter one on a GPU the fixed time of a micro-batch decides
_FIXED = 0.25 * 2**30  # bytes of rotary tables, staging buffers and the like
_COMPILED = 0.64  # of what layers keep, where they are compiled: six runs of SmolLM2-135M on H200s, to 3 %
# Bytes that an optimizer holds of a weight; paged states lie in the machine's memory.
_STATES = {"adamw_torch": 8, "adamw_8bit": 2, "paged_adamw_32bit": 0}
# Size of a checkpoint with AdamW's two states, in what is saved: an adapter in float32, or a model in bfloat16.
_CHECKPOINT = {"lora": 3.1, "full": 6.1}


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


def load_of(prepared: Prepared) -> Load:
    """Lengths of the prepared rows."""
    import pyarrow.compute

    lengths = pyarrow.compute.list_value_length(prepared.table.data.column("input_ids")).to_pylist()
    return Load(tuple(lengths), prepared.summary["loss_tokens"] / prepared.summary["tokens"])


def peak_bytes(
    model: Shape,
    recipe: Recipe,
    way: tuple[str, bool],
    tokens: int,
    load: Load,
    optimizer: bool = True,
    compiled: bool = False,
) -> float:
    """Predicted peak of allocated GPU memory with micro-batches of `tokens` of the rows `load`; `way` is the base's
    precision and whether checkpointing is on. Without the `optimizer`'s state where no update has been taken yet."""
    precision, checkpointing = way
    full = recipe.train.method == "full"
    resident = resident_bytes(model, recipe, precision, optimizer=optimizer)
    if sharded():  # each device holds its part, and two layers in whole
        resident = resident / count() + 2 * resident / model.layers
    resident += _FIXED
    plain = full or model.family.local or sharded()
    share = _COMPILED if compiled else 1.0
    kept, inside = (share * part for part in (_whole if plain else _adapted)(model, recipe))
    head = load.answers * model.vocabulary * 16  # logits in bfloat16 and float32, and their gradients
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
    tuned = recipe.lora.r * sum(
        sum(size) for name, size in linears.items() if name.split(".")[-2] in recipe.lora.targets
    )
    return inside * a_weight + (weights - inside) * width + unpacked + tuned * (4 + 4 + states)


def _adapted(model: Shape, recipe: Recipe) -> tuple[float, float]:
    """Bytes of a token that a layer under an adapter keeps, and that its backward pass works with beside them: inputs
    and norms of both halves, heads, their result, gate and up; with dropout masks of a byte and dropped inputs. They
    agree with peaks of 3B, 4B and 7B shapes of four families on one H200 to 4 %."""
    own, keys, hidden, inner = _widths(model)
    kept, inside = 2 * (5 * hidden + 2 * own + 2 * keys + 2 * inner) + 4 * model.heads, 4 * (inner + hidden)
    if model.family.biases:  # Qwen2's, which keep what the heads were without them
        kept += 2 * (own + 2 * keys) + hidden
    if "attn_q_norm" in model.family.blocks:
        kept += 2 * (own + keys) + hidden
    if recipe.lora.dropout:
        kept, inside = kept + 5 * hidden + own + inner, inside + 2 * (inner + hidden)
    return kept, inside


def _whole(model: Shape, recipe: Recipe) -> tuple[float, float]:
    """The same for transformers' layers: sums and norms in float32, and what autograd casts. A GPU holds nine tenths of
    it at a time (ten runs of SmolLM2-135M, one H200); Gemma's norms are counted, not measured."""
    own, keys, hidden, inner = _widths(model)
    count = sum("norm" in name and "attn_q" not in name and "attn_k" not in name for name in model.family.blocks)
    norms = count * (4 + 4) * hidden + (3 + 2) * 2 * hidden
    norms += (4 + 4) * (own + keys) if "attn_q_norm" in model.family.blocks else 0
    kept = norms + 2 * (own + 2 * keys) + 2 * own + 4 * model.heads + 4 * 2 * inner
    return 0.885 * kept, 0.885 * (2 * 4 * inner + 3 * 4 * hidden)


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


def _ways(recipe: Recipe) -> list[tuple[str, bool]]:
    """Precisions and checkpointing to try, the fastest first; lean keeps the recipe's precision, and checkpoints."""
    if recipe.train.method == "lora" and recipe.train.memory == "lean":
        return [(recipe.model.precision, True)]
    precisions = ("bf16", "nf4") if recipe.train.method == "lora" else ("bf16",)
    return [(precision, again) for again in (False, True) for precision in precisions]


def _fitting(model: Shape, recipe: Recipe, way: tuple[str, bool], load: Load, budget: int, limit: float) -> Way | None:
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
            settings = {"model.precision": way[0], "train.token_budget": 0, "model.max_tokens": tokens}
            return "would fit: " + " ".join(f"--set {key}={value}" for key, value in settings.items())
    return f"{'--set train.method=lora, or ' if full else ''}take a smaller base, or a GPU with more memory"


def check_cpu_memory(recipe: Recipe, base: Base) -> None:
    """Refuse a base that cannot fit the machine's memory where no GPU is: the kernel would end the process."""
    free, width, config = free_memory(), arithmetic().itemsize, read_json(base.directory / "config.json")
    model, packed = shape_of(config), config.get("quantization_config") is not None  # 4 bits already, or 8

    def needed(method: str, precision: str) -> float:
        wanted = replace(recipe, train=replace(recipe.train, method=method))
        return count() * resident_bytes(model, wanted, "nf4" if packed else precision, width)

    if (mine := needed(recipe.train.method, recipe.model.precision)) > free:
        fitting = (f"would fit: --set train.method=lora --set model.precision={kind}"
                   for kind in ("bf16", "nf4") if needed("lora", kind) <= free)  # fmt: skip
        raise PetoolError(
            f"{base.name} needs at least {mine / 2**30:.1f} GiB of memory on a CPU, {free / 2**30:.1f} GiB are free",
            next(fitting, "take a smaller base, such as smollm2-135m, fewer processes or a larger machine"),
            MACHINE,
        )


def free_memory() -> float:
    """Bytes that this machine can still give, those of its swap included."""
    import psutil

    return float(psutil.virtual_memory().available + psutil.swap_memory().free)


def dry_step(run: Path, planned: "Plan", trainer: Any, held_out: EvaluationSet | None, report: Report) -> "Plan":
    """Before the first update on a GPU: the largest micro-batch forward and backward, one evaluation, one save, so that
    a run fails now or never; nothing is learned. Returns the plan, with smaller micro-batches where they did not fit,
    and plain layers where they did not compile. Raises torch.OutOfMemoryError, or PetoolError for a disk that is too
    full."""
    import torch

    assert planned.way is not None
    way, load, model = planned.way, load_of(planned.prepared), planned.shape
    if planned.compiled:
        batch = fullest(planned.prepared, planned.recipe, way.token_budget)
        planned = replace(planned, compiled=compiles(trainer.model, batch, report))
    while agreed(not _fits(trainer.model, batch := fullest(planned.prepared, planned.recipe, way.token_budget))):
        fewer = max(max(load.lengths), int(0.85 * way.token_budget))
        if fewer == way.token_budget:
            raise torch.OutOfMemoryError(f"the longest row has {fewer:,} tokens")
        report(f"{way.token_budget:,} tokens a micro-batch do not fit after all; trying {fewer:,}", 0, 0, "")
        way = replace(way, token_budget=fewer)
    peak = torch.cuda.max_memory_allocated() / 2**30
    trainer.token_budget = way.token_budget
    if held_out is not None and is_first():
        longest, right = max(zip(held_out.prompts, held_out.answers, strict=True), key=lambda pair: len(pair[0]))
        short = replace(held_out, prompts=(longest,), answers=(right,), too_long=0, reply_tokens=2)
        evaluate(short, trainer.model, 0, silent)
    if is_first():  # beside its place, and removed; there must be room for three checkpoints of it
        method = planned.recipe.train.method
        with disk_errors(run, TRAINED[method]), draft(run / "dry-step") as folder:
            save_trained(trainer.model, folder, planned.base)
            needed = 3 * _CHECKPOINT[method] * sum(file.stat().st_size for file in folder.iterdir())
        shutil.rmtree(run / "dry-step")
        if (room := shutil.disk_usage(run).free) < needed:
            what = f"the checkpoints of this run take {needed / 1e9:.1f} GB, {room / 1e9:.1f} GB are free on {run}"
            raise PetoolError(what, "make room, or set PETOOL_LITE_RUNS to a larger disk")
    tokens, shape = len(batch.ids), (way.precision, way.checkpointing)
    predicted = peak_bytes(model, planned.recipe, shape, tokens, load, False, planned.compiled) / 2**30
    figures = f"peak {peak:.2f} GiB, predicted {predicted:.2f}"
    report(f"dry step: a micro-batch of {tokens:,} tokens ({figures}), a save", 0, 0, "")
    return replace(planned, way=way)


def compiles(model: Any, batch: MicroBatch, report: Report) -> bool:
    """Whether the layers compile, tried with a first micro-batch; if not, it is told, and they run as they were."""
    report("compiling the layers, about half a minute", 0, 0, "")
    try:
        _fits(model, batch)
        return True
    except Exception as error:  # whatever a compiler meets; what the layers themselves do wrong comes again
        told = first_line(getattr(error, "inner_exception", error))
    exchange_compiled(model)
    report(f"the layers do not compile and run as they are: {told}", 0, 0, "")
    return False


def _fits(model: Any, batch: MicroBatch) -> bool:
    """Whether a micro-batch goes forward and backward within the GPU's memory; the model is left as it was."""
    import torch

    torch.cuda.reset_peak_memory_stats()
    try:
        with same_randomness():
            (answer_loss(model, batch) / len(batch.answers)).backward()
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()


def fullest(prepared: Prepared, recipe: Recipe, budget: int) -> MicroBatch:
    """About the fullest micro-batch there can be: the longest row, and of the others, longest first, what has room."""
    lengths = load_of(prepared).lengths
    chosen: list[int] = []
    left = most = max(budget, *lengths)
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if lengths[index] <= left and len(chosen) < recipe.train.rows:
            chosen.append(index)
            left -= lengths[index]
    (batch,) = micro_batches(list(prepared.table.select(chosen)), most)
    return batch
