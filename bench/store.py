"""Results files as they are written: a row at a time, continued after a stop, refused where they are of other work."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from petool_lite.bench.results import SCHEMA, load_rows, meta_path

from petool_lite.console import Report
from petool_lite.errors import PetoolError
from petool_lite.runs import sole_writer, write_json, write_text

# What must be as before for rows to be added, in the words of a refusal.
_SAME = {
    "schema": "version of the format",
    "data": "data set",
    "setting": "setting",
    "style": "prompt style",
    "model_sha256": "model",
    "engine": "engine",
    "decoding": "decoding",
    "max_reply_tokens": "reply limit",
    "shard": "shard",
    "variant": "variant",
}


class Store:
    """An open results file: the rows that it holds by index, and where the next one goes."""

    def __init__(self, path: Path, meta: dict[str, Any], rows: dict[int, dict[str, Any]]) -> None:
        self.path, self.meta, self.rows = path, meta, rows
        self._file = path.open("a", encoding="utf-8")

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row, so that it stays whatever happens to this process next."""
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()
        self.rows[row["index"]] = dict(row)

    def save_meta(self, **changes: Any) -> None:
        """Write the meta file with these changes."""
        self.meta |= changes
        write_json(meta_path(self.path), self.meta)

    def close(self) -> None:
        """Put the rows on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


@contextmanager
def open_store(path: Path, meta: dict[str, Any], wanted: set[int], fresh: bool, report: Report) -> Iterator[Store]:
    """Open the results file for rows of the `wanted` indices under `meta`, what it holds of them included.

    A cut last line and failures of the engine are taken out, to be generated again. With `fresh` the file starts over.
    Raises PetoolError where the file was made from other data, another model and so on, or is being written.
    """
    with sole_writer(path, path.with_name(f".{path.name}.lock")):
        if fresh:
            path.unlink(missing_ok=True)
            meta_path(path).unlink(missing_ok=True)
        rows: dict[int, dict[str, Any]] = {}
        # an empty file without its meta is what a full disk left of a start
        if path.is_file() and (path.stat().st_size or meta_path(path).is_file()):
            meta = _continued(path, meta)
            rows = _held(path, wanted, report)
        store = Store(path, meta, rows)
        try:
            store.save_meta(complete=set(rows) == wanted)
            yield store
        finally:
            store.close()


def _continued(path: Path, meta: dict[str, Any]) -> dict[str, Any]:
    """The meta of the rows that are there, with this run's plan; raises PetoolError if they are of other work."""
    hint = "start over with --fresh, or give another --out"
    try:
        held = json.loads(meta_path(path).read_text())
    except (OSError, ValueError) as error:
        raise PetoolError(f"{path} has no {meta_path(path).name} that says what it was made from", hint) from error
    for key, word in _SAME.items():
        old, new = held.get(key, 1 if key == "schema" else None), meta[key]
        if key == "data":
            old, new = (old or {}).get("sha256"), new["sha256"]
        if old != new:
            shown = (held["data"]["source"], meta["data"]["source"]) if key == "data" else (old, new)
            if key == "model_sha256":
                shown = (held.get("model"), meta["model"])
            raise PetoolError(f"{path} was made with another {word}: {shown[0]}, not {shown[1]}", hint)
    return meta | {key: held[key] for key in ("started", "seconds", "peak_memory_gb", "gpu") if key in held}


def _held(path: Path, wanted: set[int], report: Report) -> dict[int, dict[str, Any]]:
    """The rows of a file by index, after its repair."""
    raw = path.read_bytes()
    whole, end, last = raw.rpartition(b"\n")
    if last:
        if _is_row(last):
            path.write_bytes(raw + b"\n")
        else:
            os.truncate(path, len(whole) + len(end))
            report(f"{path.name}: its last line was cut off; that entry is generated again", 0, 0, "")
    if not path.stat().st_size:
        return {}
    rows = {row["index"]: row for row in load_rows(path)[0]}
    beyond = sorted(set(rows) - wanted)
    if beyond:
        raise PetoolError(
            f"{path} has {len(beyond)} rows that this command does not ask for, such as entry "
            f"{rows[beyond[0]]['entry_id']}",
            "ask for at least as many entries, start over with --fresh, or give another --out",
        )
    good = {index: row for index, row in rows.items() if row["status"] != "engine_error"}
    if len(good) < len(rows):
        report(f"{path.name}: {len(rows) - len(good)} failures of the engine are tried again", 0, 0, "")
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in good.values()))
    return good


def _is_row(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def new_meta(facts: Mapping[str, Any]) -> dict[str, Any]:
    """A meta document before the first row."""
    return {"schema": SCHEMA, **facts, "complete": False, "seconds": 0.0, "peak_memory_gb": None, "gpu": None}
