"""What can be benched: a model file, a base with an adapter or a run's own model on a GPU, or a rule without one."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from petool_lite.bench.baselines import RULES

from petool_lite.console import Report
from petool_lite.errors import MACHINE, USAGE, PetoolError
from petool_lite.prompt.render import recorded_style
from petool_lite.recipe import Recipe
from petool_lite.runs import TRAINED, is_complete, read_manifest

LLAMA, GPU, NONE = "llama.cpp", "transformers", "none"
DECODINGS = ("free", "constrained")
BATCH = 64  # replies decoded together on a GPU, unless a check finds that this changes one
_SIDES = ("base", "tuned")
_SIXTEEN = ("bf16", "f16")
_GPU_NAMES = tuple(f"{side}-{what}" for side in _SIDES for what in ("nf4-gpu", "bf16-gpu", "bf16-gpu-single"))
_ALIASES = {"tuned-gpu": "tuned-bf16-gpu", "base-gpu": "base-bf16-gpu"}
GROUPS = ("rules", "cpu", "gpu", "all")
KNOWN = (
    "base, tuned (the smallest exported type), base-TYPE, tuned-TYPE (a GGUF type), "
    "base- or tuned-nf4-gpu, -bf16-gpu, -bf16-gpu-single, "
    f"{', '.join(RULES)}, or the groups {', '.join(GROUPS)}"
)


@dataclass(frozen=True)
class Variant:
    """A GGUF file on llama.cpp, a model directory, perhaps with an adapter, on a GPU, or a rule.

    `style` overrides the prompt style in a GGUF file's metadata (None: as recorded there). `decoding` is "free" or
    "constrained" to calls of the offered tools, "none" for a rule. `precision` ("bf16" with the adapter merged, "nf4"
    with the adapter on it) and `batch` are of the GPU.
    """

    name: str
    model: Path | None = None
    style: str | None = None
    engine: str = LLAMA
    adapter: Path | None = None
    decoding: str = "free"
    precision: str = "bf16"
    batch: int = BATCH

    @property
    def weights(self) -> Path:
        """The model's file or folder; only rules have none."""
        assert self.model is not None
        return self.model

    def _files(self) -> list[Path]:
        if self.model is None:
            return []
        files = sorted(self.model.glob("*.safetensors")) if self.model.is_dir() else [self.model]
        return files + (sorted(self.adapter.glob("*.safetensors")) if self.adapter else [])

    @property
    def bytes(self) -> int:
        """Size of the weights on disk, an adapter included."""
        return sum(file.stat().st_size for file in self._files())

    def sha256(self) -> str | None:
        """SHA-256 of a model file, or of those of all weight files; remembered while the files stay the same."""
        from petool_lite.inference.settings import model_sha256

        found = [model_sha256(file) for file in self._files()]
        if len(found) < 2:
            return found[0] if found else None
        return hashlib.sha256(" ".join(found).encode()).hexdigest()


def tuned_file(run: Path, type_name: str | None = None) -> Path:
    """The run's exported GGUF of `type_name`, or its smallest; raises PetoolError if there is none."""
    files = sorted((run / "export").glob(f"model.{type_name or '*'}.gguf"), key=lambda file: file.stat().st_size)
    if not files:
        what = f"{type_name} file" if type_name else "GGUF file"
        hint = f"petool-lite export --run {run} --gguf {type_name or 'q4_k_m'}"
        raise PetoolError(f"the run {run.name} has no {what}", hint)
    return files[0]


def check_names(names: Sequence[str]) -> None:
    """Raise PetoolError for a name that is not known."""
    list(_expanded(names, None))


def rule_variants(names: Sequence[str]) -> list[Variant]:
    """The rules among `names`, groups included."""
    chosen = set(_expanded(names, None))
    return [Variant(name, engine=NONE, style="none", decoding="none") for name in RULES if name in chosen]


def run_variants(run: Path, recipe: Recipe, names: Sequence[str], report: Report) -> list[Variant]:
    """The variants of a run by name, see KNOWN; the untouched base is exported on the fly in any GGUF type.

    What a group names and this machine or run does not have is left out and said so. Raises PetoolError for a name
    that is not known, a file that is not there, and where a GPU is needed and absent.
    """
    if is_complete(run):
        manifest = read_manifest(run)
        recorded_style(manifest.get("prompt_style"), manifest.get("prompt_layout"))
    chosen = list(_expanded(names, run))
    absent = [name for name in chosen if name in _GPU_NAMES] if not _gpu_here(chosen) else []
    if absent and not [name for name in chosen if name not in absent and name not in RULES]:
        raise PetoolError("the GPU variants need a GPU, and torch finds none", "bench the GGUF variants", MACHINE)
    if absent:
        report(f"left out, since they need a GPU and torch finds none: {', '.join(absent)}", 0, 0, "")
    found = []
    for name in dict.fromkeys(name for name in chosen if name not in absent):
        if name in RULES:
            found += rule_variants([name])
        elif name in _GPU_NAMES:
            found.append(_gpu_variant(name, run, recipe))
        else:
            found += _file_variant(name, run, recipe, name in names, report)
    return list({variant.name: variant for variant in found}.values())


def _gpu_here(chosen: Sequence[str]) -> bool:
    if not any(name in _GPU_NAMES for name in chosen):
        return True
    from petool_lite.inference.gpu import gpu_available

    return gpu_available()


def _expanded(names: Sequence[str], run: Path | None) -> Iterator[str]:
    """Names with groups spelled out and aliases replaced; raises PetoolError for one that is not known."""
    from petool_lite.export import TYPES

    files = {*_SIDES, *(f"{side}-{kind}" for side in _SIDES for kind in TYPES)}
    for name in names:
        name = _ALIASES.get(name, name)
        if name not in files and name not in _GPU_NAMES and name not in RULES and name not in GROUPS:
            raise PetoolError(f"unknown variant in {','.join(names)}: {name}", f"known: {KNOWN}", USAGE)
        if name in ("rules", "all"):
            yield from RULES
        if name in ("cpu", "all"):
            yield from (f"{side}-{kind}" for side in _SIDES for kind in (_sixteen(run), "q8_0", "q4_k_m"))
        if name in ("gpu", "all"):
            yield from _GPU_NAMES
        if name not in GROUPS:
            yield name


def _sixteen(run: Path | None) -> str:
    """The 16-bit type that the run exported, bf16 if neither."""
    return next((kind for kind in _SIXTEEN if run and (run / "export" / f"model.{kind}.gguf").is_file()), _SIXTEEN[0])


def _gpu_variant(name: str, run: Path, recipe: Recipe) -> Variant:
    from petool_lite.models import resolve_base

    trained = run / TRAINED[recipe.train.method] if name.startswith("tuned") else None
    whole = trained if recipe.train.method == "full" else None
    adapter = None if whole else trained
    precision = "nf4" if "-nf4-" in name else "bf16"
    batch = 1 if name.endswith("-single") else BATCH
    directory = whole or resolve_base(recipe.model.base).directory
    return Variant(name, directory, recipe.data.style, GPU, adapter, precision=precision, batch=batch)


def _file_variant(name: str, run: Path, recipe: Recipe, asked: bool, report: Report) -> list[Variant]:
    from petool_lite.export import export_base

    side, _, kind = name.partition("-")
    try:
        tuned = tuned_file(run, kind or None) if side == "tuned" or not kind else None
    except PetoolError as error:
        if asked:
            raise
        report(f"left out {name}: {error.message}; {error.hint}", 0, 0, "")
        return []
    kind = kind or (tuned.name.split(".")[1] if tuned else "")
    if side == "tuned":
        return [Variant(f"tuned-{kind}", tuned)]
    return [Variant(f"base-{kind}", export_base(recipe.model.base, kind, report), recipe.data.style)]


def with_decodings(variants: list[Variant], decoding: str) -> list[Variant]:
    """Each variant with free or constrained decoding, or with "both"; a constrained one says so in its name.

    Rules have no decoding and come last.
    """
    chosen = DECODINGS if decoding == "both" else (decoding,)
    suffix = {"free": "", "constrained": "-constrained"}
    models = [item for item in variants if item.engine != NONE]
    found = [replace(item, name=item.name + suffix[name], decoding=name) for item in models for name in chosen]
    return found + [item for item in variants if item.engine == NONE]
