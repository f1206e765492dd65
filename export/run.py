"""From a run directory to its export folder: every file written and checked before one of them gets its name."""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from petool_lite.console import Report, silent
from petool_lite.errors import PetoolError
from petool_lite.export.gguf import write_lora
from petool_lite.export.hub import card, modelfile
from petool_lite.export.quantize import TYPES
from petool_lite.export.source import Source, load_adapter, load_source, load_whole
from petool_lite.export.stream import Change, Changes, write_files
from petool_lite.export.verify import check_files, importance, trial
from petool_lite.families import chat_template
from petool_lite.inference.llama_open import quiet_threads
from petool_lite.models import Base, base_of_run, file_sha256, files_sha256, resolve_base
from petool_lite.places import cache_place, library_places
from petool_lite.prompt.render import exported_template
from petool_lite.recipe import Recipe, load_recipe
from petool_lite.runs import TRAINED, draft, locked, read_manifest, versions, write_json, write_text


@dataclass(frozen=True)
class Options:
    """What to export."""

    types: tuple[str, ...]  # of GGUF
    merge_base: str | None = None  # which weights of the base: "bf16", "nf4"; None: those that training used
    imatrix: bool = False  # quantize by an importance matrix
    lora: bool = False  # a LoRA file, too
    level: str = "full"  # "quick" leaves out the checks that run the model

    def __post_init__(self) -> None:
        unknown = [name for name in self.types if name not in TYPES]
        if unknown or not self.types:
            raise PetoolError(f"unknown GGUF type: {', '.join(unknown) or 'none given'}", f"one of: {', '.join(TYPES)}")


def export_run(run: Path, options: Options, report: Report = silent) -> dict[str, Any]:
    """Write the export folder: model.<type>.gguf, Modelfile, README.md, perhaps lora.gguf, and export.json, which goes
    first and comes last; return its content. A check that fails raises PetoolError; no new file is left then."""
    library_places()
    quiet_threads()  # before torch loads OpenMP
    with locked(run / "export"):
        return _export(run, options, report)


def _export(run: Path, options: Options, report: Report) -> dict[str, Any]:
    started, folder, manifest = time.time(), run / "export", read_manifest(run)
    recipe = load_recipe(str(run / "recipe.toml"))[1]
    base = base_of_run(manifest["base"], lambda text: report(text, 0, 0, ""))
    source = _trained_source(run, base, recipe, options, report)
    merge_base = None if source.adapter is None else "nf4" if source.nf4 else "bf16"
    template = exported_template(chat_template(base.directory), manifest["prompt_style"])
    source = replace(source, template=template, keys=_own_keys(manifest, merge_base))
    if options.imatrix:
        source = replace(source, importance=importance(source, recipe, report))
    tried_on = trial(base, recipe, manifest["data"].get("wording", {}), report)
    targets = {name: folder / f"model.{name}.gguf" for name in options.types}
    with written(source, targets, report) as (files, changes), ExitStack() as drafts:
        max_reply = recipe.bench.max_reply_tokens if options.level == "full" else None
        figures = check_files(files, source, tried_on, max_reply, report)
        paths = {target.name: files[name] for name, target in targets.items()}
        if options.lora and source.adapter is not None:
            paths["lora.gguf"] = drafts.enter_context(draft(folder / "lora.gguf"))
            write_lora(paths["lora.gguf"], source, source.adapter)
        trained = TRAINED[recipe.train.method]
        total = sum(changes.values(), Change())
        document = {
            **{"base": base.name, "method": recipe.train.method, "tensors": len(changes)},
            "changed_tensors": sum(change.changed for change in changes.values()),
            "relative_change": (total.delta / total.base) ** 0.5,
            f"{trained}_sha256": files_sha256(sorted((run / trained).glob("*.safetensors"))),
            "files": [  # such as model.q4_k_m.gguf, lora.gguf
                {"type": name.split(".")[-2], "file": name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}
                for name, path in paths.items()
            ],
            **{"checks": figures, "checked_on": tried_on[2], "versions": versions()},
            **({"merge_base": merge_base} if merge_base else {}),
            "imatrix": options.imatrix,
            "seconds": round(time.time() - started, 2),
        }
        model = modelfile(next(iter(paths)), base.directory, recipe.model.max_tokens)
        texts = {"Modelfile": model, "README.md": card(run, base, manifest, document)}
        (folder / "export.json").unlink(missing_ok=True)
    for name, text in texts.items():
        write_text(folder / name, text)
    write_json(folder / "export.json", document)
    return document


def _trained_source(run: Path, base: Base, recipe: Recipe, options: Options, report: Report) -> Source:
    """The run's own model, or its adapter on the weights that it learned beside; raises PetoolError if not whole."""
    folder = run / TRAINED[recipe.train.method]
    if recipe.train.method == "full":
        if options.lora or options.merge_base:
            what = "--lora-gguf" if options.lora else "--merge-base"
            told = f"{what} needs an adapter, and in this run all weights learned"
            raise PetoolError(told, f"leave {what} out: the model is exported as it is")
        return load_whole(base, folder)
    adapter = load_adapter(folder)
    if adapter.config.base not in ("", base.name):
        what = f"the adapter was trained on {adapter.config.base}, the run names {base.name}"
        raise PetoolError(what, "the adapter belongs to another base model")
    return load_source(base, adapter, (options.merge_base or recipe.model.precision) == "nf4", report)


def _own_keys(manifest: Mapping[str, Any], merge_base: str | None) -> dict[str, str]:
    """Keys that only petool-lite's files have; inference reads from them how prompts looked in training."""
    wording = manifest["data"].get("wording")
    found = {key: manifest.get(key) for key in ("prompt_style", "prompt_layout", "setting", "temperature")}
    found |= {"wording": json.dumps(wording) if wording else None, "merge_base": merge_base}
    found |= {"version": versions().get("petool-lite", "unknown")}
    return {f"petool_lite.{key}": str(value) for key, value in found.items() if value is not None}


def export_base(name: str, type_name: str, report: Report = silent) -> Path:
    """The untouched base in GGUF type `type_name`, made once and cached: what a tuned file is compared with."""
    quiet_threads()
    base = resolve_base(name, lambda text: report(text, 0, 0, ""))
    # names, sizes and times of the files: hashing gigabytes would cost a minute
    files = sorted(base.directory.glob("*.safetensors"))
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    identity = hashlib.sha256(repr((str(base.directory), facts)).encode()).hexdigest()
    target = cache_place("exports", f"{base.directory.name}-{identity[:16]}.{type_name}.gguf")
    if not target.is_file():
        write_targets(load_source(base, report=report), {type_name: target}, report)
    return target


@contextmanager
def written(source: Source, targets: Mapping[str, Path], report: Report) -> Iterator[tuple[dict[str, Path], Changes]]:
    """Write a GGUF file for each type in `targets`, all in one folder that the caller holds; yield where they lie, and
    how each trained tensor changed. They get their names where the block ends. Raises PetoolError if none changed."""
    with ExitStack() as drafts:
        paths = {name: drafts.enter_context(draft(target)) for name, target in targets.items()}
        changes = write_files(source, paths, report)
        still = [name for name, change in changes.items() if not change.changed]
        if source.before and len(still) == len(changes):
            raise PetoolError("training changed no weight of the base", "the model is untrained; train the run again")
        if source.adapter is not None and still:
            moved = len(changes) - len(still)
            what = f"{moved} tensors changed, but the adapter has {len(changes)} modules: {still[0]} did not"
            raise PetoolError(what, "the adapter is untrained, or belongs to another base")
        yield paths, changes


def write_targets(source: Source, targets: Mapping[str, Path], report: Report = silent) -> Changes:
    """Write a GGUF file for each type in `targets`, unchecked; return how each trained tensor changed."""
    with locked(next(iter(targets.values())).parent), written(source, targets, report) as (_, changes):
        return changes
