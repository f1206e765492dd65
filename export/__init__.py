"""`export`: adapter + base, or a model of its own -> GGUF files in one pass over the weights, then checked.

No network, no compiler, no checkout of llama.cpp, no 16-bit copy of the model: weights are quantized as they are
merged, by the C functions inside llama-cpp-python.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from petool_lite.export.card import card
from petool_lite.export.imatrix import importance
from petool_lite.export.lora import write_lora
from petool_lite.export.merge import Adapter, check_fit, load_adapter
from petool_lite.export.modelfile import modelfile
from petool_lite.export.stream import Change, Source, bytes_needed, check_disk, plan, write_files
from petool_lite.export.tensor_types import TYPES
from petool_lite.export.verify import (
    LEVELS,
    Trial,
    agreement,
    prepare_trial,
    reference_logits,
    run_file,
    shortfalls,
    verify_answers,
    verify_ids,
)
from petool_lite.export.weights import find_tensors

from petool_lite.console import Report, silent
from petool_lite.errors import PetoolError
from petool_lite.inference.settings import default_threads
from petool_lite.models import Base, cache_root, file_sha256, resolve_base, weights_sha256
from petool_lite.recipe import Recipe, load_recipe
from petool_lite.runs import TRAINED, draft, locked, read_manifest, versions, write_json, write_text

__all__ = ["LEVELS", "MERGE_BASES", "TYPES", "Options", "export_base", "export_run", "load_source", "write_targets"]

MERGE_BASES = ("bf16", "nf4")


@dataclass(frozen=True)
class Options:
    """What to export: GGUF types, which base weights to merge into (None: bf16), importance matrix, LoRA file, how
    much to check."""

    types: tuple[str, ...]
    merge_base: str | None = None
    imatrix: bool = False
    lora: bool = False
    level: str = "full"


def export_run(run: Path, options: Options, report: Report = silent) -> dict[str, Any]:
    """Write the export folder: model.<type>.gguf, Modelfile, README.md, export.json; return the content of the last.

    With `options.lora` also lora.gguf, with `options.imatrix` also imatrix.gguf. export.json goes first and comes last:
    while it is there, it tells of the files beside it. A check that fails raises PetoolError; no new file is left then.
    """
    check_types(list(options.types))
    with _only_writer(run / "export"):
        return _export_run(run, options, report)


def _export_run(run: Path, options: Options, report: Report) -> dict[str, Any]:
    started = time.time()
    manifest = read_manifest(run)
    recipe = load_recipe(str(run / "recipe.toml"))[1]
    base = resolve_base(manifest["base"]["name"], lambda text: report(text, 0, 0, ""))
    source = _trained_source(run, recipe, base, options)
    folder = run / "export"
    if options.imatrix:
        source = replace(source, importance=importance(source, run, recipe, folder / "imatrix.gguf", report))
    trial = prepare_trial(base, recipe, report)
    targets = {name: folder / f"model.{name}.gguf" for name in options.types}
    checks: dict[str, dict[str, Any]] = {}
    wanted: list[Any] = []  # the merged model's own logits, for every file that is compared with it

    def check(paths: dict[str, Path]) -> None:
        checks.update(verify_ids(paths, base, trial, report))
        if options.level == "full":
            wanted.extend(reference_logits(source, trial, report))
            found = verify_answers(paths, wanted, trial, recipe.bench.max_reply_tokens, report)
            checks.update({name: checks[name] | figures for name, figures in found.items()})
        (folder / "export.json").unlink(missing_ok=True)

    seconds = {"start": round(time.time() - started, 2)}
    keys = _own_keys(manifest, None if source.adapter is None else _merge_base(options))
    changes = _write_targets(source, targets, keys, report, check, seconds)
    if options.lora and source.adapter is not None:
        with draft(folder / "lora.gguf") as work:
            write_lora(work, source.adapter, source.config, keys)
            checks["lora"] = _check_lora(work, base, options.types[0], trial, wanted, report) if wanted else {}
    document = _document(run, source, options, changes, targets, checks)
    document["checked_on"] = trial.source
    document["seconds"] = {**seconds, "all": round(time.time() - started, 2)}
    write_text(folder / "Modelfile", modelfile(targets[options.types[0]], base, recipe.model.max_tokens))
    write_text(folder / "README.md", card(run, base, manifest, document))
    write_json(folder / "export.json", document)
    return document


def _trained_source(run: Path, recipe: Recipe, base: Base, options: Options) -> Source:
    """What the run trained: its adapter on the base, or its own model; raises PetoolError if that is not whole."""
    folder = run / TRAINED[recipe.train.method]
    if recipe.train.method == "full":
        if options.lora or options.merge_base:
            what = "--lora-gguf" if options.lora else "--merge-base"
            raise PetoolError(
                f"{what} needs an adapter, and all weights of the run {run.name} learned",
                f"leave {what} out: the model is exported as it is",
            )
        return load_whole(base, folder)
    adapter = load_adapter(folder)
    if adapter.base_name and adapter.base_name != base.name:
        raise PetoolError(
            f"the adapter was trained on {adapter.base_name}, the run names {base.name}",
            "the adapter belongs to another base model",
        )
    return load_source(base, adapter, options.merge_base == "nf4")


def _merge_base(options: Options) -> str:
    return options.merge_base or MERGE_BASES[0]


def _own_keys(manifest: dict[str, Any], merge_base: str | None) -> dict[str, str]:
    """Keys that only petool-lite's files have; inference reads the prompt style from them."""
    return {
        "petool_lite.prompt_style": manifest["prompt_style"],
        **({"petool_lite.prompt_layout": str(manifest["prompt_layout"])} if "prompt_layout" in manifest else {}),
        "petool_lite.setting": manifest["setting"],
        "petool_lite.version": versions().get("petool-lite", "unknown"),
        **({"petool_lite.merge_base": merge_base} if merge_base else {}),
    }


def _document(
    run: Path,
    source: Source,
    options: Options,
    changes: dict[str, Change],
    targets: dict[str, Path],
    checks: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """The content of export.json but for times."""
    paths = [*targets.values(), *([run / "export" / "lora.gguf"] if options.lora else [])]
    delta, weights = (sum(getattr(change, name) for change in changes.values()) for name in ("delta", "base"))
    changed = sum(change.changed for change in changes.values())
    facts: dict[str, Any] = {"method": "full", "tensors": len(changes), "changed_tensors": changed}
    if source.adapter is not None:
        merged = {"adapted_modules": len(changes), "merged_tensors": changed}
        facts = {"method": "lora", "merge_base": _merge_base(options), **merged}
    name = TRAINED[facts["method"]]
    return {
        "base": source.base.name,
        **facts,
        f"{name}_sha256": weights_sha256(run / name),
        "imatrix": "imatrix.gguf" if options.imatrix else None,
        "relative_change": (delta / weights) ** 0.5,
        "files": [
            {
                "type": "lora" if path.name == "lora.gguf" else path.name.split(".")[1],
                "file": path.name,
                "bytes": path.stat().st_size,
                "sha256": file_sha256(path),
            }
            for path in paths
        ],
        "checks": checks,
        "versions": versions(),
    }


def _check_lora(
    path: Path, base: Base, type_name: str, trial: Trial, wanted: list[Any], report: Report
) -> dict[str, Any]:
    """Compare base file + LoRA in llama.cpp with the merged model; raises PetoolError if they differ too much."""
    base_file = export_base(base.name, type_name, report)
    outcomes = run_file(base_file, trial, 0, report, f"base {type_name} + LoRA", path)
    figures = {
        "base_file": base_file.name,
        "against_transformers": agreement(wanted, [outcome.logits for outcome in outcomes]),
    }
    faults = shortfalls(type_name, figures)
    if faults:
        raise PetoolError(f"the LoRA file is not right: {'; '.join(faults)}", "this is a fault of the export")
    return figures


def export_base(base_name: str, type_name: str, report: Report = silent) -> Path:
    """The untouched base in GGUF type `type_name`, made once and cached: what a tuned file is compared with."""
    check_types([type_name])
    base = resolve_base(base_name, lambda text: report(text, 0, 0, ""))
    identity = file_sha256(base.gguf)[:16] if base.gguf else _weights_identity(base.directory)
    target = cache_root() / "exports" / f"{base.directory.name}-{identity}.{type_name}.gguf"
    if not target.is_file():
        write_targets(load_source(base), {type_name: target}, {}, report)
    return target


def _weights_identity(directory: Path) -> str:
    """A key for a weights directory: names, sizes and times of its files (hashing gigabytes would cost a minute)."""
    import hashlib

    facts = sorted(
        (file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in directory.glob("*.safetensors")
    )
    return hashlib.sha256(repr((str(directory), facts)).encode()).hexdigest()[:16]


def check_types(types: list[str]) -> None:
    """Raise PetoolError for a GGUF type that petool-lite does not write."""
    unknown = [name for name in types if name not in TYPES]
    if unknown or not types:
        raise PetoolError(f"unknown GGUF type: {', '.join(unknown) or 'none given'}", f"one of: {', '.join(TYPES)}")


def load_source(base: Base, adapter: Adapter | None = None, nf4: bool = False) -> Source:
    """The base's tensors, checked to be whole and to fit the adapter."""
    config = json.loads((base.directory / "config.json").read_text())
    tensors = find_tensors(base.directory, config)
    if adapter is not None:
        check_fit(adapter, tensors, base.name)
    return Source(base, config, tensors, adapter, nf4=nf4)


def load_whole(base: Base, folder: Path) -> Source:
    """The tensors of a model that training made of `base`, checked to be whole and of its shapes.

    Everything else of a file (tokenizer, name, licence) still comes from the base.
    """
    before = {tensor.name: tensor for tensor in load_source(base).tensors}
    try:
        config = json.loads((folder / "config.json").read_text())
        tensors = find_tensors(folder, config)
    except (OSError, ValueError, KeyError) as error:
        raise PetoolError(f"damaged model: {folder}/config.json ({error})", "train the run again") from error
    except PetoolError as error:
        raise PetoolError(error.message, "train the run again") from error
    odd = [tensor.name for tensor in tensors if tensor.name not in before or before[tensor.name].shape != tensor.shape]
    if odd or len(tensors) != len(before):
        name = odd[0] if odd else "the output head"
        raise PetoolError(f"{folder} is not of the base {base.name}: {name} differs", "give the run its own base")
    return Source(base, config, tensors, before=before)


def write_targets(
    source: Source,
    targets: dict[str, Path],
    extra: dict[str, str],
    report: Report = silent,
    check: Callable[[dict[str, Path]], None] = lambda paths: None,
) -> dict[str, Change]:
    """Write a GGUF file for each type in `targets`, all in one folder; return how each trained tensor changed.

    No file gets its final name before all are written and `check` has passed on them.
    """
    with _only_writer(next(iter(targets.values())).parent):
        return _write_targets(source, targets, extra, report, check, {})


def _write_targets(
    source: Source,
    targets: dict[str, Path],
    extra: dict[str, str],
    report: Report,
    check: Callable[[dict[str, Path]], None],
    seconds: dict[str, float],
) -> dict[str, Change]:
    folder = next(iter(targets.values())).parent
    with ExitStack() as drafts:
        check_disk(folder, bytes_needed(plan(source, list(targets))))
        paths = {name: drafts.enter_context(draft(target)) for name, target in targets.items()}
        started = time.time()
        changes = write_files(source, paths, extra, default_threads(), report)
        written = time.time()
        still = [name for name, change in changes.items() if not change.changed]
        if source.before and len(still) == len(changes):
            raise PetoolError("training changed no weight of the base", "the model is untrained; train the run again")
        if source.adapter is not None and still:
            raise PetoolError(
                f"{len(changes) - len(still)} tensors changed, but the adapter has {len(changes)} modules: "
                f"{still[0]} did not",
                "the adapter is untrained, or belongs to another base",
            )
        check(paths)
        seconds |= {"write": round(written - started, 2), "check": round(time.time() - written, 2)}
    return changes


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Hold the folder against other exports, and remove what a killed one left in it."""
    with locked(folder):
        for leftover in folder.glob(".*.draft"):
            leftover.unlink()
        yield
