"""What a run was started with, in resume.json, and the refusal to continue it with anything else."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from petool_lite.base import Base, file_sha256
from petool_lite.errors import PetoolError
from petool_lite.prepare import Prepared
from petool_lite.recipe import Recipe
from petool_lite.runs import versions, write_json
from petool_lite.train.checkpoints import newest_checkpoint
from petool_lite.train.devices import arithmetic_name
from petool_lite.train.start import WEIGHTS, start_adapter

# Settings that change nothing in what is trained: they may differ when a run is continued.
_FREE = ("train.save_every", "train.report_to", "bench.")
# Packages that change nothing in it.
_OTHER_PACKAGES = ("llama-cpp-python", "gguf")


def start_facts(recipe: Recipe, base: Base, prepared: Prepared) -> dict[str, dict[str, Any]]:
    """Everything that decides what a run trains: recipe, data, base and versions, each as name -> value."""
    adapter = start_adapter(recipe)
    sections = asdict(recipe).items()
    return {
        "recipe": {f"{section}.{key}": value for section, keys in sections for key, value in keys.items()},
        "data": {
            "sha256 of the source": prepared.data_sha256,
            "sha256 of the token ids": file_sha256(Path(prepared.table.cache_files[0]["filename"])),
            **({"sha256 of the first adapter": file_sha256(adapter / WEIGHTS)} if adapter else {}),
        },
        "base": {path.name: path.stat().st_size for path in sorted(base.directory.glob("*.safetensors"))}
        | {"arithmetic": arithmetic_name()},
        "versions": {name: found for name, found in versions().items() if name not in _OTHER_PACKAGES},
    }


def write_start(run: Path, facts: Mapping[str, Mapping[str, Any]]) -> None:
    """Keep the facts of a new run."""
    write_json(run / "resume.json", facts)


def check_resume(run: Path, facts: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise PetoolError that names every difference between the run's start and now, or what is missing."""
    path = run / "resume.json"
    if not path.is_file():
        if newest_checkpoint(run):
            raise PetoolError(f"{run} has no resume.json: nobody can tell what it was started with", "train anew")
        write_start(run, facts)  # killed before its first step
        return
    before = json.loads(path.read_text())
    found = list(_differences(before, facts))
    if found:
        raise PetoolError(
            f"{run} was started with something else: {'; '.join(found)}",
            "put that back as it was, or start a new run: petool-lite train RECIPE",
        )


def _differences(before: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for part in ("recipe", "data", "base", "versions"):
        old, new = before.get(part, {}), now[part]
        for key in [*old, *(key for key in new if key not in old)]:
            if old.get(key) != new.get(key) and not (part == "recipe" and key.startswith(_FREE)):
                yield f"{part} {key} was {_plain(old.get(key))}, is {_plain(new.get(key))}"


def _plain(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return f"{text[:12]}..." if len(text) == 64 else text
