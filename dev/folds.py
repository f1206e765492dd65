"""Accuracy on functions that training never saw: split, train and bench every fold, from entries to a table.

    python dev/folds.py DATA [--recipe smol-rating] [--folds 5] [--only 0,3] [--seeds 0,1,2] [--jobs 15]
        [--change "LABEL: KEY=VALUE KEY=VALUE"]... [--setting preferred]... [--export q4_k_m] [--out DIR] [--seconds N]

Each --change is the recipe with these settings, in every fold and with every seed; without one the recipe as it is.
{fold} and {seed} in a value are replaced. Runs side by side share the GPU through CUDA's multi-process service and have
cores of their own. What is done is kept in DIR: the same command goes on, a stopped training from its checkpoint; so
does one with other changes, seeds, folds of --only or prompts, but not with another recipe, --set, DATA or --folds
(DIR/study.json). The table goes to stderr, JSON to stdout.
"""

import argparse
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from petool_lite.bench.machine import commit, machine
from petool_lite.bench.results import Results, load_folder
from petool_lite.bench.score import METRICS, percent, score_row

from petool_lite.console import Report, print_json, print_table, progress, say
from petool_lite.data.entries import SETTINGS
from petool_lite.data.files import load_dataset, source_sha256, write_folds
from petool_lite.data.splits import folds, function_groups
from petool_lite.errors import PetoolError
from petool_lite.inference.gpu import gpu_available
from petool_lite.recipe import ALL, flat, load_recipe
from petool_lite.runs import is_complete, versions, write_json

_MPS = "nvidia-cuda-mps-control"
_TO_SAVE = 30.0  # seconds
_TO_QUIT = 20.0
_ELSEWHERE = "choose another --out"


@dataclass(frozen=True)
class Change:
    """The recipe with some settings changed, under a name."""

    label: str
    settings: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        """The label as the names of its runs' folders have it."""
        return "".join(letter if letter.isalnum() else "-" for letter in self.label)


@dataclass(frozen=True)
class One:
    """One run of a study: a change, a seed and a fold."""

    change: Change
    seed: int
    fold: int


@dataclass(frozen=True)
class Study:
    """What is trained and scored where; `settings` go to every run, `scored` are the prompts it is scored in.

    Whether there is a `gpu` is asked once, before CUDA's multi-process service starts: who asks later is its client.
    """

    data: str
    recipe: str
    out: Path
    changes: tuple[Change, ...]
    folds: int
    only: tuple[int, ...]
    seeds: tuple[int, ...]
    settings: tuple[str, ...]
    scored: tuple[str, ...]
    export: str
    jobs: int
    until: float
    gpu: bool

    def runs(self, change: Change) -> list[One]:
        """The runs of a change: every seed on every fold."""
        return [One(change, seed, fold) for seed in self.seeds for fold in self.only]

    def folder(self, one: One) -> Path:
        """Where a run and its results lie."""
        return self.out / f"{one.change.folder}-seed{one.seed}-fold{one.fold}"

    def fold_file(self, fold: int, name: str) -> Path:
        """Where the entries of a fold lie; `name` is train or test."""
        return self.out / "folds" / f"fold{fold}-{name}.jsonl"

    def settings_of(self, one: One) -> list[str]:
        """The settings of one run, a later one of the same key deciding."""
        own = [f"data.train={self.fold_file(one.fold, 'train')}", f"train.seed={one.seed}"]
        given = [*self.settings, *one.change.settings]
        return own + [item.replace("{fold}", str(one.fold)).replace("{seed}", str(one.seed)) for item in given]


def parse_change(text: str) -> Change:
    """A change from `LABEL: KEY=VALUE KEY=VALUE`."""
    label, colon, rest = text.partition(":")
    settings = tuple(rest.split())
    if not colon or not settings or not all("=" in item for item in settings):
        raise PetoolError(f"--change {text}: expected LABEL: KEY=VALUE", 'such as --change "r 16: lora.r=16"')
    return Change(label.strip(), settings)


def keep_study(study: Study) -> None:
    """Keep in study.json what all runs of the folder share, and each change; a run is known by its folder's name alone.

    Raises PetoolError where runs of something else lie there.
    """
    path = study.out / "study.json"
    shared = {"folds": study.folds, "sha256 of DATA": source_sha256(study.data)[:16]}
    shared |= flat(load_recipe(study.recipe, study.settings)[1])
    changes = {change.folder: list(change.settings) for change in study.changes}
    if any(study.out.glob("*-seed*-fold*/*/*")):  # a log alone, of what failed, is no run
        if not path.is_file():
            raise PetoolError(f"{study.out} has runs but no study.json: nobody can tell what made them", _ELSEWHERE)
        old = json.loads(path.read_text())
        wrong = [f"{key} was {old['shared'].get(key)}, is {shared.get(key)}" for key in old["shared"] | shared
                 if old["shared"].get(key) != shared.get(key)]  # fmt: skip
        wrong += [f"{folder} was {old['changes'][folder]}, is {changes[folder]}" for folder in changes
                  if old["changes"].get(folder, changes[folder]) != changes[folder]]  # fmt: skip
        if wrong:
            raise PetoolError(f"{study.out} has runs of another study: {'; '.join(wrong[:4])}", _ELSEWHERE)
        changes = old["changes"] | changes
    write_json(path, {"shared": shared, "changes": changes})


def write_split(study: Study) -> dict[tuple[int, int], int]:
    """Write each fold's files; the group of each entry's function by fold and place in its test file.

    A fold shares no function with its training.
    """
    write_folds(study.data, study.scored[0], study.folds, 0, study.out / "folds")
    entries = load_dataset(study.data, study.scored[0]).entries
    groups, parts = function_groups(entries), folds(entries, study.folds, 0)
    return {(fold, place): groups[index] for fold, part in enumerate(parts) for place, index in enumerate(sorted(part))}


def train_and_bench(study: Study, one: One) -> bool:
    """Whether the run and all its results are there in the end; what was there already is kept."""
    folder = study.folder(one)
    folder.mkdir(parents=True, exist_ok=True)
    if _run_of(folder) is None and not _train(study, one):
        return False
    run = _run_of(folder)
    if run is None:
        return False
    variants = ["rule-words", "tuned-gpu"] if study.gpu else ["rule-words"]
    if study.export or not study.gpu:
        kind = study.export or "q4_k_m"
        variants.append(f"tuned-{kind}")
        file = run / "export" / f"model.{kind}.gguf"
        exported = ("export", "--run", str(run), "--gguf", kind, "--verify", "quick")
        if not file.is_file() and not _command(study, folder, "export", *exported):
            return False
    line = ["bench", "--run", str(run), "--variants", ",".join(variants)]
    line += ["--data", str(study.fold_file(one.fold, "test"))]
    done = [
        _command(study, folder, f"bench-{name}", *line, "--setting", name, "--out", str(folder / f"bench-{name}"))
        for name in study.scored
    ]
    return all(done)


def _train(study: Study, one: One) -> bool:
    """Train a run, or go on from the checkpoint of one that was stopped; where that fails, none starts anew."""
    folder = study.folder(one)
    saved = sorted(folder.glob("run/*/checkpoints/checkpoint-*/trainer_state.json"))
    if saved:
        return _command(study, folder, "resume", "train", "--resume", str(saved[-1].parents[2]))
    changes = [part for item in study.settings_of(one) for part in ("--set", item)]
    return _command(study, folder, "train", "train", study.recipe, *changes)


def _run_of(folder: Path) -> Path | None:
    return next((path for path in sorted(folder.glob("run/*")) if is_complete(path)), None)


def _command(study: Study, folder: Path, name: str, *line: str) -> bool:
    """Run petool-lite with its talk in a log file; what fails is told."""
    left = study.until - time.time()
    if left <= 0:
        return False
    environment = os.environ | {"PETOOL_LITE_RUNS": str(folder / "run")}
    with (folder / f"{name}.log").open("w") as log:
        line = (sys.executable, "-m", "petool_lite", *line)
        with subprocess.Popen(line, stdout=log, stderr=log, env=environment) as process:
            try:
                code = process.wait(left)
            except subprocess.TimeoutExpired:
                process.terminate()  # a training that is asked to stop saves what it has
                try:
                    process.wait(_TO_SAVE)
                except subprocess.TimeoutExpired:
                    process.kill()
                say(f"{folder.name}: {name} ran out of time")
                return False
    if code:
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else "failed"
        say(f"{folder.name}: {name} {how}, see {log.name}")
    return code == 0


@contextmanager
def shared_gpu(study: Study) -> Iterator[None]:
    """Let processes compute on the GPU at once, where CUDA's multi-process service is there and nobody started it."""
    if study.jobs == 1 or not study.gpu or shutil.which(_MPS) is None or "CUDA_MPS_PIPE_DIRECTORY" in os.environ:
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        places = {name: folder for name in ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY")}
        if subprocess.run([_MPS, "-d"], env=os.environ | places).returncode:
            say("CUDA's multi-process service does not start; the runs take turns on the GPU")
            yield
            return
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ.update(places)
        if seen:  # a client counts the devices that the service was given
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(len(seen.split(",")))))
        try:
            yield
        finally:
            try:  # it waits for its clients; what one of ours left behind must not hold us
                subprocess.run([_MPS], input="quit\n", text=True, stdout=subprocess.DEVNULL, timeout=_TO_QUIT)
            except subprocess.TimeoutExpired:
                say(f"CUDA's multi-process service did not end in {_TO_QUIT:.0f} s and is left alone")
            for name in places:
                del os.environ[name]
            if seen:
                os.environ["CUDA_VISIBLE_DEVICES"] = seen


def run_all(study: Study, report: Report) -> int:
    """Train and bench every run of the study, `jobs` at once; how many are whole."""
    runs = [one for change in study.changes for one in study.runs(change)]
    done, whole, started = 0, 0, time.time()
    report("folds", 0, len(runs), "")
    with shared_gpu(study), ThreadPoolExecutor(study.jobs, initializer=_own_cores(study.jobs)) as pool:
        work = {pool.submit(train_and_bench, study, one): one for one in runs}
        for future in as_completed(work):
            done, whole = done + 1, whole + future.result()
            report("folds", done, len(runs), f"{study.folder(work[future]).name} after {time.time() - started:.0f} s")
    return whole


def _own_cores(jobs: int) -> Callable[[], None]:
    """What gives each thread of a pool, and so the processes that it starts, an equal share of the cores."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    slots: queue.SimpleQueue[int] = queue.SimpleQueue()
    for slot in range(jobs):
        slots.put(slot)

    def begin() -> None:
        own = cores[slots.get() :: jobs]
        if own:
            os.sched_setaffinity(0, own)

    return begin


def collect(study: Study, groups: Mapping[tuple[int, int], int]) -> list[dict[str, Any]]:
    """A line for each change, prompt and variant, from the results files that are whole."""
    lines: dict[tuple[str, str, str], list[tuple[One, Results]]] = {}
    for change in study.changes:
        for one in study.runs(change):
            for setting in study.scored:
                folder = study.folder(one) / f"bench-{setting}"
                for item in load_folder(folder):
                    if item.meta["complete"]:
                        lines.setdefault((change.label, setting, item.name), []).append((one, item))
    return [_line(*key, found, groups) for key, found in lines.items()]


def _line(
    label: str, setting: str, variant: str, found: Sequence[tuple[One, Results]], groups: Mapping[tuple[int, int], int]
) -> dict[str, Any]:
    """Scores over all runs of a line, by the published scorer; intervals draw functions, not entries."""
    scored = [(one, [(groups[one.fold, row["index"]], score_row(row)) for row in item.rows]) for one, item in found]
    every = [pair for _, pairs in scored for pair in pairs]
    line: dict[str, Any] = {"label": label, "setting": setting, "variant": variant, "runs": len(found)}
    line |= {"n": len(every), "functions": len({group for group, _ in every})}
    for metric in METRICS:
        right = [(group, score.right(metric)) for group, score in every]
        line[metric] = percent(sum(flag for _, flag in right), len(right))
        line[f"{metric}_ci"] = list(grouped_interval(right))
    shares = [{metric: percent(sum(score.right(metric) for _, score in pairs), len(pairs)) for metric in METRICS}
              for _, pairs in scored]  # fmt: skip
    line["by_run"] = [{"seed": one.seed, "fold": one.fold, "n": len(pairs), **share}
                      for (one, pairs), share in zip(scored, shares, strict=True)]  # fmt: skip
    line["seconds"] = round(sum(item.meta["seconds"] for _, item in found), 1)
    return line


def grouped_interval(right: Sequence[tuple[Hashable, bool]], draws: int = 2000) -> tuple[float, float]:
    """95 % interval of a proportion whose observations come in groups that stand or fall together, in percent.

    The percentile interval of a bootstrap that draws whole groups (the cluster bootstrap, Davison & Hinkley 1997, 3.8);
    `right` are pairs of an observation's group and whether it is one. The same draws every time.
    """
    counts: dict[Hashable, list[int]] = {}
    for group, flag in right:
        held = counts.setdefault(group, [0, 0])
        held[0] += flag
        held[1] += 1
    if not counts:
        return 0.0, 100.0
    rng, pairs = Random(0), list(counts.values())
    shares = []
    for _ in range(draws):
        drawn = rng.choices(pairs, k=len(pairs))
        shares.append(100 * sum(one[0] for one in drawn) / sum(one[1] for one in drawn))
    shares.sort()
    return round(shares[round(0.025 * (draws - 1))], 4), round(shares[round(0.975 * (draws - 1))], 4)


_COLUMNS = ["recipe", "prompt", "variant", "n", "functions", "tool % (95 %)", "parameters %", "both %"]


def _cells(line: Mapping[str, Any]) -> list[str]:
    figures = (
        f"{line[metric]:.1f} ({line[f'{metric}_ci'][0]:.0f}-{line[f'{metric}_ci'][1]:.0f})" for metric in METRICS
    )
    return [line["label"], line["setting"], line["variant"], str(line["n"]), str(line["functions"]), *figures]


def study_of(arguments: Sequence[str]) -> Study:
    """The study that a command line asks for; raises PetoolError for what cannot be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--recipe", default="smol-rating")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--only", default="", help="these folds only, such as 0,3")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--change", action="append", default=[], metavar="LABEL: KEY=VALUE ...")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE")
    parser.add_argument("--setting", action="append", default=[], help="prompt to score in; the recipe's own")
    parser.add_argument("--export", default="", metavar="TYPE", help="also score this GGUF type on the CPU")
    parser.add_argument("--jobs", type=int, default=5, help="runs side by side; 3.7 GiB of GPU memory each")
    parser.add_argument("--out", type=Path, default=Path("runs/folds"))
    parser.add_argument("--seconds", type=float, default=86400.0, help="stop then, and report what is whole")
    options = parser.parse_args(arguments)
    changes = tuple(dict.fromkeys(map(parse_change, options.change))) or (Change("as it is"),)
    setting = load_recipe(options.recipe, options.settings)[1].data.setting
    scored = tuple(options.setting) or (SETTINGS if setting == ALL else (setting,))
    only = options.only or ",".join(map(str, range(options.folds)))
    numbers = [tuple(map(int, text.split(","))) for text in (only, options.seeds)]
    until = time.time() + options.seconds
    return Study(
        options.data, options.recipe, options.out.absolute(), changes, options.folds, *numbers,
        tuple(options.settings), scored, options.export, options.jobs, until, gpu_available(),
    )  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    """Run the study, print the table and the JSON line; exit 1 where a run is missing."""
    started = time.time()
    try:
        study = study_of(arguments)
        keep_study(study)
        groups = write_split(study)
        with progress() as report:
            whole = run_all(study, report)
        lines = collect(study, groups)
    except PetoolError as error:
        sys.exit(f"error: {error.message}\nhint: {error.hint}")
    wanted = len(study.changes) * len(study.seeds) * len(study.only)
    with redirect_stdout(sys.stderr):
        caption = f"{whole} of {wanted} runs; intervals draw functions; {time.time() - started:.0f} s in all"
        print_table(f"{study.recipe}, functions that training never saw", _COLUMNS, list(map(_cells, lines)), caption)
    document = {
        "benchmark": "folds", "date": time.strftime("%Y-%m-%d"), "machine": machine(gpu=True), "commit": commit(),
        "versions": versions(), "recipe": study.recipe, "settings": study.settings,
        "changes": {change.label: change.settings for change in study.changes}, "runs": whole, "wanted": wanted,
        "seconds": round(time.time() - started, 1), "lines": lines,
    }  # fmt: skip
    write_json(study.out / "folds.json", document)
    print_json(document)
    sys.exit(whole < wanted)


if __name__ == "__main__":
    main(sys.argv[1:])
