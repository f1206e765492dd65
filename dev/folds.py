"""Accuracy on functions that training never saw: split, train and bench every fold, from entries to a table.

    python -m folds DATA [--recipe smol-rating] [--folds 5] [--only 0,3] [--seeds 0,1,2] [--jobs 5]
        [--change "LABEL: KEY=VALUE KEY=VALUE"]... [--setting preferred]... [--export q4_k_m] [--out DIR] [--seconds N]

Each --change is the recipe with these settings, in every fold and with every seed; without one the recipe as it is.
{fold} and {seed} in a value are replaced. Runs side by side share the GPU through CUDA's multi-process service and have
cores of their own. What is done is kept in DIR: the same command goes on, a stopped training from its checkpoint; so
does one with other changes, seeds, folds of --only or prompts, but not with another recipe, --set, DATA or --folds
(DIR/study.json). The table goes to stderr, JSON to stdout.
"""

import argparse
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
from pathlib import Path
from random import Random
from typing import Any

from petool_lite.bench.machine import commit, machine
from petool_lite.bench.results import Results, load_folder, load_results
from petool_lite.bench.score import METRICS, Mark, compare_marks, mark_row, percent
from study import Change, One, Study, fold_file, keep_study, parse_change, settings_of

from petool_lite.console import Report, print_json, print_table, progress, say
from petool_lite.data.files import load_dataset, write_folds
from petool_lite.data.splits import function_groups
from petool_lite.errors import PetoolError
from petool_lite.inference.gpu import gpu_available
from petool_lite.recipe import ALL, load_recipe
from petool_lite.runs import is_complete, versions, write_json

_MPS = "nvidia-cuda-mps-control"
_TO_SAVE = 30.0  # seconds
_TO_QUIT = 20.0


def write_split(study: Study) -> dict[str, int]:
    """Write each fold's files; the group of each entry's function by its id. A fold shares none with its training."""
    write_folds(study.data, study.scored[0], study.folds, 0, study.out / "folds")
    entries = load_dataset(study.data, study.scored[0]).entries
    return {entry.id: group for entry, group in zip(entries, function_groups(entries), strict=True)}


def train_and_bench(study: Study, one: One) -> bool:
    """Whether the run and all its results are there in the end; what was there already is kept."""
    folder = one.folder(study)
    folder.mkdir(parents=True, exist_ok=True)
    if _run_of(folder) is None and not _train(study, one):
        return False
    run = _run_of(folder)
    if run is None:
        return False
    variants = ["rule-likely", "tuned-bf16-gpu"] if study.gpu else ["rule-likely"]
    if study.export or not study.gpu:
        kind = study.export or "q4_k_m"
        variants.append(f"tuned-{kind}")
        file = run / "export" / f"model.{kind}.gguf"
        exported = ("export", "--run", str(run), "--gguf", kind, "--verify", "quick")
        if not file.is_file() and not _command(study, folder, "export", *exported):
            return False
    line = ["bench", "--run", str(run), "--variants", ",".join(variants), "--decoding", "constrained"]
    line += ["--data", str(fold_file(study, one.fold, "test"))]
    done = [
        _command(study, folder, f"bench-{name}", *line, "--setting", name, "--out", str(folder / f"bench-{name}"))
        for name in study.scored
    ]
    return all(done)


def _train(study: Study, one: One) -> bool:
    """Train a run, or go on from the checkpoint of one that was stopped; where that fails, none starts anew."""
    folder = one.folder(study)
    saved = sorted(folder.glob("run/*/checkpoints/checkpoint-*/trainer_state.json"))
    if saved:
        return _command(study, folder, "resume", "train", "--resume", str(saved[-1].parents[2]))
    changes = [part for item in settings_of(study, one) for part in ("--set", item)]
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
                _end(process)
                say(f"{folder.name}: {name} ran out of time")
                return False
    if code:
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else "failed"
        say(f"{folder.name}: {name} {how}, see {log.name}")
    return code == 0


def _end(process: subprocess.Popen[bytes]) -> None:
    """A training that is asked to stop saves what it has, and the same command goes on from there."""
    process.terminate()
    try:
        process.wait(_TO_SAVE)
    except subprocess.TimeoutExpired:
        process.kill()


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
            _quit_service()
            for name in places:
                del os.environ[name]
            if seen:
                os.environ["CUDA_VISIBLE_DEVICES"] = seen


def _quit_service() -> None:
    """It waits for its clients; all of ours have ended by now, and what one of them left behind must not hold us."""
    try:
        subprocess.run([_MPS], input="quit\n", text=True, stdout=subprocess.DEVNULL, timeout=_TO_QUIT)
    except subprocess.TimeoutExpired:
        say(f"CUDA's multi-process service did not end in {_TO_QUIT:.0f} s and is left alone")


def run_all(study: Study, report: Report) -> int:
    """Train and bench every run of the study, `jobs` at once; how many are whole."""
    runs = [one for change in study.changes for one in study.runs(change)]
    done, whole, started = 0, 0, time.time()
    report("folds", 0, len(runs), "")
    with shared_gpu(study), ThreadPoolExecutor(study.jobs, initializer=_own_cores(study.jobs)) as pool:
        work = {pool.submit(train_and_bench, study, one): one for one in runs}
        for future in as_completed(work):
            done, whole = done + 1, whole + future.result()
            name = work[future].folder(study).name
            report("folds", done, len(runs), f"{name} after {time.time() - started:.0f} s")
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


def collect(study: Study, groups: Mapping[str, int]) -> list[dict[str, Any]]:
    """A line for each change, prompt and variant, from the results files that are whole."""
    lines: dict[tuple[str, str, str], list[tuple[One, Results]]] = {}
    for change in study.changes:
        for one in study.runs(change):
            for setting in study.scored:
                folder = one.folder(study) / f"bench-{setting}"
                for item in load_folder(folder) if folder.is_dir() else ():
                    if item.meta["complete"]:
                        lines.setdefault((change.label, setting, item.name), []).append((one, item))
    return [_line(*key, found, groups) for key, found in lines.items()]


def _line(
    label: str, setting: str, variant: str, found: Sequence[tuple[One, Results]], groups: Mapping[str, int]
) -> dict[str, Any]:
    """Scores over all runs of a line, by the published scorer; intervals draw functions, not entries."""
    marked = [(one, [(groups[row["entry_id"]], mark_row(row)) for row in item.rows]) for one, item in found]
    every = [pair for _, pairs in marked for pair in pairs]
    line: dict[str, Any] = {"label": label, "setting": setting, "variant": variant, "runs": len(found)}
    line |= {"n": len(every), "functions": len({group for group, _ in every})}
    for metric in METRICS:
        right = [(group, mark.right(metric)) for group, mark in every]
        line[metric] = percent(sum(flag for _, flag in right), len(right))
        line[f"{metric}_ci"] = list(grouped_interval(right))
    line["by_run"] = [
        {"seed": one.seed, "fold": one.fold, "n": len(pairs), **_shares([mark for _, mark in pairs])}
        for one, pairs in marked
    ]
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


def _shares(marks: Sequence[Mark]) -> dict[str, float]:
    return {metric: percent(sum(mark.right(metric) for mark in marks), len(marks)) for metric in METRICS}


def beside_the_gpu(study: Study, variant: str) -> list[dict[str, Any]]:
    """Each change and prompt of the GGUF `variant` paired with the GPU's bfloat16, on all entries that both scored."""
    found = []
    for change in study.changes:
        for setting in study.scored:
            sides: tuple[dict[Any, Mark], dict[Any, Mark]] = ({}, {})
            for one in study.runs(change):
                folder = one.folder(study) / f"bench-{setting}"
                for side, name in zip(sides, ("tuned-bf16-gpu", variant), strict=True):
                    path = folder / f"results-{name}-constrained.jsonl"
                    rows = load_results(path).rows if path.is_file() and path.stat().st_size else ()
                    side.update({(one.seed, row["entry_id"]): mark_row(row) for row in rows})
            pairs = compare_marks(*sides)
            if pairs["n"]:
                found.append({"label": change.label, "setting": setting, "second": variant, **pairs})
    return found


def table_rows(lines: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Rows of the table, as text."""

    def cell(line: Mapping[str, Any], metric: str) -> str:
        low, high = line[f"{metric}_ci"]
        return f"{line[metric]:.1f} ({low:.0f}-{high:.0f})"

    return [
        [line["label"], line["setting"], line["variant"], str(line["n"]), str(line["functions"])]
        + [cell(line, metric) for metric in METRICS]
        for line in lines
    ]


_COLUMNS = ["recipe", "prompt", "variant", "n", "functions", "tool % (95 %)", "parameters %", "both %"]


def _options() -> argparse.Namespace:
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
    return parser.parse_args()


def study_of(options: argparse.Namespace) -> Study:
    """The study that a command line asks for; raises PetoolError for what cannot be."""
    changes = tuple(dict.fromkeys(parse_change(text) for text in options.change)) or (Change("as it is"),)
    recipe = load_recipe(options.recipe, options.settings)[1]
    scored = tuple(options.setting) or (recipe.data.one_setting,)
    if recipe.data.setting == ALL and not options.setting:
        scored = ("rating", "preferred", "chronological")
    only, seeds = (tuple(map(int, text.split(","))) for text in (options.only or _all(options.folds), options.seeds))
    until = time.time() + options.seconds
    return Study(
        options.data, options.recipe, options.out.absolute(), changes, options.folds, only, seeds,
        tuple(options.settings), scored, options.export, options.jobs, until, gpu_available(),
    )  # fmt: skip


def _all(count: int) -> str:
    return ",".join(map(str, range(count)))


def main() -> None:
    """Run the study, print the table and the JSON line; exit 1 where a run is missing."""
    options = _options()
    started = time.time()
    try:
        study = study_of(options)
        keep_study(study)
        groups = write_split(study)
        with progress() as report:
            whole = run_all(study, report)
        lines = collect(study, groups)
        pairs = beside_the_gpu(study, f"tuned-{study.export}") if study.export else []
    except PetoolError as error:
        sys.exit(f"error: {error.message}\nhint: {error.hint}")
    wanted = len(study.changes) * len(study.seeds) * len(study.only)
    with redirect_stdout(sys.stderr):
        caption = f"{whole} of {wanted} runs; intervals draw functions; {time.time() - started:.0f} s in all"
        print_table(f"{study.recipe}, functions that training never saw", _COLUMNS, table_rows(lines), caption)
    facts: dict[str, Any] = {"benchmark": "folds", "date": time.strftime("%Y-%m-%d"), "machine": machine(gpu=True)}
    facts |= {"commit": commit(), "versions": versions(), "recipe": study.recipe, "settings": study.settings}
    facts |= {"changes": {change.label: change.settings for change in study.changes}}
    facts |= {"runs": whole, "wanted": wanted, "seconds": round(time.time() - started, 1)}
    document = {**facts, "lines": lines, "pairs": pairs}
    write_json(study.out / "folds.json", document)
    print_json(document)
    sys.exit(whole < wanted)


if __name__ == "__main__":
    main()
