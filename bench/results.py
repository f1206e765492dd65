"""Results: one JSON line a reply, and a meta file beside them. Written a row at a time, checked row by row when read.

The format is described in docs/bench.md. Nothing is repaired in silence, and rows of different work never mix.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petool_lite.console import Report
from petool_lite.errors import PetoolError
from petool_lite.runs import sole_writer, write_json, write_text

SCHEMA = 2
# What a row, a meta file and what is in them must hold: text, flag, count, amount, list of names, or any object.
# A key with a question mark may be absent or null.
_ROW: dict[str, Any] = {
    **dict.fromkeys(("entry_id", "status", "variant", "setting", "engine", "decoding", "style"), str),
    **{"index": int, "prompt_tokens": int, "seconds": float, "cached_tokens?": int, "history_dropped?": int},
    **{"batch?": int, "cold?": bool, "prompt_sha256?": str, "error?": str, "query?": str},
    **{"kind?": str, "accept?": {"name": str, "values": dict, "schema": dict}},
    "gold": dict,
    "facts": {"offered": list, "same_job": list, "history_length": int, "function?": str},
}
_CALL = {"tool_name": str, "parameters": dict}
_REPLY = {"reply": str, "finish": str, "reply_tokens": int, "prefill_s": float, "decode_s": float}
_META: dict[str, Any] = {
    **dict.fromkeys(("variant", "engine", "decoding", "style", "setting", "model"), str),
    **{"entries": int, "complete": bool, "machine": dict, "versions": dict, "model_sha256?": str, "model_bytes?": int},
    **{"limit?": int, "max_reply_tokens?": int, "commit?": str, "peak_memory_gb?": float, "seconds?": float},
    "data": {"source": str, "sha256": str, "total": int},
    "gpu?": {"batch?": int, "tokens_per_s?": float, "memory_gb?": float},
}
_ALIKE = ("variant", "setting", "engine", "decoding", "style")  # one value in a whole file
# What must be as before for rows to be added, and what shards have in common, in the words of a refusal.
SAME = {
    "schema": "version of the format",
    "data": "data set",
    "setting": "setting",
    "style": "prompt style",
    "model_sha256": "model",
    "engine": "engine",
    "decoding": "decoding",
    "max_reply_tokens": "reply limit",
    "variant": "variant",
}


@dataclass(frozen=True)
class Results:
    """One results file: its rows in the order of the data, its meta, and whether its last line was cut."""

    path: Path
    rows: tuple[dict[str, Any], ...]
    meta: dict[str, Any]
    cut_line: bool

    @property
    def name(self) -> str:
        """The variant."""
        return str(self.meta["variant"])


class _Fault(Exception):
    """What is wrong with one row or meta file."""


_KINDS: dict[Any, tuple[str, Any]] = {
    str: ("text", lambda value: isinstance(value, str)),
    bool: ("flag", lambda value: isinstance(value, bool)),
    int: ("count", lambda value: isinstance(value, int) and _KINDS[float][1](value)),
    float: ("amount", lambda value: isinstance(value, int | float) and type(value) is not bool and 0 <= value < 2**53),
    list: ("list of names", lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value)),
    dict: ("object", lambda value: isinstance(value, dict)),
}


def _check(value: Mapping[str, Any], shape: Mapping[str, Any], where: str = "") -> None:
    """Raise _Fault for the first key that is not as `shape` says."""
    for key, kind in shape.items():
        name = key.removesuffix("?")
        found: Any = value.get(name)
        if found is None and name != key:
            continue
        if name not in value:
            raise _Fault(f"no {where}{name}")
        word, test = _KINDS[dict if isinstance(kind, dict) else kind]
        if not test(found):
            raise _Fault(f"{where}{name} is no {word}")
        if isinstance(kind, dict):
            _check(found, kind, f"{where}{name}.")


def _check_schema(value: Any) -> None:
    if not isinstance(value, dict):
        raise _Fault("not an object")
    schema = value.get("schema", 1)
    if schema != SCHEMA or isinstance(schema, bool):
        raise _Fault(f"schema {schema}, this petool-lite reads {SCHEMA}")


def _check_row(row: Any, before: Sequence[Mapping[str, Any]], seen: Mapping[str, int]) -> None:
    _check_schema(row)
    _check(row, _ROW)
    _check(row["gold"], {"no_call": str} if "no_call" in row["gold"] else _CALL, "gold.")
    if row["status"] not in ("ok", "too_long", "engine_error"):
        raise _Fault(f"unknown status {row['status']}")
    if row["status"] == "ok":
        _check(row, _REPLY)
    if row["entry_id"] in seen:
        raise _Fault(f"entry {row['entry_id']} was on line {seen[row['entry_id']]} already")
    for key in _ALIKE:
        if before and row[key] != before[0][key]:
            raise _Fault(f"{key} {row[key]}, but {before[0][key]} above")


def _parse(line: bytes) -> Any:
    """A line as JSON that can be written again: not nested without end, no half of a surrogate pair."""
    try:
        value = json.loads(line.decode())
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError:
        raise _Fault("not UTF-8") from None
    except UnicodeEncodeError:
        raise _Fault("text that is no Unicode") from None
    except (ValueError, RecursionError):
        raise _Fault("not JSON") from None
    return value


def load_rows(path: Path) -> tuple[tuple[dict[str, Any], ...], bool]:
    """The checked rows of a results file in the order of the data, and whether a cut last line was left out.

    A last line that was cut while it was written (no line end, no JSON) is left out. Anything else that is wrong
    raises PetoolError with the line: another schema, no right answer, an entry twice, two variants in one file.
    """
    try:
        lines = path.read_bytes().split(b"\n")  # not splitlines: a reply may hold other line ends
    except OSError as error:
        raise PetoolError(
            f"no such results file: {path} ({error.strerror})", "give a results-<variant>.jsonl that bench wrote"
        ) from error
    rows: list[dict[str, Any]] = []
    seen: dict[str, int] = {}
    cut = False
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            try:
                row = _parse(line)
            except _Fault:
                cut = number == len(lines) and bool(rows)
                if cut:
                    break
                raise
            _check_row(row, rows, seen)
        except _Fault as fault:
            raise PetoolError(f"{path}, line {number}: {fault}", "run bench again, or take the line out") from None
        seen[row["entry_id"]] = number
        rows.append({key: value for key, value in row.items() if value is not None or f"{key}?" not in _ROW})
    if not rows:
        raise PetoolError(f"{path} has no result", "run bench again")
    return tuple(sorted(rows, key=lambda row: row["index"])), cut


def meta_path(results: Path) -> Path:
    """results-<variant>.meta.json beside results-<variant>.jsonl."""
    return results.with_name(results.name.removesuffix(".jsonl") + ".meta.json")


def load_results(path: Path) -> Results:
    """A results file with its meta file; raises PetoolError if they do not belong together."""
    rows, cut = load_rows(path)
    place = meta_path(path)
    try:
        meta = _parse(place.read_bytes())
        _check_schema(meta)
        _check(meta, _META)
        for key in _ALIKE:
            if rows[0][key] != meta[key]:
                raise _Fault(f"{key} is {meta[key]}, its rows say {rows[0][key]}")
        if len(rows) > meta["entries"]:
            raise _Fault(f"{meta['entries']} entries, but the file has {len(rows)} rows")
    except OSError as error:
        raise PetoolError(f"{path} has no {place.name} beside it", "run bench again: it writes both") from error
    except _Fault as fault:
        raise PetoolError(f"{place}: {fault}", "run bench again: it writes both files") from None
    return Results(path, rows, meta, cut)


def results_folder(place: str) -> Path:
    """The folder that holds results-*.jsonl: `place` itself, or the bench folder of the run that it names."""
    path = Path(place).expanduser()
    if path.is_file() and path.name == "report.json":
        path = path.parent
    for folder in (path, path / "bench"):
        if folder.is_dir() and any(folder.glob("results-*.jsonl")):
            return folder
    raise PetoolError(f"no results-<variant>.jsonl in {path}", "give a folder that bench wrote, or a run")


def results_files(folder: Path) -> list[Path]:
    """The results files of a folder that have a row."""
    return sorted(path for path in folder.glob("results-*.jsonl") if path.stat().st_size)


def empty_files(folder: Path) -> list[str]:
    """Names of results files that were begun and have no row yet."""
    return sorted(path.name for path in folder.glob("results-*.jsonl") if not path.stat().st_size)


def load_folder(folder: Path) -> tuple[Results, ...]:
    """All results of a folder that have a row, in the order in which they were started.

    Raises PetoolError where two files of one setting were made from different data.
    """
    found = sorted(map(load_results, results_files(folder)), key=lambda item: str(item.meta.get("started") or ""))
    check_same_data(found)
    return tuple(found)


def check_same_data(results: Sequence[Results]) -> None:
    """Raises PetoolError that names two files of one setting with other data or other right answers."""
    first: dict[str, Results] = {}
    golds: dict[tuple[str, str], tuple[Any, Results]] = {}
    for item in results:
        setting, data = item.meta["setting"], item.meta["data"]
        other = first.setdefault(setting, item)
        if data["sha256"] != other.meta["data"]["sha256"]:
            raise PetoolError(
                f"{item.path} was made from {data['source']}, {other.path} from {other.meta['data']['source']}: "
                "other data",
                "give each data set a folder of its own",
            )
        for row in item.rows:
            gold, where = golds.setdefault((setting, row["entry_id"]), (row["gold"], item))
            if gold != row["gold"]:
                raise PetoolError(
                    f"{item.path} and {where.path} differ in the right answer of entry {row['entry_id']}",
                    "they come from different data",
                )


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
        """Write the meta file with these changes, and whether all of its entries have a row."""
        self.meta |= changes | {"complete": len(self.rows) == self.meta["entries"]}
        write_json(meta_path(self.path), self.meta)

    def close(self) -> None:
        """Put the rows on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


@contextmanager
def open_store(path: Path, meta: dict[str, Any], fresh: bool, report: Report) -> Iterator[Store]:
    """Open the results file for more rows under `meta`, what it holds included; with `fresh` it starts over.

    A cut last line and failures of the engine are taken out, to be generated again. Raises PetoolError where the file
    was made from other data, another model and so on, or is being written.
    """
    with sole_writer(path, path.with_name(f".{path.name}.lock")):
        if fresh:
            path.unlink(missing_ok=True)
            meta_path(path).unlink(missing_ok=True)
        rows: dict[int, dict[str, Any]] = {}
        if _begun(path):
            meta = continued(path, meta)
            rows = _held(path, report)
        store = Store(path, meta, rows)
        try:
            store.save_meta()
            yield store
        finally:
            store.close()


def _begun(path: Path) -> bool:
    """Whether there is something to go on with: an empty file without its meta is what a full disk left of a start."""
    return path.is_file() and (path.stat().st_size > 0 or meta_path(path).is_file())


def continued(path: Path, meta: dict[str, Any]) -> dict[str, Any]:
    """The meta of a results file that goes on under this command's `meta`; raises PetoolError if it is of other work.

    A file that was begun for more entries than this command asks for stays one for all of them.
    """
    if not _begun(path):
        return meta
    hint = "start over with --fresh, or give another --out"
    try:
        held = json.loads(meta_path(path).read_text())
    except (OSError, ValueError) as error:
        raise PetoolError(f"{path} has no {meta_path(path).name} that says what it was made from", hint) from error
    other = difference(held, meta, {**SAME, "shard": "shard"})
    if other:
        raise PetoolError(f"{path} was made with {other}", hint)
    kept = ["started", "seconds", "peak_memory_gb", "gpu"]
    kept += ["entries", "limit"] if held.get("entries", 0) > meta["entries"] else []
    return meta | {key: held[key] for key in kept if key in held}


def difference(one: Mapping[str, Any], two: Mapping[str, Any], same: Mapping[str, str]) -> str:
    """The first of the keys `same` in which two metas differ, as `another WORD: this, not that`; "" if none."""
    for key, word in same.items():
        old: Any = one.get(key)
        new: Any = two.get(key)
        shown = old, new
        if key == "data" and isinstance(old, dict):
            old, new, shown = old.get("sha256"), new["sha256"], (old.get("source"), new["source"])
        if key == "model_sha256":
            shown = one.get("model"), two.get("model")
        if old != new:
            return f"another {word}: {shown[0]}, not {shown[1]}"
    return ""


def _held(path: Path, report: Report) -> dict[int, dict[str, Any]]:
    """The rows of a file by index, after its repair."""
    if b"\n" not in path.read_bytes():  # nothing, or a first row that was cut
        path.write_bytes(b"")
        return {}
    rows, cut = load_rows(path)
    good = {row["index"]: row for row in rows if row["status"] != "engine_error"}
    if cut:
        report(f"{path.name}: its last line was cut off; that entry is generated again", 0, 0, "")
    if len(good) < len(rows):
        report(f"{path.name}: {len(rows) - len(good)} failures of the engine are tried again", 0, 0, "")
    if cut or len(good) < len(rows) or not path.read_bytes().endswith(b"\n"):
        write_rows(path, good.values())
    return good


def write_rows(path: Path, rows: Any) -> None:
    """Write a whole results file."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
