"""The adapter that a second stage starts from: found and checked before anything is loaded."""

import json
from contextlib import suppress
from pathlib import Path

from petool_lite.adapters import CONFIG, AdapterConfig, read_adapter_config
from petool_lite.console import Report
from petool_lite.errors import PetoolError
from petool_lite.models import resolve_base
from petool_lite.recipe import Recipe
from petool_lite.runs import TRAINED, find_run, read_manifest, runs_root


def check_start(recipe: Recipe, report: Report) -> None:
    """Refuse a start that cannot be right for the recipe's objective, base or LoRA shape; tell what looks odd."""
    if recipe.train.objective == "dpo":
        if not recipe.model.adapter:
            what = "dpo is the second stage: it needs the adapter of a first one"
            raise PetoolError(what, "--set model.adapter=RUN_OR_FOLDER")
        if recipe.lora.dropout:
            raise PetoolError("dpo compares two models, both without dropout", "--set lora.dropout=0.0")
    folder = start_adapter(recipe)
    if folder is None:
        return
    found, mine = read_adapter_config(folder), recipe.lora
    alpha = int(found.alpha) if found.alpha == int(found.alpha) else found.alpha  # as recipes have it
    pairs = {"r": (mine.r, found.r), "alpha": (mine.alpha, alpha), "targets": (sorted(mine.targets), [*found.targets])}
    wrong = [f"--set 'lora.{key}={json.dumps(theirs)}'" for key, (wanted, theirs) in pairs.items() if theirs != wanted]
    if wrong:
        raise PetoolError(f"the adapter {folder} has another shape than the recipe", " ".join(wrong))
    if found.rslora:
        report(f"the adapter {folder.name} scales by alpha / sqrt(r) (rslora), as what is trained on", 0, 0, "")
    _check_base(folder, found, recipe, report)


def start_adapter(recipe: Recipe) -> Path | None:
    """Folder of the adapter that `model.adapter` names, a complete run's or one in PEFT's format; None for none."""
    name = recipe.model.adapter
    if not name:
        return None
    path = Path(name).expanduser()
    if not (path / CONFIG).is_file():
        if not any((place / "recipe.toml").is_file() for place in (path, runs_root() / name)):
            raise PetoolError(f"no adapter: {name}", "give a complete run, or a folder with adapter_config.json")
        run = find_run(name)
        path, whole = run / TRAINED["lora"], run / TRAINED["full"]
        if whole.is_dir():
            what = f"the run {run} has no adapter: all its weights learned"
            raise PetoolError(what, f"--set model.adapter= --set model.base={whole}")
    return path


def _check_base(folder: Path, found: AdapterConfig, recipe: Recipe, report: Report) -> None:
    """Both stages need the same base; a run also says how it laid out its prompts."""
    same = found.base == recipe.model.base
    with suppress(PetoolError):  # a name that is not to be found is another base
        same = same or resolve_base(found.base).directory == resolve_base(recipe.model.base).directory
    if not same:
        theirs = found.base or "a base that it does not name"
        what = f"the adapter {folder} was trained on {theirs}, the recipe says {recipe.model.base}"
        raise PetoolError(what, f"--set model.base={found.base}")
    if (folder.parent / "manifest.json").is_file():
        manifest = read_manifest(folder.parent)
        for key, mine in (("prompt_style", recipe.data.style), ("setting", recipe.data.setting)):
            if manifest.get(key) != mine:
                report(f"note: the adapter learned with {key} {manifest.get(key)}, this run uses {mine}", 0, 0, "")
