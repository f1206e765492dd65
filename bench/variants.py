"""What can be benched: a model file with the prompt style that it was trained on."""

from dataclasses import dataclass, replace
from pathlib import Path

from petool_lite.export import export_base

from petool_lite.base import resolve_base
from petool_lite.console import Report
from petool_lite.errors import PetoolError
from petool_lite.recipe import Recipe

GPU = "transformers"
VARIANTS = ("base", "tuned", "tuned-gpu")
DECODINGS = ("free", "constrained")


@dataclass(frozen=True)
class Variant:
    """A GGUF file on llama.cpp, or a base directory with an adapter on a GPU.

    `style` overrides the prompt style in a GGUF file's metadata (None: as recorded there). `decoding` is "free" or
    "constrained" to calls of the offered tools.
    """

    name: str
    model: Path
    style: str | None = None
    engine: str = "llama.cpp"
    adapter: Path | None = None
    decoding: str = "free"

    @property
    def bytes(self) -> int:
        """Size of the weights on disk."""
        files = self.model.glob("*.safetensors") if self.model.is_dir() else [self.model]
        return sum(file.stat().st_size for file in files)


def tuned_file(run: Path, type_name: str | None = None) -> Path:
    """The run's exported GGUF of `type_name`, or its smallest; raises PetoolError if there is none."""
    files = sorted((run / "export").glob(f"model.{type_name or '*'}.gguf"), key=lambda file: file.stat().st_size)
    if not files:
        what = f"{type_name} file" if type_name else "GGUF file"
        raise PetoolError(f"the run {run.name} has no {what}", f"petool-lite export --run {run} --gguf q4_k_m")
    return files[0]


def run_variants(run: Path, recipe: Recipe, names: list[str], report: Report) -> list[Variant]:
    """The variants of a run: the untouched base in the same GGUF type, the tuned file, the adapter on a GPU."""
    gguf = [name for name in names if name != "tuned-gpu"]
    tuned = tuned_file(run) if gguf else run
    type_name = tuned.name.split(".")[1] if gguf else ""
    made = {
        "base": lambda: Variant(
            f"base-{type_name}", export_base(recipe.model.base, type_name, report), recipe.data.style
        ),
        "tuned": lambda: Variant(f"tuned-{type_name}", tuned),
        "tuned-gpu": lambda: Variant(
            "tuned-bf16-gpu", resolve_base(recipe.model.base).directory, recipe.data.style, GPU, run / "adapter"
        ),
    }
    return [made[name]() for name in names]


def with_decodings(variants: list[Variant], decoding: str) -> list[Variant]:
    """Each variant with free or constrained decoding, or with "both"; a constrained one says so in its name."""
    chosen = DECODINGS if decoding == "both" else (decoding,)
    suffix = {"free": "", "constrained": "-constrained"}
    return [replace(item, name=item.name + suffix[name], decoding=name) for item in variants for name in chosen]
