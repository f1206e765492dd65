"""What can be benched: a model file with the prompt style that it was trained on."""

from dataclasses import dataclass
from pathlib import Path

from petool_lite.export import export_base

from petool_lite.console import Report
from petool_lite.errors import PetoolError
from petool_lite.recipe import Recipe

VARIANTS = ("base", "tuned")


@dataclass(frozen=True)
class Variant:
    """A GGUF file on llama.cpp; `style` overrides the prompt style in the file's metadata (None: as recorded)."""

    name: str
    model: Path
    style: str | None = None
    engine: str = "llama.cpp"


def tuned_file(run: Path, type_name: str | None = None) -> Path:
    """The run's exported GGUF of `type_name`, or its smallest; raises PetoolError if there is none."""
    files = sorted((run / "export").glob(f"model.{type_name or '*'}.gguf"), key=lambda file: file.stat().st_size)
    if not files:
        what = f"{type_name} file" if type_name else "GGUF file"
        raise PetoolError(f"the run {run.name} has no {what}", f"petool-lite export --run {run} --gguf q4_k_m")
    return files[0]


def run_variants(run: Path, recipe: Recipe, names: list[str], report: Report) -> list[Variant]:
    """The variants of a run: the untouched base in the same GGUF type, on the same prompts, and the tuned file."""
    tuned = tuned_file(run)
    type_name = tuned.name.split(".")[1]
    variants = []
    for name in names:
        if name == "base":
            model = export_base(recipe.model.base, type_name, report)
            variants.append(Variant(f"base-{type_name}", model, recipe.data.style))
        else:
            variants.append(Variant(f"tuned-{type_name}", tuned))
    return variants
