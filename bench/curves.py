"""Loss curves on the same rows: petool-lite lean, petool-lite with everything kept, and Transformers + PEFT + TRL.

    python -m petool_lite.bench.curves BASE DATA [--seeds 0,1,2] [--ways lean,auto,hf] [--jobs N] [--json]

BASE is a model, DATA a file of PEToolBench entries. Every run is a process of its own. Learning rate, schedule,
warm-up, dropout, LoRA shape, weight decay, clip norm, optimizer, data order and rows an update are the same in all
ways: they come from one recipe. That the order was the same is checked by counting tokens (same_rows). What differs:
the random numbers of the fresh adapter and of dropout, and the arithmetic of each way; where TRL rounds an adapter to
bfloat16 (adapter_in), petool-lite keeps it in float32. The table goes to stderr, one JSON line to stdout.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from petool_lite.bench.machine import commit, machine
from petool_lite.bench.train_scripts import OURS, PEER
from petool_lite.bench.train_speed import PEERS, results, rows_file, told

from petool_lite.console import print_json, print_table
from petool_lite.runs import versions

# All in which the ways differ. What memory=auto takes depends on the GPU, so both are spelled out: a base in 4 bits and
# one in 16, each with its peer.
_KEPT = ("train.checkpointing=false", "train.token_budget=32768")
WAYS = {
    "lean": ("train.memory=lean", "train.checkpointing=true"),
    "auto": _KEPT,
    "hf": (),
    "auto-bf16": (*_KEPT, "model.precision=bf16"),
    "hf-bf16": ("model.precision=bf16",),
}
_LAST = 4  # updates whose mean is the final loss
_COLUMNS = ["way", "seed", "final loss", "first loss"]


@dataclass(frozen=True)
class Curves:
    """What is trained: the recipe's settings, ways, seeds and updates; processes at once, and seconds for each."""

    settings: tuple[str, ...]
    ways: tuple[str, ...]
    seeds: tuple[int, ...]
    updates: int
    jobs: int = 1
    seconds: float = 900.0


def recipe_settings(base: str, data: str, limit: int, rows: int, extra: Sequence[str] = ()) -> tuple[str, ...]:
    """Changes to the recipe rating that all ways share. On a CPU the base has 16 bits and AdamW is not paged."""
    import torch

    here = ["model.precision=nf4"]
    if not torch.cuda.is_available():
        here = ["model.precision=bf16", "train.optimizer=adamw_torch"]
    ours = [f"model.base={base}", f"data.train={data}", f"data.limit={limit}", f"train.accumulate={rows}"]
    return (*ours, "train.batch_size=1", "train.learning_rate=5e-4", *here, *extra)


def measure(task: Curves) -> list[dict[str, Any]]:
    """Train in every way with every seed; the results seed by seed, without the runs that failed."""
    runs = [(way, seed) for seed in task.seeds for way in task.ways]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for seed in task.seeds:  # also fills the cache, so that no two runs write the same rows at once
            rows_file(work / f"rows-{seed}.json", [*task.settings, f"train.seed={seed}"], sys.maxsize)
        with ThreadPoolExecutor(task.jobs) as pool:
            found = pool.map(lambda run: _run(task, work, *run), runs)
            return same_rows([item for item in found if item])


def _run(task: Curves, work: Path, way: str, seed: int) -> dict[str, Any] | None:
    """One run in a process and a folder of its own; None where it fails."""
    own, rows = work / f"{way}-{seed}", work / f"rows-{seed}.json"
    settings = [*task.settings, *WAYS[way], f"train.seed={seed}", f"train.max_steps={task.updates}"]
    if way.startswith("hf"):
        peer = next(peer for peer in PEERS if peer["engine"] == "hf") | {"updates": task.updates}
        script = [PEER, json.dumps(told(peer, settings, rows) | {"out": str(own)})]
    else:
        script = [OURS, json.dumps([{"name": way, "settings": settings}])]
    environment = {"PETOOL_LITE_RUNS": str(own), "BENCH_STARTED": repr(time.time())}
    found = results([sys.executable, "-c", *script], task.seconds, environment)
    return {**found[0], "how": found[0].get("way", "one row a micro-step"), "way": way, "seed": seed} if found else None


def same_rows(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The results, those of the peer with `same_rows`: whether petool-lite's updates had as many tokens, one by one,
    with the same seed; None where it has no such run."""
    updates = {item["seed"]: set(item["tokens"]) for item in found if "tokens" in item}
    checked = []
    for item in found:
        rest = {key: value for key, value in item.items() if key not in ("tokens", "row_tokens")}
        if "row_tokens" in item:
            mine = updates.get(item["seed"])
            rest["same_rows"] = mine and mine <= set(accumulate(item["row_tokens"]))
        checked.append(rest)
    return checked


def final_loss(item: Mapping[str, Any]) -> float:
    """Mean of the last updates' losses."""
    return statistics.fmean(item["losses"][-_LAST:])


def summary(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean and sample standard deviation of the final losses of each way; None for the deviation of one seed."""
    ways: dict[str, list[float]] = {}
    for item in found:
        ways.setdefault(item["way"], []).append(final_loss(item))
    return [
        {
            "way": way,
            "n": len(losses),
            "mean": round(statistics.fmean(losses), 4),
            "sd": round(statistics.stdev(losses), 4) if len(losses) > 1 else None,
        }
        for way, losses in ways.items()
    ]


def table_rows(found: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Rows of the table, as text: the runs of each way, then its mean and deviation."""
    rows = []
    for way in summary(found):
        mine = [item for item in found if item["way"] == way["way"]]
        rows += [
            [item["way"], str(item["seed"]), f"{final_loss(item):.4f}", f"{item['losses'][0]:.4f}"] for item in mine
        ]
        if way["sd"] is not None:
            rows.append([way["way"], f"{way['n']} seeds", f"{way['mean']:.4f} ± {way['sd']:.4f}", ""])
    return rows


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("data")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--updates", type=int, default=16, help="at least 2")
    parser.add_argument("--rows", type=int, default=16, help="rows an update")
    parser.add_argument("--limit", type=int, default=247, help="entries, the first of DATA")
    parser.add_argument("--ways", default="lean,auto,hf", help=f"of {', '.join(WAYS)}")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--seconds", type=float, default=900.0, help="most that a run may take")
    parser.add_argument("--set", action="append", default=[], dest="extra", metavar="KEY=VALUE")
    parser.add_argument("--json", action="store_true", help="no table, the JSON line alone")
    options = parser.parse_args()
    options.ways = tuple(options.ways.split(","))
    if set(options.ways) - set(WAYS):
        parser.error(f"--ways: of {', '.join(WAYS)}")
    if options.updates < 2:
        parser.error("--updates: at least 2, for the first one is not timed")
    return options


def main() -> None:
    """Train, print the table and the JSON line; exit 1 where a run is missing."""
    options = _options()
    seeds = tuple(int(seed) for seed in options.seeds.split(","))
    settings = recipe_settings(options.base, options.data, options.limit, options.rows, options.extra)
    found = measure(Curves(settings, options.ways, seeds, options.updates, options.jobs, options.seconds))
    if not options.json:
        with redirect_stdout(sys.stderr):
            print_table(
                f"final loss, the mean of the last {_LAST} of {options.updates} updates", _COLUMNS, table_rows(found)
            )
    facts = {"benchmark": "curves", "date": time.strftime("%Y-%m-%d"), "machine": machine(gpu=True)}
    facts |= {"commit": commit(), "versions": versions()}
    print_json({**facts, "settings": settings, "last": _LAST, "summary": summary(found), "results": found})
    sys.exit(len(found) < len(options.ways) * len(seeds))


if __name__ == "__main__":
    main()
