"""Tokens/s and peak memory of training on one GPU: petool-lite in its ways, and what others do on the same rows.

    python -m train_speed BASE DATA [--seconds 1200] [--document docs/performance.md]

BASE is a model directory, DATA a file of PEToolBench entries. The peers are Transformers + PEFT + TRL + bitsandbytes
and Unsloth, both with the published settings, and Unsloth as its notebooks use it, without dropout; one row a
micro-step, the same token ids. Each update but the first, which compiles kernels, is timed. With --document the table
replaces the one between its markers.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petool_lite.bench.machine import commit
from petool_lite.bench.speed import training_rows
from train_scripts import OURS, PEER

from petool_lite.console import print_json, print_table, say
from petool_lite.models import resolve_base
from petool_lite.prompt.prepare import prepare
from petool_lite.prompt.render import chat_from_directory
from petool_lite.recipe import load_recipe
from petool_lite.runs import versions, write_text

_BEGIN, _END = "<!-- bench-gpu -->", "<!-- /bench-gpu -->"
_PLAIN = ("lora.dropout=0.0",)
_A_START = 120.0  # seconds that the second start has at least
_SMALL = ("train.memory=lean", "train.offload=true", "train.token_budget=8192")


@dataclass(frozen=True)
class Way:
    """One way to train: its name, settings beyond those of the recipe, updates, whether all rows have 8k tokens, and
    whether torch is held to the memory that a card of 8 GB can give it, from loading to the end."""

    name: str
    settings: tuple[str, ...]
    updates: int
    dense: bool = False
    held: bool = False


WAYS = (
    Way("lean, as published (dropout 0.1)", (), 4, held=True),
    Way("auto", (*_PLAIN, "train.memory=auto"), 4),
    Way("lean", _PLAIN, 4, held=True),
    Way("lean, rows of 8k tokens", (*_PLAIN, "train.accumulate=12"), 3, dense=True, held=True),
    Way("in the 4 GB that Unsloth takes", (*_PLAIN, *_SMALL), 3),
)


PEERS: tuple[dict[str, Any], ...] = (
    {"name": "Transformers + PEFT + TRL, as published (dropout 0.1)", "engine": "hf", "updates": 3},
    {"name": "Unsloth, as published (dropout 0.1)", "engine": "unsloth", "updates": 3},
    {"name": "Unsloth as its notebooks use it (dropout 0)", "engine": "unsloth", "updates": 3, "settings": _PLAIN},
)


def told(peer: Mapping[str, Any], settings: Sequence[str], rows: Path) -> dict[str, Any]:
    """What a peer of PEERS needs to know: `settings` and its own after them change the recipe rating, as ours are told;
    `rows` is a file that `rows_file` wrote. What else it leaves lies beside that."""
    base = resolve_base(load_recipe("rating", settings)[1].model.base)
    paths = {"base": str(base.directory), "data": str(rows), "out": str(rows.with_name("peer"))}
    return {**peer, **paths, "settings": [*settings, *peer.get("settings", ())]}


def measure(
    base: str, data: str, seconds: float, extra: Sequence[str], only: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Run every way and all peers, one process after the other; no new one of ours after 55 % of `seconds`.

    `only` names the ways to run, then without the peers.
    """
    begun = time.time()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        dense = work / "dense.json"
        dense.write_text(json.dumps(training_rows(36, calls_a_row=(190, 200))))
        common = [f"model.base={base}", *extra]
        for_peers = [*common, f"data.train={data}", "train.accumulate=16"]
        rows_file(work / "rows.json", for_peers, 48)
        ours = [
            {"name": way.name, "settings": [*common, f"data.train={dense if way.dense else data}", *way.settings,
             f"train.max_steps={way.updates}"], "held": way.held}
            for way in WAYS if not only or way.name in only
        ]  # fmt: skip
        limit = seconds if only else 0.55 * seconds
        environment = {"PETOOL_LITE_RUNS": str(work / "runs"), "BENCH_LIMIT": repr(begun + limit)}
        found = results([sys.executable, "-c", OURS, json.dumps(ours)], seconds, environment | _now())
        if not only:  # before the peers, which take what time there is
            add_warm_start(found, ours[0], max(_A_START, begun + seconds - time.time()), environment)
        for peer in () if only else PEERS:
            task = json.dumps(told(peer, for_peers, work / "rows.json"))
            left = max(30.0, begun + seconds - time.time())
            found += results([sys.executable, "-c", PEER, task], left, {})
    return found


def add_warm_start(
    found: Sequence[dict[str, Any]], way: Mapping[str, Any], seconds: float, environment: Mapping[str, str]
) -> None:
    """Start `way`, the first of its process, in another one, and add the time that took to its result in `found`.

    What the first process compiled lies on the disk by then.
    """
    cold = next((item for item in found if item["name"] == f"petool-lite, {way['name']}"), None)
    if cold is not None:
        again = results([sys.executable, "-c", OURS, json.dumps([way])], seconds, {**environment, **_now()})
        cold["first_step_warm_s"] = again[0]["first_step_s"] if again else None
        cold["start_warm"] = again[0]["start"] if again else None


def _now() -> dict[str, str]:
    """From when on the seconds to the first step count."""
    return {"BENCH_STARTED": repr(time.time())}


def rows_file(path: Path, settings: Sequence[str], count: int) -> None:
    """The first rows' token ids for the peers; also fills the cache that ours reads, as a second run would find it."""
    _, recipe = load_recipe("rating", settings)
    base = resolve_base(recipe.model.base)
    table = prepare(recipe, base, chat_from_directory(base.directory)).table
    rows = [table[index] for index in range(min(count, len(table)))]
    path.write_text(json.dumps([{"ids": list(row["input_ids"]), "start": row["answer_start"]} for row in rows]))


def results(line: list[str], seconds: float, environment: Mapping[str, str]) -> list[dict[str, Any]]:
    """Lines that start with RESULT, as they come; what fails or takes too long is told and left out."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as log:
        try:
            code = subprocess.run(
                line, stdout=out, stderr=log, env=os.environ | dict(environment), timeout=seconds
            ).returncode
        except subprocess.TimeoutExpired:
            code = -1
            say(f"stopped after {seconds:.0f} s")
        out.seek(0)
        lines = [row for row in out.read().splitlines() if row.startswith(("RESULT ", "FAILED "))]
        log.seek(0)
        say("\n".join(lines) if code == 0 else "\n".join([*lines, log.read()[-3000:]]))
    return [json.loads(row.removeprefix("RESULT ")) for row in lines if row.startswith("RESULT ")]


def table_rows(found: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Rows of the table, as text."""
    slowest = next((item["tokens_per_s"] for item in found if item["name"].startswith("Transformers")), None)
    rows = []
    for item in found:
        predicted = item.get("predicted") or {}
        rows.append(
            [
                item["name"],
                item.get("way", "one row a micro-step"),
                f"{item['tokens_per_s']:,.0f}",
                f"{item['tokens_per_s'] / slowest:.1f}" if slowest else "-",
                " / ".join(f"{item[key]:.2f}" for key in _MEMORY if item.get(key) is not None),
                f"{predicted['tokens_per_s']:,} / {predicted['peak_gb']:.2f}" if predicted else "-",
                " / ".join(f"{item[key]:.0f}" for key in _FIRST if item.get(key)) or "-",
            ]
        )
    return rows


_COLUMNS = ["", "how", "tokens/s", "ratio", "peak / reserved GiB", "predicted", "s to first step, cold / warm"]
_MEMORY = ("peak_gb", "reserved_gb")
_FIRST = ("first_step_s", "first_step_warm_s")


def as_markdown(found: Sequence[Mapping[str, Any]], command: str) -> str:
    """The table with its machine, versions, commit, date and command."""
    import torch

    packages = ("torch", "transformers", "unsloth", "trl", "peft", "bitsandbytes")
    held = ", ".join(f"{name} {version}" for name, version in versions().items() if name in packages)
    limits = {item["limit_gb"] for item in found if item.get("limit_gb")}
    limit = "".join(
        f" In lean ways\ntorch could hold {gib} GiB at most, what a card of 8 GB can give." for gib in limits
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    lines = [
        f"`{command}`, {time.strftime('%Y-%m-%d')}, one {device}, Python {platform.python_version()},",
        f"{held}, commit {commit()}.",
        "One run of each; the first update of each is left out. Peak is what tensors took of the GPU, reserved what",
        f"torch held for them; predicted (tokens/s, GiB) before anything was loaded.{limit} Warm: a second process,",
        "which finds what the first one compiled.",
        "",
        "| " + " | ".join(_COLUMNS) + " |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
        *("| " + " | ".join(row) + " |" for row in table_rows(found)),
    ]
    return "\n".join(lines)


def replaced(document: str, text: str) -> str:
    """`document` with `text` between the markers."""
    before, begin, rest = document.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError(f"the document has no {_BEGIN} ... {_END}")
    return f"{before}{_BEGIN}\n{text}\n{_END}{after}"


def main() -> None:
    """Run the comparison; print a table and one JSON line, and write the document where one is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("data")
    parser.add_argument("--seconds", type=float, default=1200.0)
    parser.add_argument("--only", action="append", default=[], choices=[way.name for way in WAYS], help="without peers")
    parser.add_argument("--document", type=Path, default=None)
    parser.add_argument("--set", action="append", default=[], dest="extra", metavar="KEY=VALUE")
    options = parser.parse_args()
    found = measure(options.base, options.data, options.seconds, options.extra, options.only)
    print_table("training on one GPU", _COLUMNS, table_rows(found))
    print_json({"benchmark": "train", "date": time.strftime("%Y-%m-%d"), "versions": versions(), "results": found})
    if options.document:
        command = f"make bench-gpu BASE={Path(options.base).name} DATA={Path(options.data).name}"
        write_text(options.document, replaced(options.document.read_text(), as_markdown(found, command)))


if __name__ == "__main__":
    main()
