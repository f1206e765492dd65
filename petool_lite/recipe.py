"""Recipes: one frozen dataclass tree owns every setting, its default and its one-line meaning. A recipe is strict TOML,
whose problems are reported together; --set on the command line goes before it, and it before the defaults here."""

import difflib
import json
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any, get_type_hints

from petool_lite.data import SETTINGS
from petool_lite.data.fields import is_unicode
from petool_lite.errors import USAGE, PetoolError, in_words
from petool_lite.prompt.render import OVERLENGTH, STYLES
from petool_lite.text import read_text

ALL = "all"  # data.setting: every setting that the entries hold; the rest of the program knows single ones only

_OPTIMIZERS = ("adamw_torch", "adamw_8bit", "paged_adamw_32bit")
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # of a decoder layer
_TYPES = {int: "integer", float: "number", bool: "boolean", str: "string"}  # as JSON Schema calls them
_LONGEST = 1 << 20  # bytes of a recipe file


def _setting(
    default: Any, doc: str, choices: Sequence[str] = (), least: float | None = None, most: float | None = None
) -> Any:
    factory = {"default_factory": lambda: default} if isinstance(default, list) else {"default": default}
    return field(**factory, metadata={"doc": doc, "choices": tuple(choices), "least": least, "most": most})


@dataclass(frozen=True)
class ModelSettings:
    """Which base model, in which precision, at which length."""

    base: str = _setting("smollm2-135m", "base model: smollm2-135m (embedded), a directory, a .gguf file or a hub id")
    precision: str = _setting("bf16", "base weights in training: nf4 (double quantization) or bf16", ("nf4", "bf16"))
    adapter: str = _setting("", "train on from this adapter, a run or an adapter folder; empty makes a fresh one")
    max_tokens: int = _setting(8192, "longest row, prompt and answer, in tokens", least=16)


@dataclass(frozen=True)
class DataSettings:
    """What is learned from, and how it is laid out."""

    train: str = _setting("demo:train:320", "training entries: a file, demo:train:COUNT or hub:OWNER/NAME[/FILE]")
    setting: str = _setting("rating", "PEToolBench: which prompt; all: rows of each, for one model", (*SETTINGS, ALL))
    style: str = _setting("petool", "petool: a chat template, goes into the GGUF; published: PEToolBench's own", STYLES)
    skip_bad: bool = _setting(False, "leave out broken entries and count them, instead of refusing the file")
    overlength: str = _setting("trim-history", "rows longer than max_tokens; answers are never cut", OVERLENGTH)

    @property
    def one_setting(self) -> str:
        """The setting to take where there can be one only: the recipe's own, or rating if it learns all of them."""
        return SETTINGS[0] if self.setting == ALL else self.setting


@dataclass(frozen=True)
class LoraSettings:
    """The adapter of method lora; full reads none of this."""

    r: int = _setting(32, "rank of the adapter", least=1)
    alpha: int = _setting(64, "scale of the adapter, divided by r", least=1)
    # beyond 0.9 an update sees less than a tenth of its input, ten times as large
    dropout: float = _setting(0.0, "dropout on the adapter's input; 0 trains about a sixth faster", least=0, most=0.9)
    targets: list[str] = _setting(list(LINEARS), "linear layers that get one", LINEARS)


@dataclass(frozen=True)
class TrainSettings:
    """What learns, the optimizer and its steps."""

    method: str = _setting(
        "lora",
        "lora: an adapter of a few MB learns beside the base. full: every weight learns, embeddings too, at 20 bytes a "
        "weight of GPU memory and checkpoints of 12; no more accurate in what was measured; wants a smaller "
        "learning_rate (3e-4) and leaves a model of its own in place of the adapter",
        ("lora", "full"),
    )
    objective: str = _setting(
        "sft", "sft: write the right call; dpo: prefer it to a wrong one, from model.adapter on", ("sft", "dpo")
    )
    beta: float = _setting(0.1, "dpo: how strongly the model is held to the adapter it starts from", least=0)
    epochs: float = _setting(1.0, "passes over the data", least=0)
    max_steps: int = _setting(0, "stop after N optimizer steps; 0 means the epochs decide", least=0)
    learning_rate: float = _setting(1e-4, "peak learning rate", least=0, most=1)
    schedule: str = _setting("cosine", "learning rate over time", ("cosine", "linear", "constant_with_warmup"))
    warmup_ratio: float = _setting(0.01, "share of the steps that warm up", least=0, most=1)
    rows: int = _setting(32, "rows an update, however many a micro-batch holds", least=1)
    memory: str = _setting(
        "lean",
        "how a GPU is filled: lean fits 8 GB cards, keeps the precision and computes a layer's inner values twice; "
        "auto takes the fastest way that fits in 90 % of the free memory, a bf16 base first",
        ("lean", "auto"),
    )
    token_budget: int = _setting(0, "tokens a micro-batch; 0: as many as fit on a GPU, 2048 on a CPU", least=0)
    optimizer: str = _setting("adamw_torch", "as transformers names it; paged ones need a GPU", _OPTIMIZERS)
    weight_decay: float = _setting(0.0, "decoupled weight decay", least=0)
    clip_norm: float = _setting(1.0, "clip the gradient to this norm", least=0)
    save_every: int = _setting(0, "write a checkpoint every N steps; 0 writes one at the end", least=0)
    eval_every: int = _setting(0, "score replies on eval_data every N steps, keep the best weights; 0 never", least=0)
    eval_data: str = _setting("", "held-out entries for eval_every, written as data.train is")
    early_stop: int = _setting(0, "stop after N evaluations in a row without a better one; 0 never", least=0)
    report_to: str = _setting("", "trackers to tell as well, with commas: tensorboard, wandb, mlflow, ...")
    seed: int = _setting(
        0, "seed of adapter, data order and dropout; a CPU repeats a run to the bit, a GPU sums in any order",
        least=0, most=2**32 - 1,  # numpy's largest
    )  # fmt: skip


@dataclass(frozen=True)
class BenchSettings:
    """What the trained model is scored on."""

    data: str = _setting("demo:test:40", "entries that `bench` scores when --data is not given")
    max_reply_tokens: int = _setting(256, "longest reply in tokens", least=1)


@dataclass(frozen=True)
class Recipe:
    """All settings of a run, by section."""

    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    bench: BenchSettings = field(default_factory=BenchSettings)


def settings() -> Iterator[tuple[str, type, dict[str, Any], Any]]:
    """Every setting as (section.key, type, metadata, default)."""
    for section, defaults in vars(Recipe()).items():
        hints = get_type_hints(type(defaults))
        for item in fields(defaults):
            yield f"{section}.{item.name}", hints[item.name], dict(item.metadata), getattr(defaults, item.name)


def builtin_recipes() -> dict[str, str]:
    """Shipped recipes: name -> text."""
    folder = resources.files("petool_lite.recipes")
    files = sorted((item for item in folder.iterdir() if item.name.endswith(".toml")), key=lambda item: item.name)
    return {item.name.removesuffix(".toml"): item.read_text() for item in files}


def load_recipe(source: str, overrides: Sequence[str] = ()) -> tuple[str, Recipe]:
    """Read a recipe by path or shipped name, with `key=value` overrides. Raises PetoolError with every problem."""
    path, shipped = Path(source).expanduser(), builtin_recipes()
    # "recipes/rating.toml" means the shipped one when no such file lies in the current folder
    if not path.is_file() and (path.stem not in shipped or str(path) not in (path.stem, f"recipes/{path.stem}.toml")):
        raise PetoolError(f"no such recipe: {source}", f"give a file, or one of: {', '.join(shipped)}")
    text = read_text(path, _LONGEST) if path.is_file() else shipped[path.stem]
    # tomllib's own error, a number of too many digits, too deep nesting
    with in_words(f"{source} is not valid TOML", "see `petool-lite recipes show demo`", ValueError, RecursionError):
        table = tomllib.loads(text)
    if not table:
        raise PetoolError(f"{source} is empty", "a recipe names at least its base; see `petool-lite recipes show demo`")
    if 'style = "compact"' in text or "\naccumulate = " in text:
        what = f"{source} is of petool-lite 0.1, whose prompt and settings this version does not read"
        raise PetoolError(what, "train again with a recipe of this version (CHANGELOG.md), or use petool-lite 0.1")
    problems = [f"{key} stands outside a section such as [train]" for key in table if not isinstance(table[key], dict)]
    sections = {name: content for name, content in table.items() if isinstance(content, dict)}
    values = {f"{name}.{key}": value for name, content in sections.items() for key, value in content.items()}
    texts = {key for key, kind, _, _ in settings() if kind is str}
    for override in overrides:
        key, equals, raw = (part.strip() for part in override.partition("="))
        if not equals:
            raise PetoolError(f"--set {override}: expected key=value", "such as --set train.epochs=2", USAGE)
        if not is_unicode(override):
            raise PetoolError("--set: a value is not UTF-8 text", "recipes are UTF-8", USAGE)
        values[key] = raw.strip("\"'") if key in texts else raw
        with suppress(ValueError, RecursionError):
            values[key] = values[key] if key in texts else tomllib.loads(f"value = {raw}")["value"]
    return path.stem, _build(values, problems, source)


def _build(values: dict[str, Any], problems: list[str], source: str) -> Recipe:
    known = {name: (kind, metadata) for name, kind, metadata, _ in settings()}
    initials = {"".join(word[0] for word in name.split(".")[1].split("_")): name for name in known}
    recipe = Recipe()
    chosen: dict[str, dict[str, Any]] = {section: {} for section in vars(recipe)}
    for key, value in values.items():
        section, _, item = key.partition(".")
        if key not in known:
            short = initials.get(key.split(".")[-1])  # lr is learning_rate
            near = [short] if short else difflib.get_close_matches(key, known, n=1, cutoff=0.4)
            problems.append(f"unknown key {key}" + (f"; did you mean {near[0]}?" if near else ""))
        elif problem := _problem(value, *known[key]):
            problems.append(f"{key}: {problem}")
        else:
            chosen[section][item] = known[key][0](value) if known[key][0] in (int, float) else value
    problems += _conflicts({name: default for name, _, _, default in settings()} | values)
    if problems:
        raise PetoolError(f"{source}: " + "; ".join(problems), "`petool-lite recipes keys` lists all settings")
    return Recipe(**{section: replace(default, **chosen[section]) for section, default in vars(recipe).items()})


def _problem(value: Any, kind: Any, about: dict[str, Any]) -> str:
    """What is wrong with a value, in words; nothing for a good one."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    if isinstance(value, int | float) and not abs(value) < 2**63:  # TOML's integers; NaN and infinity are none
        return "expected a finite number of at most 64 bits"
    bounds = {"enum": list(about["choices"]), "minimum": about["least"], "maximum": about["most"]}
    schema = {"type": _TYPES.get(kind), **{name: bound for name, bound in bounds.items() if bound not in (None, [])}}
    if kind == list[str]:
        schema = {"type": "array", "minItems": 1, "items": {"enum": list(about["choices"])}}
    try:
        error = best_match(Draft202012Validator(schema).iter_errors(value))
    except ValueError:  # Python writes no integer of thousands of digits
        return "a number without end"
    return str(error.message)[:300] if error else ""


def flat(recipe: Recipe) -> dict[str, Any]:
    """Every setting as section.key and its value."""
    return {f"{section}.{key}": value for section, keys in asdict(recipe).items() for key, value in keys.items()}


def _conflicts(values: dict[str, Any]) -> list[str]:
    full, dpo = values["train.method"] == "full", values["train.objective"] == "dpo"
    pairs = "dpo takes one pair after the other; this is for sft"
    nf4 = values["model.precision"] == "nf4"
    found = {
        "model.precision": full and nf4 and "full trains the weights themselves, in bf16",
        "model.adapter": full and bool(values["model.adapter"]) and "full has no adapter to train on",
        "train.objective": full and dpo and "dpo needs an adapter, so train.method = lora",
        "train.epochs": values["train.epochs"] == 0 and not values["train.max_steps"] and "0 passes train nothing",
        "train.learning_rate": values["train.learning_rate"] == 0 and "a rate of 0 trains nothing",
        "train.token_budget": dpo and values["train.token_budget"] != 0 and pairs,
        "train.memory": dpo and values["train.memory"] != "lean" and pairs,
    }
    return [f"{key}: {problem}" for key, problem in found.items() if problem]


def to_toml(recipe: Recipe) -> str:
    """The resolved recipe as TOML, every setting written out with its meaning."""
    lines = []
    for name, section in vars(recipe).items():
        lines.append(f"[{name}]")
        for item in fields(section):
            value = json.dumps(getattr(section, item.name), ensure_ascii=False)  # as TOML writes it, but for DEL
            lines += [f"# {item.metadata['doc']}", f"{item.name} = {value}".replace("\x7f", "\\u007f")]
        lines.append("")
    return "\n".join(lines)
