"""What a run was started with, in resume.json, and the refusal to continue it with anything else."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from petool_lite.adapters import WEIGHTS
from petool_lite.data.files import source_sha256
from petool_lite.errors import PetoolError
from petool_lite.models import Base, file_sha256, weight_files
from petool_lite.prompt.prepare import Prepared
from petool_lite.recipe import Recipe, flat
from petool_lite.runs import versions, write_json
from petool_lite.train.checkpoints import newest_checkpoint
from petool_lite.train.devices import arithmetic_name, count
from petool_lite.train.start import start_adapter

START = "resume.json"  # of a run
# Settings that change nothing in what is trained: they may differ when a run is continued.
_FREE = ("train.save_every", "train.report_to", "bench.")
# Packages that change nothing in it.
_OTHER_PACKAGES = ("llama-cpp-python", "gguf")


def start_facts(recipe: Recipe, base: Base, prepared: Prepared) -> dict[str, dict[str, Any]]:
    """Everything that decides what a run trains: recipe, data, base, processes, versions, each as name -> value."""
    adapter, held_out = start_adapter(recipe), recipe.train.eval_data if recipe.train.eval_every else ""
    return {
        "recipe": flat(recipe),
        "data": {
            "sha256 of the source": prepared.data_sha256,
            "sha256 of the token ids": file_sha256(Path(prepared.table.cache_files[0]["filename"])),
            **({"sha256 of the first adapter": file_sha256(adapter / WEIGHTS)} if adapter else {}),
            **({"sha256 of train.eval_data": source_sha256(held_out)} if held_out else {}),
        },
        "base": {
            **{f"xxh3 of {path.name}": _xxh3(path) for path in weight_files(base.directory)},
            "sha256 of config.json": file_sha256(base.directory / "config.json"),
            "arithmetic": arithmetic_name(),
        },
        "run": {"processes": count()},
        "versions": {name: found for name, found in versions().items() if name not in _OTHER_PACKAGES},
    }


def _xxh3(path: Path) -> str:
    """A hash of a file that takes no more time than reading it, which loading it does again, from memory."""
    import xxhash

    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def check_resume(run: Path, facts: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise PetoolError that names every difference between the run's start and now, or what is missing."""
    path = run / START
    if not path.is_file():
        if newest_checkpoint(run):
            raise PetoolError(f"{run} has no {START}: nobody can tell what it was started with", "train anew")
        write_json(path, facts)  # killed before its first step
        return
    before = {part: {} for part in facts} | json.loads(path.read_text())
    found = [
        f"{part} {key} was {_plain(before[part].get(key))}, is {_plain(now.get(key))}"
        for part, now in facts.items()
        for key in {**before[part], **now}
        if before[part].get(key) != now.get(key) and not (part == "recipe" and key.startswith(_FREE))
    ]
    if found:
        what = f"{run} was started with something else: {'; '.join(found)}"
        raise PetoolError(what, "put that back as it was, or start a new run: petool-lite train RECIPE")


def _plain(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return f"{text[:12]}..." if len(text) >= 32 else text
