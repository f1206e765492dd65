"""`bench`: generate greedy replies into results files, then score them and write the report."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from petool_lite.console import Report, silent
from petool_lite.errors import PetoolError
from petool_lite.gguf_header import check_gguf
from petool_lite.runs import locked

if TYPE_CHECKING:
    from petool_lite.bench.run import Task
    from petool_lite.bench.variants import Variant

__all__ = ["bench"]


def bench(variants: "list[Variant]", task: "Task", folder: Path, report: Report = silent) -> dict[str, Any] | None:
    """Run every variant over the same entries, write results-<variant>.jsonl and the report; return the report.

    A shard has a folder of its own under `folder` and no report (None): `merge_shards` makes one of all. Rows that an
    earlier run left are kept. Raises PetoolError for entries without right answers, results of other work in the
    folder, or a model that does not load.
    """
    from petool_lite.bench.report import write_report
    from petool_lite.bench.run import generate
    from petool_lite.bench.shards import shard_folder
    from petool_lite.bench.variants import LLAMA

    for variant in variants:
        if variant.engine == LLAMA:
            check_gguf(variant.weights)  # before the folder is made
    task.entries()
    if task.shard is not None:
        folder = shard_folder(folder, task.shard)
    check_neighbours(variants, task, folder)
    with locked(folder):
        generate(variants, task, folder, report)
        if task.shard is not None:
            report(f"replies of shard {task.shard[0]}/{task.shard[1]}: {folder}; bench merge makes all one", 0, 0, "")
            return None
        return write_report(folder)


def check_neighbours(variants: "list[Variant]", task: "Task", folder: Path) -> None:
    """Raise PetoolError for other results in the folder that the report could not hold beside these."""
    from petool_lite.bench.results import load_results, results_files

    own = {f"results-{variant.name}.jsonl" for variant in variants}
    for path in results_files(folder):
        if path.name in own:
            continue
        meta = load_results(path).meta
        if meta["setting"] == task.setting and meta["data"]["sha256"] != task.dataset.sha256:
            raise PetoolError(
                f"{path} was made from other data: {meta['data']['source']}, not {task.dataset.source}",
                "give another --out, or take that file away",
            )
