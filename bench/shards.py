"""A bench in parts, one for each GPU or machine, and the merge of finished parts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from petool_lite.bench.results import SAME, Results, difference, load_results, meta_path, write_rows

from petool_lite.errors import USAGE, PetoolError
from petool_lite.runs import write_json

_SAME = {**SAME, "limit": "limit", "versions": "versions", "commit": "commit"}


def shard_folder(folder: Path, shard: tuple[int, int]) -> Path:
    """Where shard i of n keeps its results under `folder`."""
    return folder / f"shard-{shard[0]}-of-{shard[1]}"


def merge_shards(folders: Sequence[Path], target: Path) -> None:
    """Write each results file of the shards in `folders` as one into `target`.

    Raises PetoolError, and writes nothing, for a shard that is absent, double or unfinished, and for shards that were
    made from other data, another model, other settings or other versions.
    """
    if target.resolve() in [folder.resolve() for folder in folders]:
        raise PetoolError(f"{target} is one of the shards", "give another --out", USAGE)
    names = sorted({path.name for folder in folders for path in folder.glob("results-*.jsonl")})
    if not names:
        raise PetoolError(f"no results-<variant>.jsonl in {folders[0]}", "give the folders of finished shards")
    merged = {name: _parts(name, folders) for name in names}
    for name, parts in merged.items():
        write_rows(target / name, sorted((row for part in parts for row in part.rows), key=lambda row: row["index"]))
        write_json(meta_path(target / name), _meta([part.meta for part in parts]))


def _parts(name: str, folders: Sequence[Path]) -> list[Results]:
    """One variant's results of every shard; raises PetoolError where they do not make a whole."""
    absent = [str(folder) for folder in folders if not (folder / name).is_file()]
    if absent:
        raise PetoolError(f"{', '.join(absent)} has no {name}", "every shard needs the same variants")
    parts = [load_results(folder / name) for folder in folders]
    shards = [part.meta.get("shard") or [0, 0] for part in parts]
    if sorted(shards) != [[place, len(parts)] for place in range(len(parts))]:
        told = ", ".join(
            f"{part.path} is shard {place}/{count}" for part, (place, count) in zip(parts, shards, strict=True)
        )
        raise PetoolError(
            f"these are not all shards of one bench, each once: {told}", "they come from bench --shard i/n"
        )
    for part in parts:
        if not part.meta["complete"] or len(part.rows) != part.meta["entries"]:
            raise PetoolError(
                f"{part.path} is not finished: {len(part.rows)} of {part.meta['entries']} entries", "run it again"
            )
        other = difference(part.meta, parts[0].meta, _SAME)
        if other:
            hint = "shards of one bench need the same data, model and settings"
            raise PetoolError(f"{part.path} and {parts[0].path} have {other}", hint)
    return parts


def _meta(metas: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The meta of all shards: seconds of work together, the highest peak, the smallest batch, all machines."""
    gpus = [meta["gpu"] for meta in metas if meta.get("gpu")]
    machines = [meta["machine"] for meta in metas]
    return {
        **metas[0],
        "shard": None,
        "shards": len(metas),
        "entries": sum(meta["entries"] for meta in metas),
        "started": min(meta["started"] for meta in metas),
        "seconds": round(sum(meta["seconds"] for meta in metas), 2),
        "peak_memory_gb": max(meta["peak_memory_gb"] or 0.0 for meta in metas),
        "machines": [item for place, item in enumerate(machines) if item not in machines[:place]],
        "gpu": min(gpus, key=lambda gpu: gpu["batch"]) if gpus else None,
    }
