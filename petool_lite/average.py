"""`runs average`: a model whose weights are the mean of several runs' (model soups, Wortsman et al. 2022)."""

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from petool_lite.errors import PetoolError, in_words
from petool_lite.runs import TRAINED, create_run, draft, read_manifest, write_json

_SAME = ("method", "base", "prompt_style", "prompt_layout", "setting")  # of a manifest; of the base its name


def average(runs: Sequence[Path]) -> Path:
    """A new run of `runs`, which trained all weights of one base for one prompt: each number is the mean of theirs in
    float32, rounded once to bfloat16. Raises PetoolError for fewer than two, where they differ, or for a full disk."""
    manifests = [read_manifest(run) for run in runs]
    if len({run.resolve() for run in runs}) < max(2, len(runs)):
        raise PetoolError("a mean takes two runs or more, each once", "train again with --set train.seed=1")
    for run, manifest in zip(runs, manifests, strict=True):
        for key in _SAME:
            mine, first = (found["base"]["name"] if key == "base" else found[key] for found in (manifest, manifests[0]))
            if mine != first:
                raise PetoolError(f"{key} is {mine} in {run} and {first} in {runs[0]}", "give runs of one recipe")
    if manifests[0]["method"] != "full":
        raise PetoolError("adapters have no mean: each is a product of two", "train with --set train.method=full")
    from safetensors import SafetensorError  # also what a full disk raises

    made, name = create_run(f"{manifests[0]['name']}-mean"), TRAINED["full"]
    full = f"cannot write to {made}", "make room, try again"
    try:
        with in_words(*full, OSError, SafetensorError), draft(made) as folder:
            shutil.copytree(runs[0] / name, folder / name, ignore=shutil.ignore_patterns("*.safetensors"))
            shutil.copy(runs[0] / "recipe.toml", folder)
            for file in (runs[0] / name).glob("*.safetensors"):
                _write_mean(folder / name / file.name, [run / name / file.name for run in runs])
            write_json(folder / "manifest.json", manifests[0] | {"averaged": [str(run) for run in runs]})
    except BaseException:
        shutil.rmtree(made)
        raise
    return made


def _write_mean(target: Path, files: Sequence[Path]) -> None:
    import torch
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    other = "the runs' weights have other names or shapes", "give runs of one recipe"
    with in_words(*other, SafetensorError, FileNotFoundError, RuntimeError), ExitStack() as stack:
        parts = [stack.enter_context(safe_open(file, "pt")) for file in files]
        names = parts[0].keys()
        if any({*part.keys()} != {*names} for part in parts):
            raise PetoolError(*other)
        pairs = {name: [part.get_tensor(name) for part in parts] for name in names}
        means = {name: torch.stack(pair).float().mean(0).to(pair[0].dtype) for name, pair in pairs.items()}
    save_file(means, target, {"format": "pt"})
