"""A bench as one of several: a part by --shard, or one process of torchrun or accelerate with the first one merging."""

import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from petool_lite.bench import bench, check_neighbours, generate
from petool_lite.bench.merge import merge_shards, shard_folder
from petool_lite.bench.report import write_report
from petool_lite.bench.run import Task
from petool_lite.bench.variants import Variant

from petool_lite.console import Report, silent

_PATIENCE = timedelta(days=30)  # how long the first process waits for the slowest


def bench_ranks(variants: list[Variant], task: Task, folder: Path, report: Report) -> dict[str, Any] | None:
    """Like `bench`; under torchrun or accelerate each process does its shard and the first one merges them.

    A shard's results lie in a folder of its own under `folder`. None where this process has no report to show:
    in a shard by hand, and in all processes but the first.
    """
    rank, count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if task.shard is not None:
        own = shard_folder(folder, task.shard)
        generate(variants, task, own, report)
        report(f"replies of shard {task.shard[0]}/{task.shard[1]}: {own}", 0, 0, "")
        return None
    if count == 1:
        return bench(variants, task, folder, report)
    check_neighbours(variants, task, folder)
    from torch import distributed

    distributed.init_process_group("gloo", timeout=_PATIENCE)
    try:
        part = replace(task, shard=(rank, count))
        generate(variants, part, shard_folder(folder, (rank, count)), report if rank == 0 else silent)
        distributed.barrier()
    finally:
        distributed.destroy_process_group()
    if rank:
        return None
    merge_shards([shard_folder(folder, (place, count)) for place in range(count)], folder)
    return write_report(folder)
