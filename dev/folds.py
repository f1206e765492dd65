"""Accuracy on functions that training never saw: split, train and bench every fold, from entries to a table.

    python dev/folds.py DATA [--recipe smol-rating] [--folds 5] [--only 0,3] [--seeds 0,1,2] [--copies 24]
        [--change "LABEL: KEY=VALUE KEY=VALUE"]... [--setting preferred]... [--export q4_k_m] [--out DIR] [--seconds N]

Each --change is the recipe with these settings, in every fold and with every seed, {fold} and {seed} in a value
replaced. A fold's entries take the place of the recipe's; those that it simulates from corpora/ stay. What is done is
kept in DIR, in a folder for each recipe, --set, DATA, --folds, --copies: the same command goes on, a stopped training
from its checkpoint; so does one with other changes, seeds, folds of --only or prompts. Runs side by side share the GPU
best through CUDA's multi-process service (nvidia-cuda-mps-control -d). The table goes to stderr, JSON to stdout.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petool_lite.bench.report import accuracies_cells
from petool_lite.bench.results import Results, load_folder
from petool_lite.bench.run import commit, machine
from petool_lite.bench.score import METRIC_WORDS, accuracies
from petool_lite.console import print_json, print_table, progress, say
from petool_lite.data import SETTINGS
from petool_lite.data.files import source_sha256, write_folds
from petool_lite.errors import PetoolError
from petool_lite.inference.gpu import gpu_available
from petool_lite.recipe import ALL, flat, load_recipe
from petool_lite.runs import is_complete, versions, write_json

Study = argparse.Namespace  # the options, and `scored`: the prompts that are scored in; `until` and `gpu`


@dataclass(frozen=True)
class One:
    """One run of a study: a change (label and settings), a seed and a fold."""

    label: str
    settings: tuple[str, ...]
    seed: int
    fold: int

    @property
    def folder(self) -> str:
        """The name of its folder."""
        label = "".join(letter if letter.isalnum() else "-" for letter in self.label)
        return f"{label}-{digest(self.settings)}-seed{self.seed}-fold{self.fold}"


def change(text: str) -> tuple[str, tuple[str, ...]]:
    """Label and settings of `LABEL: KEY=VALUE KEY=VALUE`."""
    label, _, rest = text.partition(":")
    if not rest.split() or not all("=" in item for item in rest.split()):
        raise argparse.ArgumentTypeError('expected LABEL: KEY=VALUE, such as "r 16: lora.r=16"')
    return label.strip(), tuple(rest.split())


def digest(value: Any) -> str:
    """Eight letters that stand for a value of JSON."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:8]


def train_and_bench(study: Study, one: One) -> bool:
    """Whether the run and all its results are there in the end; what was there already is kept, a training goes on from
    its checkpoint, and where that fails none starts anew."""
    folder, data = study.out / one.folder, study.out / "folds" / f"fold{one.fold}"

    def done(name: str, *words: object) -> bool:
        """Run petool-lite with its talk in a log file; a training that must stop saves what it has."""
        if study.until <= time.time():
            return False
        with (folder / f"{name}.log").open("w") as log:
            line = ["timeout", "-k", 30, study.until - time.time(), sys.executable, "-m", "petool_lite", *words]
            own = {"stdout": log, "stderr": log, "env": os.environ | {"PETOOL_LITE_RUNS": str(folder / "run")}}
            code = subprocess.run([*map(str, line)], **own).returncode
        if code:
            say(f"{folder.name}: {name} {'ran out of time' if code == 124 else 'failed'}, see {log.name}")
        return code == 0

    folder.mkdir(parents=True, exist_ok=True)
    if not any(map(is_complete, folder.glob("run/*"))):
        saved = sorted(folder.glob("run/*/checkpoints/checkpoint-*/trainer_state.json"))
        simulated, both, _ = load_recipe(study.recipe)[1].data.train.partition(" + ")
        train = f"{simulated} + {study.copies} * {data}-train.jsonl" if both else f"{data}-train.jsonl"
        given = (f"data.train={train}", f"train.seed={one.seed}", *study.settings, *one.settings)
        filled = (item.replace("{fold}", str(one.fold)).replace("{seed}", str(one.seed)) for item in given)
        line = ["--resume", saved[-1].parents[2]] if saved else [study.recipe, *(f"--set={item}" for item in filled)]
        if not done("resume" if saved else "train", "train", *line):
            return False
    run = next(filter(is_complete, folder.glob("run/*")))
    kind = study.export or ("" if study.gpu else "q4_k_m")
    export, made = ("export", "--run", run, "--gguf", kind, "--verify", "quick"), run / "export" / f"model.{kind}.gguf"
    if kind and not made.is_file() and not done("export", *export):
        return False
    variants = ",".join(["rule-words", *["tuned-gpu"] * study.gpu, *[f"tuned-{kind}"] * bool(kind)])
    bench = ("bench", "--run", run, "--variants", variants, "--data", f"{data}-test.jsonl", "--setting")
    return all([done(f"bench-{name}", *bench, name, "--out", folder / f"bench-{name}") for name in study.scored])


def run_all(study: Study, runs: Sequence[One]) -> int:
    """Train and bench every run, some at once, each on cores of its own; how many are whole."""
    whole, started, slots, cores = 0, time.time(), iter(range(study.jobs)), sorted(os.sched_getaffinity(0))

    def begin() -> None:
        os.sched_setaffinity(0, cores[next(slots) :: study.jobs] or cores)  # this thread's, and so its processes'

    with progress() as report, ThreadPoolExecutor(study.jobs, initializer=begin) as pool:
        work = {pool.submit(train_and_bench, study, one): one for one in runs}
        for done, future in enumerate(as_completed(work), 1):
            whole += future.result()
            report("folds", done, len(runs), f"{work[future].folder} after {time.time() - started:.0f} s")
    return whole


def collect(study: Study, runs: Sequence[One]) -> list[dict[str, Any]]:
    """A line for each change, prompt and variant, from the results files that are whole: scores over all its runs, with
    intervals by function, and of each run."""
    found: dict[tuple[str, str, str], list[tuple[One, Results]]] = {}
    for one in runs:
        for setting in study.scored:
            for item in load_folder(study.out / one.folder / f"bench-{setting}"):
                if item.meta["complete"]:
                    found.setdefault((one.label, setting, item.name), []).append((one, item))
    lines = []
    for (label, setting, variant), items in found.items():
        scores = [(one, list(item.by_entry.values())) for one, item in items]
        every = [score for _, own in scores for score in own]
        by_run = [{"seed": one.seed, "fold": one.fold, "n": len(own), **accuracies(own)} for one, own in scores]
        seconds = round(sum(item.meta["seconds"] for _, item in items), 1)
        lines.append({
            "label": label, "setting": setting, "variant": variant, "runs": len(items), "n": len(every),
            "functions": len({score.function for score in every}), **accuracies(every), "by_run": by_run,
            "seconds": seconds,
        })  # fmt: skip
    return lines


def options(arguments: Sequence[str]) -> Study:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--recipe", default="smol-rating")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--only", default="", help="these folds only, such as 0,3")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--copies", type=int, default=24, help="of a fold's entries, as recipes say")
    parser.add_argument("--change", action="append", default=[], metavar="LABEL: KEY=VALUE ...", type=change)
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE")
    parser.add_argument("--setting", action="append", default=[], help="prompt to score in; the recipe's own")
    parser.add_argument("--export", default="", metavar="TYPE", help="also score this GGUF type on the CPU")
    parser.add_argument("--jobs", type=int, default=5, help="runs side by side; 3.7 GiB of GPU memory each")
    parser.add_argument("--out", type=Path, default=Path("runs/folds"))
    parser.add_argument("--seconds", type=float, default=86400.0, help="stop then, and report what is whole")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Run the study, print the table and the JSON line; exit 1 where a run is missing."""
    study, started = options(arguments), time.time()
    try:
        changes, recipe = dict(study.change) or {"as it is": ()}, load_recipe(study.recipe, study.settings)[1]
        usual = SETTINGS if recipe.data.setting == ALL else (recipe.data.setting,)
        study.scored, study.until, study.gpu = study.setting or usual, started + study.seconds, gpu_available()
        shared = {"folds": study.folds, "copies": study.copies, "sha256": source_sha256(study.data), **flat(recipe)}
        study.out = study.out.absolute() / f"{Path(study.recipe).stem}-{digest(shared)}"
        write_json(study.out / "study.json", shared)
        only = study.only or ",".join(map(str, range(study.folds)))
        seeds, only = (tuple(map(int, text.split(","))) for text in (study.seeds, only))
        runs = [One(*each, seed, fold) for each in changes.items() for seed in seeds for fold in only]
        write_folds(study.data, study.scored[0], study.folds, 0, study.out / "folds")
        whole, lines = run_all(study, runs), collect(study, runs)
    except PetoolError as error:
        sys.exit(f"error: {error.message}\nhint: {error.hint}")
    document = {
        "benchmark": "folds", "date": time.strftime("%Y-%m-%d"), "machine": machine(gpu=True), "commit": commit(),
        "versions": versions(), "recipe": study.recipe, "settings": study.settings, "changes": changes, "runs": whole,
        "wanted": len(runs), "seconds": round(time.time() - started, 1), "lines": lines,
    }  # fmt: skip
    write_json(study.out / "folds.json", document)
    columns = ["recipe", "prompt", "variant", "n", "functions", *(f"{word}, %" for word in METRIC_WORDS)]
    rows = [[*(str(line[key]) for key in ("label", "setting", "variant", "n", "functions")), *accuracies_cells(line)]
            for line in lines]  # fmt: skip
    with redirect_stdout(sys.stderr):
        caption = f"{whole} of {len(runs)} runs; 95 % intervals by function; {document['seconds']} s in all"
        print_table(f"{study.recipe}, functions that training never saw", columns, rows, caption)
    print_json(document)
    sys.exit(whole < len(runs))


if __name__ == "__main__":
    main(sys.argv[1:])
