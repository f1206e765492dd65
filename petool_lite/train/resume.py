"""What a run was started with, in resume.json, and the refusal to continue it with anything else."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from petool_lite.adapters import WEIGHTS
from petool_lite.data.files import source_sha256
from petool_lite.errors import PetoolError
from petool_lite.models import Base, file_sha256, weight_files
from petool_lite.prompt.prepare import Prepared
from petool_lite.recipe import Recipe, flat, settings
from petool_lite.runs import versions, write_json
from petool_lite.train.checkpoints import newest_checkpoint
from petool_lite.train.devices import arithmetic_name, count
from petool_lite.train.start import start_adapter

# Settings that change nothing in what is trained: they may differ when a run is continued.
_FREE = ("train.save_every", "train.report_to", "bench.")
# Packages that change nothing in it.
_OTHER_PACKAGES = ("llama-cpp-python", "gguf")
# Of a larger file, pieces are hashed and not all of it: 6 GB would take seconds at every start.
_WHOLE, _PIECE, _PIECES = 64 << 20, 1 << 20, 32  # bytes, bytes, number


def start_facts(recipe: Recipe, base: Base, prepared: Prepared) -> dict[str, dict[str, Any]]:
    """Everything that decides what a run trains: recipe, data, base, processes, versions, each as name -> value."""
    adapter, held_out = start_adapter(recipe), recipe.train.eval_data if recipe.train.eval_every else ""
    files = weight_files(base.directory)
    return {
        "recipe": flat(recipe),
        "data": {
            "sha256 of the source": prepared.data_sha256,
            "sha256 of the token ids": file_sha256(Path(prepared.table.cache_files[0]["filename"])),
            **({"sha256 of the first adapter": file_sha256(adapter / WEIGHTS)} if adapter else {}),
            **({"sha256 of train.eval_data": source_sha256(held_out)} if held_out else {}),
        },
        "base": {path.name: path.stat().st_size for path in files}
        | {f"fingerprint of {path.name}": fingerprint(path) for path in files}
        | {"sha256 of config.json": file_sha256(base.directory / "config.json"), "arithmetic": arithmetic_name()},
        "run": {"processes": count()},
        "versions": {name: found for name, found in versions().items() if name not in _OTHER_PACKAGES},
    }


def fingerprint(path: Path) -> str:
    """SHA-256 of a file, or of a large one's size and 32 pieces of a MiB, evenly from its first to its last.

    Training changes nearly all weights, so that others differ there, too; a few changed bytes may go unseen.
    """
    size = path.stat().st_size
    if size <= _WHOLE:
        return file_sha256(path)
    found = hashlib.sha256(f"{size} ".encode())
    with path.open("rb") as file:
        for number in range(_PIECES):
            file.seek((size - _PIECE) * number // (_PIECES - 1))
            found.update(file.read(_PIECE))
    return found.hexdigest()


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
    """In words. Before a setting existed it was what its default now is, and a fact that was not written down is
    unknown; of packages all were, so that one without a version was not installed."""
    defaults = {name: default for name, _, _, default in settings()}
    for part in now:
        always = defaults if part == "recipe" else {}
        old, new = ({**always, **facts.get(part, {})} for facts in (before, now))
        for key in [*old, *(key for key in new if key not in old and part == "versions")]:
            if old.get(key) != new.get(key) and not (part == "recipe" and key.startswith(_FREE)):
                yield f"{part} {key} was {_plain(old.get(key))}, is {_plain(new.get(key))}"


def _plain(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return f"{text[:12]}..." if len(text) == 64 else text
