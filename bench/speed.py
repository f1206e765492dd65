"""Benchmarks of petool-lite's own paths, one table each: `python -m petool_lite.bench.speed prepare`.

A benchmark runs each measured step in a process of its own, so that peak memory is that step's.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from petool_lite.console import print_json, print_table, say
from petool_lite.data.demo import generate

ROWS, TOKENS = 9_000, 5_900  # the published training file: rows, mean tokens of one


def training_rows(count: int, seed: int = 0, calls_a_row: tuple[int, int] = (98, 124)) -> list[dict[str, str]]:
    """Training rows of the published form: demo entries with a history of about TOKENS SmolLM2 tokens, or of as many
    calls as are asked for (least, most)."""
    rng = random.Random(seed)
    pool = generate("train", 2_000)
    calls = [call for row in pool for call in _history(row["instruction_ratings"])]
    rows = []
    for index in range(count):
        row = pool[index % len(pool)]
        text = row["instruction_ratings"]
        history = json.dumps(rng.choices(calls, k=rng.randint(*calls_a_row)))
        start = text.index("[")
        end = start + json.JSONDecoder().raw_decode(text[start:])[1]
        answer = json.dumps(row["api_call_ground_truth"])
        rows.append({"instruction": text[:start] + history + text[end:], "input": row["query"], "output": answer})
    return rows


def _history(text: str) -> list[Any]:
    found: list[Any] = json.JSONDecoder().raw_decode(text[text.index("[") :])[0]
    return found


_STEP = """
import json, resource, sys, time
from petool_lite.base import resolve_base
from petool_lite.prepare import prepare
from petool_lite.prompt import chat_from_directory
from petool_lite.recipe import load_recipe
recipe = load_recipe("rating", ["model.base=" + sys.argv[2], "data.train=" + sys.argv[1]])[1]
base = resolve_base(recipe.model.base)
started = time.perf_counter()
found = prepare(recipe, base, chat_from_directory(base.directory))
total = sum(len(row["input_ids"]) for row in found.table.select(range(10)))
seconds = time.perf_counter() - started
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps({"seconds": round(seconds, 2), "peak_gb": round(peak, 2), **found.summary}))
"""


def prepare_benchmark(count: int, base: str) -> list[dict[str, Any]]:
    """Prepare `count` rows of the published size twice: parsed and tokenized, then from the cache."""
    from petool_lite.base import resolve_base

    resolve_base(base)  # unpacking the embedded base is not what is measured
    results = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        file.write_text(json.dumps(training_rows(count)))
        say(f"{count} rows, {file.stat().st_size / 1e6:.0f} MB")
        real_cache = Path(os.environ.get("PETOOL_LITE_CACHE") or Path.home() / ".cache" / "petool-lite")
        (Path(folder) / "cache").mkdir()
        if (real_cache / "bases").is_dir():
            (Path(folder) / "cache" / "bases").symlink_to((real_cache / "bases").resolve())
        environment = os.environ | {"PETOOL_LITE_CACHE": str(Path(folder) / "cache")}
        for name in ("first time", "from the cache"):
            line = [sys.executable, "-c", _STEP, str(file), base]
            output = subprocess.run(line, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
            results.append({"step": name, **json.loads(output.splitlines()[-1])})
    return results


def main() -> None:
    """Run the benchmark named on the command line; print a table and one JSON line."""
    if sys.argv[1:2] != ["prepare"]:
        say("usage: python -m petool_lite.bench.speed prepare [ROWS] [BASE]")
        sys.exit(2)
    count = int(sys.argv[2]) if len(sys.argv) > 2 else ROWS
    results = prepare_benchmark(count, sys.argv[3] if len(sys.argv) > 3 else "smollm2-135m")
    rows = [
        [r["step"], f"{r['kept']:,}", f"{r['tokens'] / r['kept']:,.0f}", f"{r['seconds']:.1f}", f"{r['peak_gb']:.2f}"]
        for r in results
    ]
    print_table("preparing training rows", ["", "rows", "mean tokens", "seconds", "peak GiB"], rows)
    print_json({"benchmark": "prepare", "cores": os.cpu_count(), "time": time.strftime("%Y-%m-%d"), "results": results})


if __name__ == "__main__":
    main()
