"""What can be benched: a file, a base or a run's model on a GPU, an endpoint, or a rule: what chance alone reaches."""

import hashlib
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from petool_lite.console import Report
from petool_lite.data.answers import equal_tools
from petool_lite.data.entries import Call, Entry, Tool, balance, properties, required, words
from petool_lite.errors import MACHINE, USAGE, PetoolError
from petool_lite.gguf_header import check_gguf
from petool_lite.inference.gpu import BATCH, gpu_available
from petool_lite.inference.llama_open import model_sha256
from petool_lite.models import files_sha256, resolve_base
from petool_lite.prompt.render import recorded_style
from petool_lite.recipe import Recipe
from petool_lite.runs import TRAINED, read_manifest


def _drawn(entry: Entry, tools: Sequence[Tool]) -> Tool:
    """One of `tools` by the entry's id, so that every shard and every run draws the same."""
    return random.Random(hashlib.sha256(entry.id.encode()).hexdigest()).choice(tools)


def _able(entry: Entry) -> Sequence[Tool]:
    """The tools that do what is asked, where the data tells them, else all."""
    able = equal_tools(entry) or ()
    return [tool for tool in entry.tools if tool.name in able] or entry.tools


def _told(entry: Entry) -> Tool:
    best = max(balance(entry, tool.name) for tool in _able(entry))
    return _drawn(entry, [tool for tool in _able(entry) if balance(entry, tool.name) == best])


def _words(entry: Entry) -> Tool:
    asked = words(entry.query)
    shared = {tool.name: len(asked & words(f"{tool.name} {tool.description}")) for tool in entry.tools}
    return max(entry.tools, key=lambda tool: (shared[tool.name], balance(entry, tool.name)))


RULES: dict[str, tuple[Callable[[Entry], Tool], str]] = {
    "rule-random": (lambda entry: _drawn(entry, entry.tools), "a tool drawn by lot"),
    "rule-first": (lambda entry: entry.tools[0], "the first tool of the list"),
    "rule-liked": (lambda e: max(e.tools, key=lambda tool: balance(e, tool.name)), "best-liked provider's first tool"),
    "rule-words": (_words, "the tool that shares most words with the request, of equals the better-liked provider's"),
    "rule-job": (lambda entry: _drawn(entry, _able(entry)), "told which tools do what is asked, one of them by lot"),
    "rule-told": (_told, "told which, too, the best-liked provider's, of equals one by lot: all that a history says"),
}
_GROUP = [name for name in RULES if name not in ("rule-job", "rule-told")]  # these are told more than a model is

LLAMA, GPU, ENDPOINT, NONE = "llama.cpp", "transformers", "endpoint", "none"
_SIDES = {"base": "the base before training", "tuned": "what was trained"}
_ON_GPU = tuple(f"{side}-{precision}-gpu" for side in _SIDES for precision in ("nf4", "bf16"))
KNOWN = (
    "base, tuned (the smallest exported type), base-TYPE, tuned-TYPE (a GGUF type), base-gpu, tuned-gpu "
    f"(in the precision of training), {', '.join(_ON_GPU)}, {', '.join(RULES)}, or the groups rules, cpu, gpu, all"
)


@dataclass(frozen=True)
class Variant:
    """A GGUF file on llama.cpp, a model directory (perhaps with an adapter) on a GPU, an endpoint's model, a rule."""

    name: str
    model: Path  # a rule's and an endpoint's model is a mere name
    style: str | None = None  # None: the file's own
    engine: str = LLAMA
    adapter: Path | None = None
    decoding: str = "constrained"  # or "free", "none"
    precision: str = "bf16"  # or "nf4"
    batch: int = BATCH  # replies side by side
    about: str = ""
    device: str | None = None
    url: str = ""  # of an endpoint
    requests: int = 0  # that it gets at most; 0: about three an entry

    @property
    def place(self) -> str:
        """Where the model is, as results record it."""
        return f"{self.model} at {self.url}" if self.url else str(self.model)

    def _files(self) -> list[Path]:
        places = [place for place in (self.model, self.adapter) if place and self.engine in (LLAMA, GPU)]
        folders = (sorted(place.glob("*.safetensors")) if place.is_dir() else [place] for place in places)
        return [file for files in folders for file in files]

    @property
    def bytes(self) -> int:
        """Size of the weights on disk, an adapter included."""
        return sum(file.stat().st_size for file in self._files())

    def sha256(self) -> str | None:
        """SHA-256 of a model file, or of its files', remembered while they stay; or of an endpoint and its model."""
        if self.url:
            return hashlib.sha256(self.place.encode()).hexdigest()
        return files_sha256(files, model_sha256) if (files := self._files()) else None


def endpoint_variant(url: str, model: str, requests: int) -> Variant:
    """The model of an endpoint; raises PetoolError for an address that is none."""
    from petool_lite.inference.endpoint import base_url

    name = re.sub(r"[^\w.-]+", "-", model).strip("-.") or "endpoint"
    url, told = base_url(url), f"{model}, asked at {base_url(url)}"
    return Variant(name, Path(model), None, ENDPOINT, None, "free", batch=4, about=told, url=url, requests=requests)


def model_variant(model: str, report: Report) -> Variant:
    """A GGUF file on the CPU, or a model directory or hub id on the GPU; raises PetoolError where it cannot be run."""
    path = Path(model).expanduser()
    if not (path / "config.json").is_file() and (path.exists() or path.suffix == ".gguf" or "/" not in model):
        check_gguf(path)
        return Variant(path.stem, path, about="the given GGUF file, on the CPU")
    if not gpu_available():
        raise PetoolError(f"{model} needs a GPU, and torch finds none", "export it, and bench the GGUF file", MACHINE)
    base = resolve_base(model, lambda text: report(text, 0, 0, ""))
    return Variant(base.directory.name, base.directory, engine=GPU, about="the given model, in bf16 on the GPU")


def tuned_file(run: Path, type_name: str | None = None) -> Path:
    """The run's exported GGUF of `type_name`, or its smallest; raises PetoolError if there is none."""
    files = sorted((run / "export").glob(f"model.{type_name or '*'}.gguf"), key=lambda file: file.stat().st_size)
    if not files:
        hint = f"petool-lite export --run {run} --gguf {type_name or 'q4_k_m'}"
        raise PetoolError(f"the run {run.name} has no {type_name or 'GGUF'} file", hint)
    return files[0]


def check_names(names: Sequence[str]) -> list[str]:
    """The rules among `names`, groups included; raises PetoolError for a name that is not known."""
    return [name for name in _expanded(names, None, "bf16") if name in RULES]


def rule_variant(name: str) -> Variant:
    """A rule as a variant."""
    return Variant(name, Path(name), engine=NONE, style="none", decoding="none", about=f"no model: {RULES[name][1]}")


def rule_call(name: str, entry: Entry) -> Call:
    """What the rule of that name answers: a call with the required parameters at their declared defaults."""
    tool = RULES[name][0](entry)
    schemas = properties(tool)
    return Call(tool.name, {key: schemas[key].get("default", "") for key in required(tool) if key in schemas})


def default_names(run: Path, report: Report) -> list[str]:
    """What is benched unless told: base, tuned and rules, on the GPU if it trained the run; says what else there is."""
    if str(read_manifest(run).get("device", "CPU")).startswith("CPU") or not gpu_available():
        return ["base", "tuned", "rules"]
    more = [f"tuned-{kind}" for kind in _exported(run)] or ["the GGUF files of `petool-lite export`"]
    report(f"scoring on the GPU, as it was trained; also here, on the CPU: {', '.join(more)} (--variants)", 0, 0, "")
    return ["base-gpu", "tuned-gpu", "rules"]


def run_variants(run: Path, recipe: Recipe, names: Sequence[str], report: Report) -> list[Variant]:
    """The variants of a run by name, see KNOWN; raises PetoolError for one unknown, without a file or its GPU."""
    manifest = read_manifest(run)
    recorded_style(manifest.get("prompt_style"), manifest.get("prompt_layout"))
    names = _expanded(names, run, recipe.model.precision)
    found = [rule_variant(name) if name in RULES else _of_run(name, run, recipe, report) for name in names]
    return list({variant.name: variant for variant in found}.values())


def _expanded(names: Sequence[str], run: Path | None, precision: str) -> list[str]:
    """Names with groups spelled out as far as this run and machine have them, base-gpu and tuned-gpu in `precision`."""
    from petool_lite.export.quantize import TYPES

    single = (*_SIDES, *_ON_GPU, *RULES, *(f"{side}-{kind}" for side in _SIDES for kind in TYPES))
    cpu = [f"{side}-{kind}" for kind in (_exported(run) if run else ()) for side in _SIDES]
    gpu = _ON_GPU if "all" not in names or (run and gpu_available()) else ()
    spelled = {name: [name] for name in single} | {f"{side}-gpu": [f"{side}-{precision}-gpu"] for side in _SIDES}
    spelled |= {"rules": _GROUP, "cpu": cpu, "gpu": [*_ON_GPU], "all": [*_GROUP, *cpu, *gpu]}
    if unknown := [name for name in names if name not in spelled]:
        raise PetoolError(f"unknown variant in {','.join(names)}: {unknown[0]}", f"known: {KNOWN}", USAGE)
    return list(dict.fromkeys(one for name in names for one in spelled[name]))


def _exported(run: Path) -> list[str]:
    """The types of the run's GGUF files."""
    return sorted(path.name.split(".")[1] for path in (run / "export").glob("model.*.gguf"))


def _of_run(name: str, run: Path, recipe: Recipe, report: Report) -> Variant:
    """A side of a run in a GGUF type, its smallest if none is named, or in a precision on the GPU."""
    from petool_lite.export import export_base

    side, *rest = name.split("-")
    style, trained = recipe.data.style, run / TRAINED[recipe.train.method]
    if name not in _ON_GPU:
        kind = rest[0] if rest else tuned_file(run).name.split(".")[1]
        about = f"{_SIDES[side]}, as a {kind} GGUF file on the CPU"
        if side == "tuned":
            return Variant(f"tuned-{kind}", tuned_file(run, kind), about=about)
        return Variant(f"base-{kind}", export_base(recipe.model.base, kind, report), style, about=about)
    if not gpu_available():
        raise PetoolError(f"{name} needs a GPU, and torch finds none", "bench the GGUF variants", MACHINE)
    about = f"{_SIDES[side]}, in {rest[0]} on the GPU"
    whole = side == "tuned" and recipe.train.method == "full"
    model = trained if whole else resolve_base(recipe.model.base).directory
    adapter = trained if side == "tuned" and not whole else None
    return Variant(name, model, style, GPU, adapter, precision=rest[0], about=about)


def with_decodings(variants: list[Variant], decoding: str) -> list[Variant]:
    """Each model constrained, free, as its name says, or both; endpoints as they are, and last the rules."""
    found = []
    for item in sorted(variants, key=lambda item: item.engine == NONE):
        free = replace(item, name=f"{item.name}-free", about=f"{item.about}, writing anything", decoding="free")
        both = {"constrained": [item], "free": [free], "both": [item, free]}[decoding]
        found += both if item.engine in (LLAMA, GPU) else [item]
    return found
