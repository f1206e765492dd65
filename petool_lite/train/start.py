"""The adapter that a second stage starts from: found and checked before anything is loaded."""

import json
from pathlib import Path
from typing import Any

from petool_lite.console import Report
from petool_lite.errors import PetoolError
from petool_lite.models import resolve_base
from petool_lite.recipe import Recipe
from petool_lite.runs import TRAINED, find_run, read_manifest, runs_root

WEIGHTS = "adapter_model.safetensors"


def check_start(recipe: Recipe, report: Report) -> None:
    """Refuse a start that cannot be right for the recipe's objective, base or LoRA shape; tell what looks odd."""
    if recipe.train.objective == "dpo":
        if not recipe.model.adapter:
            raise PetoolError(
                "dpo is the second stage: it needs the adapter of a first one", "--set model.adapter=RUN_OR_FOLDER"
            )
        if recipe.lora.dropout:
            raise PetoolError("dpo compares two models, both without dropout", "--set lora.dropout=0.0")
    folder = start_adapter(recipe)
    if folder is None:
        return
    found = _config(folder)
    mine, theirs = recipe.lora, {key: found.get(key) for key in ("r", "lora_alpha", "target_modules")}
    wanted = {"r": mine.r, "lora_alpha": mine.alpha, "target_modules": sorted(mine.targets)}
    theirs["target_modules"] = sorted(theirs["target_modules"] or [])
    names = {"r": "lora.r", "lora_alpha": "lora.alpha", "target_modules": "lora.targets"}
    wrong = [f"{names[key]}={json.dumps(theirs[key])}" for key in wanted if theirs[key] != wanted[key]]
    if wrong:
        raise PetoolError(
            f"the adapter {folder} has another shape than the recipe",
            " ".join(f"--set '{setting}'" for setting in wrong),
        )
    _check_base(folder, found, recipe, report)


def start_adapter(recipe: Recipe) -> Path | None:
    """Folder of the adapter that `model.adapter` names, a complete run's or one in PEFT's format; None for none."""
    name = recipe.model.adapter
    if not name:
        return None
    path = Path(name).expanduser()
    if not (path / "adapter_config.json").is_file():
        if not any((place / "recipe.toml").is_file() for place in (path, runs_root() / name)):
            raise PetoolError(f"no adapter: {name}", "give a complete run, or a folder with adapter_config.json")
        run = find_run(name)
        path = run / TRAINED["lora"]
        whole = run / TRAINED["full"]
        if whole.is_dir():
            raise PetoolError(
                f"the run {run} has no adapter: all its weights learned",
                f"--set model.adapter= --set model.base={whole}",
            )
    if not (path / WEIGHTS).is_file():
        raise PetoolError(f"no {WEIGHTS} in {path}", "pickled weights (.bin) are not read; save it as safetensors")
    return path


def _config(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    except (OSError, ValueError) as error:
        raise PetoolError(f"cannot read {folder}/adapter_config.json: {error}", "give another adapter") from error
    if found.get("peft_type") != "LORA" or found.get("use_dora") or found.get("bias", "none") != "none":
        raise PetoolError(f"{folder} is not a plain LoRA adapter", "give one that petool-lite or PEFT's LoRA trained")
    return found


def _check_base(folder: Path, found: dict[str, Any], recipe: Recipe, report: Report) -> None:
    """Both stages need the same base; a run also says how it laid out its prompts."""
    base = str(found.get("base_model_name_or_path"))
    if base != recipe.model.base and not _same_folder(base, recipe.model.base):
        raise PetoolError(
            f"the adapter {folder} was trained on {base}, the recipe says {recipe.model.base}",
            f"--set model.base={base}",
        )
    if (folder.parent / "manifest.json").is_file():
        manifest = read_manifest(folder.parent)
        for key, mine in (("prompt_style", recipe.data.style), ("setting", recipe.data.setting)):
            if manifest.get(key) != mine:
                report(f"note: the adapter learned with {key} {manifest.get(key)}, this run uses {mine}", 0, 0, "")


def _same_folder(one: str, other: str) -> bool:
    try:
        return resolve_base(one).directory == resolve_base(other).directory
    except PetoolError:
        return False
