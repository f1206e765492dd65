"""What a run will take on a GPU: peak memory and tokens/s of each way to train, predicted before anything is loaded.

Memory follows from what `layers` keeps and allocates; speed from the arithmetic of a step and three rates of the GPU,
which are measured in half a second. docs/performance.md has the predictions beside what was measured.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from petool_lite.errors import MACHINE, PetoolError
from petool_lite.recipe import Recipe
from petool_lite.train import full_costs
from petool_lite.train.layers import CHUNK
from petool_lite.train.rates import Rates
from petool_lite.train.shelf import AHEAD, piece_size

# bytes for memory = "lean": a card of 8 GB less CUDA's own memory and what the allocator cannot use
LEAN = (8 - 0.6) * 2**30
_SHARE = 0.9  # of that, or of the free memory: torch holds up to an eighth more than tensors take
_BUDGETS = (8192, 16384, 32768, 65536)
_SMALL_BUDGETS = (2048, 4096)  # for full fine-tuning, of small models mostly
_FORWARD = 0.35  # share of a step's time in the forward pass, in which copies to the machine's memory are made
_ALIKE = 0.99  # share of the best speed from which on lean takes what needs less memory
_AN_UPDATE = 0.15  # seconds: optimizer, clipping, records
_OFFLOADING = 0.25 * 2**30  # bytes that runs with offload took beyond what is counted here; the others took less
CPU_BUDGET = 2048  # on a CPU longer micro-steps gain nothing
OTHER_BUDGET = 16384  # on a GPU, for a model whose layers are Unsloth's: nothing is predicted for those


@dataclass(frozen=True)
class Dimensions:
    """Sizes of a Llama model, from its config.json."""

    hidden: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    size: int
    vocabulary: int
    tied: bool

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Outputs and inputs of a layer's linears."""
        own, keys = self.heads * self.size, self.key_heads * self.size
        return {
            "q_proj": (own, self.hidden),
            "k_proj": (keys, self.hidden),
            "v_proj": (keys, self.hidden),
            "o_proj": (self.hidden, own),
            "gate_proj": (self.inner, self.hidden),
            "up_proj": (self.inner, self.hidden),
            "down_proj": (self.hidden, self.inner),
        }

    def weights(self, *names: str) -> int:
        """Weights of a layer's linears, of all or of the named ones."""
        return sum(a * b for name, (a, b) in self.linears.items() if not names or name in names)


@dataclass(frozen=True)
class Choice:
    """One way to train."""

    precision: str
    checkpointing: bool
    offload: bool
    token_budget: int
    offload_heads: bool = False

    @property
    def numerics(self) -> tuple[str, bool]:
        """What lean leaves as the recipe has it."""
        return self.precision, self.checkpointing

    @property
    def again(self) -> bool:
        """Whether heads are computed a second time in the backward pass, as in `layers.Shape`."""
        return self.checkpointing and not self.offload_heads

    @property
    def kept(self) -> str:
        """What waits for the backward pass and where, in words."""
        if not self.checkpointing:
            return "all kept"
        return "checkpointing" + ", offload" * self.offload + " with q, k, v" * self.offload_heads


@dataclass(frozen=True)
class Load:
    """The rows: their lengths in tokens, and the share of tokens that are answers."""

    lengths: tuple[int, ...]
    answers: float

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths)


@dataclass(frozen=True)
class Forecast:
    """A choice with its peak memory in GiB, on the GPU and pinned in the machine, and tokens a second where the GPU's
    rates are known."""

    choice: Choice
    peak_gb: float
    host_gb: float
    tokens_per_s: float | None


@dataclass(frozen=True)
class Room:
    """Bytes that are free on the GPU, and that may be pinned in the machine's memory."""

    gpu: float
    host: float


def read_config(directory: Path) -> dict[str, Any]:
    """A model's config.json."""
    found: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return found


def dimensions(directory: Path) -> Dimensions:
    """Sizes of the model in `directory`."""
    config = read_config(directory)
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    return Dimensions(
        hidden,
        config["intermediate_size"],
        config["num_hidden_layers"],
        heads,
        config.get("num_key_value_heads") or heads,
        config.get("head_dim") or hidden // heads,
        config["vocab_size"],
        bool(config.get("tie_word_embeddings", False)),
    )


def peak_bytes(model: Dimensions, recipe: Recipe, choice: Choice, load: Load, optimizer: bool = True) -> float:
    """Predicted peak of allocated GPU memory; without the `optimizer`'s state where a step has not been taken yet."""
    tokens = step_tokens(recipe, choice, load)
    if recipe.train.method == "full":
        state = full_costs.resident(model, recipe.train.optimizer if optimizer else "")
        between = model.layers * tokens * full_costs.kept(model, choice.checkpointing)
        work = full_costs.work(model, choice.checkpointing, tokens, load.answers)
        computing = state + full_costs.ON_GPU * (between + work)
        return max(computing, full_costs.updating(model, recipe.train.optimizer) if optimizer else 0)
    kept = model.layers * tokens * _kept(model, recipe, choice)
    work = max(
        _attention_work(model) * tokens,
        _mlp_work(model, choice, tokens),
        tokens * load.answers * model.vocabulary * 16,  # logits: bfloat16 and float32, and their gradients
    )
    there = 0.0  # in use and fetched ahead, which without offload is a part of what is kept
    if choice.offload:
        there = (2 * model.heads * model.size + (AHEAD + choice.again) * 2 * model.hidden) * tokens + _OFFLOADING
    return _resident(model, recipe, choice, optimizer) + kept + work + there


def step_tokens(recipe: Recipe, choice: Choice, load: Load) -> int:
    """Tokens of the largest micro-step."""
    update = sorted(load.lengths)[-recipe.train.batch_size * recipe.train.accumulate :]
    return min(max(choice.token_budget, load.longest), sum(update))


def host_bytes(model: Dimensions, recipe: Recipe, choice: Choice, load: Load) -> float:
    """The machine's memory that a choice with offload takes."""
    return 1.1 * model.layers * choice.offload * _blocks(model, recipe, choice) * step_tokens(recipe, choice, load)


def pieces(model: Dimensions, recipe: Recipe, choice: Choice, load: Load) -> tuple[int, int]:
    """How many pieces of pinned memory a choice with offload fills, and the bytes of a piece."""
    tokens = step_tokens(recipe, choice, load)
    size = piece_size(2 * model.hidden * tokens)
    return int(host_bytes(model, recipe, choice, load) // size), size


def _heads(model: Dimensions) -> int:
    """Bytes of q, k and v of a token in one layer."""
    return 2 * (model.heads + 2 * model.key_heads) * model.size


def _resident(model: Dimensions, recipe: Recipe, choice: Choice, optimizer: bool) -> float:
    """Base, adapters with gradients, optimizer state, and the memory that 4-bit weights are unpacked into."""
    a_weight = {"nf4": 0.5 + 1 / 64 + 4 / 64 / 256, "bf16": 2.0}[choice.precision]
    embedding = model.vocabulary * model.hidden * (2 if model.tied else 4)
    unpacked = 0
    if choice.precision == "nf4":
        linears = model.linears
        rows = [linears[name][0] for name in ("q_proj", "k_proj", "v_proj")]
        shapes = {(sum(rows), model.hidden), (rows[0], model.hidden), (2 * rows[1], model.hidden), linears["o_proj"]}
        shapes |= {(2 * model.inner, model.hidden), linears["down_proj"]}
        unpacked = sum(2 * a * b for a, b in shapes)
    tuned = _adapter_weights(model, recipe)
    state = 8 if optimizer and not recipe.train.optimizer.startswith("paged") else 0
    return model.layers * model.weights() * a_weight + embedding + unpacked + tuned * (10 + state)


def _adapter_weights(model: Dimensions, recipe: Recipe) -> int:
    shapes = [model.linears[name] for name in recipe.lora.targets if name in model.linears]
    return model.layers * recipe.lora.r * sum(a + b for a, b in shapes)


def _kept(model: Dimensions, recipe: Recipe, choice: Choice) -> float:
    """Bytes that a layer keeps of a token on the GPU until its backward pass."""
    inside = 2 * _ranks(recipe, "down_proj")
    if not choice.checkpointing:
        inside += 4 * model.inner + 2 * _ranks(recipe, "gate_proj", "up_proj")
    return inside if choice.offload else inside + _blocks(model, recipe, choice)


def _blocks(model: Dimensions, recipe: Recipe, choice: Choice) -> float:
    """Bytes that a layer's two blocks keep of a token: their inputs, and what attention would not compute again."""
    found = 2 * (2 * model.hidden + model.heads * model.size) + 4 * model.heads + 2 * _ranks(recipe, "o_proj")
    if choice.again:
        return found
    return found + _heads(model) + 2 * _ranks(recipe, "q_proj", "k_proj", "v_proj")


def _ranks(recipe: Recipe, *names: str) -> int:
    return recipe.lora.r * len([name for name in recipe.lora.targets if name in names])


def _attention_work(model: Dimensions) -> float:
    """Bytes a token in the backward pass of attention: heads and their gradients, the kernel's float32 sums and keys
    and values expanded to all heads, gradients around it."""
    own, keys = model.heads * model.size, model.key_heads * model.size
    return 2 * 2 * (own + 2 * keys) + 4 * own + 2 * 2 * own + 2 * own + 2 * model.hidden


def _mlp_work(model: Dimensions, choice: Choice, tokens: int) -> float:
    at_once = min(tokens, CHUNK) if choice.checkpointing else tokens
    return at_once * (4 * model.inner * choice.checkpointing + 4 * model.inner) + tokens * 2 * 3 * model.hidden


def tokens_per_s(model: Dimensions, recipe: Recipe, choice: Choice, load: Load, rates: Rates) -> float:
    """Predicted tokens a second with an adapter, over whole updates."""
    share = (model.layers - 1) / model.layers  # the last layer works for the answers alone
    weights = model.layers * model.weights() * share
    repeated = ("gate_proj", "up_proj") + ("q_proj", "k_proj", "v_proj") * (not choice.offload_heads)
    again = model.layers * model.weights(*repeated) * share
    seconds = 2 * (2 * weights + again * choice.checkpointing) / rates.products
    seconds += 2 * (3 + choice.checkpointing) * _adapter_weights(model, recipe) / (rates.products / 2)
    squares = sum(length**2 for length in load.lengths) / sum(load.lengths)
    seconds += 3.5 * 2 * model.heads * model.size * squares * model.layers * share / rates.attention
    moved = 2 * (30 * model.hidden + 24 * model.inner) * (1.3 if choice.checkpointing else 1)
    seconds += model.layers * moved * (1 + (recipe.lora.dropout > 0)) / rates.moved
    if choice.offload:
        copying = model.layers * _blocks(model, recipe, choice) / rates.copied  # forward there, backward back
        seconds = sum(max(1.02 * part * seconds, copying) for part in (_FORWARD, 1 - _FORWARD))
    a_step = 0.02 + (choice.precision == "nf4") * 2 * 2.5 * model.layers * model.weights() / rates.moved
    update = sum(load.lengths) / len(load.lengths) * recipe.train.batch_size * recipe.train.accumulate
    steps = -(-update // max(choice.token_budget * 0.97, load.longest))
    return 1 / (seconds + (steps * a_step + _AN_UPDATE) / update)


def forecasts(model: Dimensions, recipe: Recipe, load: Load, rates: Rates | None) -> list[Forecast]:
    """Every way to train, the recipe's precision first."""
    full = recipe.train.method == "full"
    kinds = sorted(("nf4", "bf16"), key=lambda kind: kind != recipe.model.precision)
    budgets = list((*_SMALL_BUDGETS, *_BUDGETS) if full else _BUDGETS)
    budgets = [recipe.train.token_budget] if recipe.train.token_budget else budgets
    checkpointing_offload = [(True, True), (True, False), (False, False)]
    ways = full_costs.ways() if full else [(kind, *way) for kind in kinds for way in checkpointing_offload]
    choices = [
        Choice(*way, budget, heads) for way in ways for heads in (False, True)[: 1 + way[2]] for budget in budgets
    ]
    return [
        Forecast(
            choice,
            round(peak_bytes(model, recipe, choice, load) / 2**30, 2),
            round(host_bytes(model, recipe, choice, load) / 2**30, 2),
            round(tokens_per_s(model, recipe, choice, load, rates)) if rates and not full else None,
        )
        for choice in choices
        # a budget beyond all rows of an update is the same as the one before
        if choice.token_budget == budgets[0] or choice.token_budget < 2 * step_tokens(recipe, choice, load)
    ]


def picked(found: Sequence[Forecast], recipe: Recipe, memory: str, room: Room) -> Forecast | None:
    """What `memory` means among the forecasts: lean keeps precision and checkpointing as the recipe has them and fits
    a card of 8 GB, with what takes less memory among ways of about the same speed; auto is the fastest of all that
    fits, whatever the base; None where nothing does. Where speed is not predicted, what takes least memory is taken;
    in full fine-tuning, what should be fastest."""
    limit = _SHARE * (room.gpu if memory == "auto" else min(LEAN, room.gpu))
    own = _numerics(recipe)
    fits = [
        item
        for item in found
        if item.peak_gb * 2**30 <= limit
        and item.host_gb * 2**30 <= room.host
        and (memory == "auto" or item.choice.numerics == own)
    ]
    if recipe.train.method == "full":
        return min(fits, key=lambda item: full_costs.preferred(item.choice), default=None)
    best = max((item.tokens_per_s or 0 for item in fits), default=0)
    near = [item for item in fits if (item.tokens_per_s or 0) >= (1 if memory == "auto" else _ALIKE) * best]
    return min(near, key=lambda item: (item.host_gb, item.peak_gb), default=None)


def resolved(recipe: Recipe, choice: Choice) -> Recipe:
    """The recipe with a choice written into it."""
    return replace(
        recipe,
        model=replace(recipe.model, precision=choice.precision),
        train=replace(
            recipe.train,
            checkpointing=choice.checkpointing,
            offload=choice.offload,
            offload_heads=choice.offload_heads,
            token_budget=choice.token_budget,
        ),
    )


def chosen(model: Dimensions, recipe: Recipe, load: Load, rates: Rates, room: Room) -> Forecast:
    """The way to train in `room`; raises PetoolError (exit code 3) where the recipe's does not fit, with the setting
    that would.

    A recipe with a token budget is taken as it is. Where nothing lean fits 8 GB, the smallest is taken that fits here.
    """
    found = forecasts(model, recipe, load, rates)
    settings = recipe.train
    own = Choice(*_numerics(recipe), settings.offload, settings.token_budget, settings.offload_heads)
    mine = [item for item in found if item.choice.numerics == own.numerics]
    if recipe.train.token_budget:
        best = next(item for item in mine if item.choice == own)
    else:
        fitting = [item for item in mine if item.host_gb * 2**30 <= room.host]
        best = picked(found, recipe, recipe.train.memory, room) or min(fitting, key=lambda item: item.peak_gb)
    if best.peak_gb * 2**30 > room.gpu:
        raise PetoolError(
            f"this recipe needs about {best.peak_gb:.1f} GiB of GPU memory, {room.gpu / 2**30:.1f} GiB are free",
            _way_out(model, recipe, load, room),
            MACHINE,
        )
    if best.host_gb * 2**30 > room.host:
        raise PetoolError(
            f"this recipe pins about {best.host_gb:.1f} GiB of the machine's memory, a third of which is "
            f"{room.host / 2**30:.1f} GiB",
            _way_out(model, recipe, load, room),
            MACHINE,
        )
    return best


def _numerics(recipe: Recipe) -> tuple[str, bool]:
    return recipe.model.precision, recipe.train.checkpointing


def _way_out(model: Dimensions, recipe: Recipe, load: Load, room: Room) -> str:
    """The setting that would fit."""
    plain = replace(recipe, train=replace(recipe.train, token_budget=0))
    largest_first = sorted(forecasts(model, plain, load, None), key=lambda item: -item.peak_gb)
    for item in largest_first:
        if item.peak_gb * 2**30 <= room.gpu * _SHARE and item.host_gb * 2**30 <= room.host:
            return "would fit: " + _as_options(item.choice)
    full = recipe.train.method == "full"
    for tokens in (4096, 2048, 1024, 512):
        short = Load(tuple(min(length, tokens) for length in load.lengths), load.answers)
        choice = Choice(*(full_costs.ways()[0] if full else ("nf4", True, True)), tokens)
        if peak_bytes(model, plain, choice, short) <= room.gpu * _SHARE:
            return f"would fit: {_as_options(choice)} --set model.max_tokens={tokens}; or take a smaller base"
    return f"{'--set train.method=lora, or ' if full else ''}take a smaller base, or a GPU with more memory"


def _as_options(choice: Choice) -> str:
    values = {
        "model.precision": choice.precision,
        "train.checkpointing": str(choice.checkpointing).lower(),
        "train.offload": str(choice.offload).lower(),
        "train.offload_heads": str(choice.offload_heads).lower(),
        "train.token_budget": choice.token_budget,
    }
    return " ".join(f"--set {key}={value}" for key, value in values.items())


def table(found: Sequence[Forecast]) -> list[dict[str, Any]]:
    """Forecasts as plain rows."""
    return [
        {
            **asdict(item.choice),
            "kept": item.choice.kept,
            "peak_gb": item.peak_gb,
            "host_gb": item.host_gb,
            "tokens_per_s": item.tokens_per_s,
        }
        for item in found
    ]
