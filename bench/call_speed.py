"""The bench beside `call` on the same entries: `python -m petool_lite.bench.call_speed MODEL.gguf DATA [COUNT]`.

Every entry is asked twice in a row, with another query the second time: one user who comes back. Both sides decode
under constraint with the plain settings, entry by entry in turn, so that the machine's other load falls on both.
"""

import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from petool_lite.bench.engines import llama_rows
from petool_lite.bench.stats import quantile
from petool_lite.bench.variants import Variant

from petool_lite.console import print_json, print_table, say, silent
from petool_lite.data.entries import Entry
from petool_lite.data.files import load_dataset
from petool_lite.inference.parse import CallFailure
from petool_lite.inference.settings import EngineSettings
from petool_lite.inference.states import StateStore
from petool_lite.inference.tool_caller import CallOptions, ToolCaller

REPLY = 64
CONTEXT = 8_192


def chosen_entries(data: str, count: int) -> dict[int, Entry]:
    """The first entries and their twins, each twin behind its entry."""
    found: list[Entry] = []
    for entry in load_dataset(data, "rating", count).entries:
        found += [entry, replace(entry, id=f"{entry.id}b", query=f"{entry.query} Take the second one.")]
    return dict(enumerate(found))


def compare(model: Path, data: str, count: int, folder: Path) -> list[dict[str, float]]:
    """Seconds of both sides for every entry, in the bench's order; the first holds loading and is left out."""
    entries = chosen_entries(data, count)
    variant = Variant("bench", model, "compact", decoding="constrained")
    rows = llama_rows(variant, entries, "rating", REPLY, silent)
    options = CallOptions(setting="rating", reply_tokens=REPLY, trim_history=True)
    found: list[dict[str, float]] = []
    with ToolCaller(model, CONTEXT, EngineSettings(), "compact", StateStore(folder)) as caller:
        while True:
            started = time.perf_counter()
            index, row = next(rows, (-1, {}))
            ours = time.perf_counter() - started
            if index < 0:
                return found[1:]
            if row["status"] != "ok":
                continue
            started = time.perf_counter()
            try:
                caller.call_entry(entries[index], entries[index].id.rstrip("b"), options)
            except CallFailure as failure:  # cut off: the reply took its time all the same
                say(f"entry {entries[index].id}: {failure.kind}")
            found.append({"bench": ours, "call": time.perf_counter() - started, "cached": row["cached_tokens"]})


def main() -> None:
    """Compare on the model and data of the command line; print a table and one JSON line."""
    if len(sys.argv) < 3:
        say("usage: python -m petool_lite.bench.call_speed MODEL.gguf DATA [COUNT]")
        sys.exit(2)
    model, data = Path(sys.argv[1]), sys.argv[2]
    with tempfile.TemporaryDirectory() as folder:
        found = compare(model, data, int(sys.argv[3]) if len(sys.argv) > 3 else 10, Path(folder))
    parts = {
        "new user": [item for item in found if item["cached"] < 500],
        "returning user": [item for item in found if item["cached"] >= 500],
    }
    lines = []
    for name, items in parts.items():
        values = [[item[side] for item in items] for side in ("bench", "call")]
        medians = [quantile(side, 0.5) or 0.0 for side in values]
        lines.append(
            [name, str(len(items)), *(f"{value:.2f}" for value in medians), *(f"{sum(v):.1f}" for v in values)]
        )
    columns = ["", "n", "bench, median s", "call, median s", "bench, all s", "call, all s"]
    print_table(f"{model.name}: seconds an entry", columns, lines)
    print_json({"benchmark": "call", "model": model.name, "reply_tokens": REPLY, "rows": found})


if __name__ == "__main__":
    main()
