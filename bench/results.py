"""Results files: read, checked row by row, never repaired in silence. The format is described in docs/bench.md."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from petool_lite.errors import PetoolError

SCHEMA = 2
STATUSES = ("ok", "too_long", "engine_error")
_NESTING = 100  # of gold values: far above any real one, far below Python's own limit
_ALIKE = ("variant", "setting", "engine", "decoding", "style")  # one value in a whole file


@dataclass(frozen=True)
class Results:
    """One results file: its rows in the order of the data, its meta, and what had to be left out or is missing."""

    path: Path
    rows: tuple[dict[str, Any], ...]
    meta: dict[str, Any]
    cut_line: bool

    @property
    def name(self) -> str:
        """The variant."""
        return str(self.meta["variant"])


class _Fault(Exception):
    """What is wrong with one row."""


def _is(value: Any, kind: str) -> bool:
    if kind == "text":
        return isinstance(value, str)
    if kind == "flag":
        return isinstance(value, bool)
    if kind == "count":
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53
    if kind == "number":
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and abs(value) < 2**53 and isfinite(value)
    if kind == "amount":
        return _is(value, "number") and value >= 0
    if kind == "names":
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if kind == "counts":
        return isinstance(value, dict) and all(_is(item, "count") for item in value.values())
    return isinstance(value, dict)


_ROW = {"entry_id": "text", "status": "text", "style": "text", "gold": "object", "facts": "object"}
_ROW |= {"variant": "text", "setting": "text", "engine": "text", "decoding": "text", "index": "count"}
_ROW |= {"prompt_tokens": "count", "seconds": "amount"}
_REPLY = {"reply": "text", "reply_tokens": "count", "finish": "text", "prefill_s": "amount", "decode_s": "amount"}
_MORE = {"cached_tokens": "count", "history_dropped": "count", "batch": "count", "cold": "flag"}  # may be absent
_MORE |= {"prompt_sha256": "text", "error": "text"}
_FACTS = {"offered": "names", "same_job": "names", "declared": "names", "history_length": "count", "defaults": "object"}
_META = {"variant": "text", "engine": "text", "decoding": "text", "style": "text", "setting": "text"}
_META |= {"model": "text", "data": "object", "entries": "count", "complete": "flag", "machine": "object"}
_META |= {"versions": "object"}
_META_MORE = {"model_sha256": "text", "model_bytes": "count", "limit": "count", "peak_memory_gb": "amount"}
_META_MORE |= {"seconds": "amount", "gpu": "object", "commit": "text", "max_reply_tokens": "count"}
_DATA = {"source": "text", "sha256": "text", "total": "count"}
_GPU_MORE = {"batch": "count", "flips": "count", "flips_checked": "count", "tokens_per_s": "amount"}
_GPU_MORE |= {"memory_gb": "amount", "flips_by_batch": "counts"}


def _need(value: Mapping[str, Any], kinds: Mapping[str, str], where: str = "") -> None:
    for key, kind in kinds.items():
        if key not in value:
            raise _Fault(f"no {where}{key}")
        if not _is(value[key], kind):
            raise _Fault(f"{where}{key} is no {kind}")


def _allow(value: Mapping[str, Any], kinds: Mapping[str, str], where: str = "") -> None:
    for key, kind in kinds.items():
        if value.get(key) is not None and not _is(value[key], kind):
            raise _Fault(f"{where}{key} is no {kind}")


def _check_schema(value: Mapping[str, Any]) -> None:
    schema = value.get("schema", 1)
    if schema != SCHEMA or isinstance(schema, bool):
        raise _Fault(f"schema {schema}, this petool-lite reads {SCHEMA}")


def _check_row(row: Any) -> None:
    if not isinstance(row, dict):
        raise _Fault("not an object")
    _check_schema(row)
    if row.get("gold") is None:
        raise _Fault("no gold answer to score against")
    _need(row, _ROW)
    _allow(row, _MORE)
    gold, facts = row["gold"], row["facts"]
    _need(gold, {"tool_name": "text", "parameters": "object"}, "gold.")
    if _depth(gold) > _NESTING:
        raise _Fault("gold is nested too deeply")
    _need(facts, _FACTS, "facts.")
    _allow(facts, {"liked_share": "number"}, "facts.")
    if row["status"] not in STATUSES:
        raise _Fault(f"unknown status {row['status']}")
    if row["status"] == "ok":
        _need(row, _REPLY)


def _depth(value: Any) -> int:
    """Levels of nesting, counted by level so that depth costs no recursion; stops above _NESTING."""
    level, found = [value], 0
    while level and found <= _NESTING:
        inner = [item for item in level if isinstance(item, dict | list)]
        level = [part for item in inner for part in (item.values() if isinstance(item, dict) else item)]
        found += 1
    return found


def _parse(line: bytes) -> Any:
    try:
        text = line.decode()
        value = json.loads(text)
    except UnicodeDecodeError:
        raise _Fault("not UTF-8") from None
    except (ValueError, RecursionError):
        raise _Fault("not JSON") from None
    if "\\ud" in text.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except (UnicodeEncodeError, RecursionError):
            raise _Fault("text that is no Unicode") from None
    return value


def load_rows(path: Path) -> tuple[tuple[dict[str, Any], ...], bool]:
    """The checked rows of a results file in the order of the data, and whether a cut last line was left out.

    A last line that was cut while it was written (no line end, no JSON) is left out. Anything else that is wrong
    raises PetoolError with the line: another schema, no gold answer, an entry twice, two variants in one file.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise PetoolError(
            f"no such results file: {path} ({error.strerror})", "give a results-<variant>.jsonl that bench wrote"
        ) from error
    lines = raw.split(b"\n")  # not splitlines: a reply may hold other line ends
    rows: list[dict[str, Any]] = []
    seen: dict[str, int] = {}
    cut = False
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = _parse(line)
        except _Fault as fault:
            if number == len(lines) and rows:
                cut = True
                continue
            raise _bad_line(path, number, fault) from None
        try:
            _check_row(row)
            _check_fit(row, rows, seen)
        except _Fault as fault:
            raise _bad_line(path, number, fault) from None
        seen[row["entry_id"]] = number
        rows.append({key: value for key, value in row.items() if value is not None or key not in _MORE})
    if not rows:
        raise PetoolError(f"{path} has no result", "run bench again")
    return tuple(sorted(rows, key=lambda row: row["index"])), cut


def _check_fit(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], seen: Mapping[str, int]) -> None:
    if row["entry_id"] in seen:
        raise _Fault(f"entry {row['entry_id']} was on line {seen[row['entry_id']]} already")
    for key in _ALIKE:
        if rows and row[key] != rows[0][key]:
            raise _Fault(f"{key} {row[key]}, but {rows[0][key]} above")


def _bad_line(path: Path, number: int, fault: _Fault) -> PetoolError:
    return PetoolError(f"{path}, line {number}: {fault}", "run bench again, or take the line out")


def meta_path(results: Path) -> Path:
    """results-<variant>.meta.json beside results-<variant>.jsonl."""
    return results.with_name(results.name.removesuffix(".jsonl") + ".meta.json")


def load_results(path: Path) -> Results:
    """A results file with its meta file; raises PetoolError if they do not belong together."""
    rows, cut = load_rows(path)
    place = meta_path(path)
    try:
        meta = _parse(place.read_bytes())
        if not isinstance(meta, dict):
            raise _Fault("not an object")
        _check_schema(meta)
        _need(meta, _META)
        _allow(meta, _META_MORE)
        _need(meta["data"], _DATA, "data.")
        _allow(meta.get("gpu") or {}, _GPU_MORE, "gpu.")
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


def results_files(place: str) -> list[Path]:
    """The results file `place`, or all of a folder or run that have a row."""
    path = Path(place).expanduser()
    if not path.is_dir():
        return [path]
    folder = results_folder(place)
    begun = empty_files(folder)
    return [path for path in sorted(folder.glob("results-*.jsonl")) if path.name not in begun]


def results_folder(place: str) -> Path:
    """The folder that holds results-*.jsonl: `place` itself, or the bench folder of the run that it names."""
    path = Path(place).expanduser()
    if path.is_file() and path.name == "report.json":
        path = path.parent
    for folder in (path, path / "bench"):
        if folder.is_dir() and any(folder.glob("results-*.jsonl")):
            return folder
    raise PetoolError(f"no results-<variant>.jsonl in {path}", "give a folder that bench wrote, or a run")


def load_folder(folder: Path) -> tuple[Results, ...]:
    """All results of a folder that have a row, in the order in which they were started.

    Raises PetoolError where two files of one setting were made from different data.
    """
    begun = set(empty_files(folder))
    found = [load_results(path) for path in sorted(folder.glob("results-*.jsonl")) if path.name not in begun]
    found.sort(key=lambda item: str(item.meta.get("started") or ""))
    check_same_data(found)
    return tuple(found)


def empty_files(folder: Path) -> list[str]:
    """Names of results files that were begun and have no row yet."""
    return sorted(path.name for path in folder.glob("results-*.jsonl") if path.stat().st_size == 0)


def check_same_data(results: Sequence[Results]) -> None:
    """Raises PetoolError that names two files of one setting with other data or other right answers."""
    first: dict[str, Results] = {}
    golds: dict[tuple[str, str], tuple[Any, Results]] = {}
    for item in results:
        setting = item.meta["setting"]
        other = first.setdefault(setting, item)
        if item.meta["data"]["sha256"] != other.meta["data"]["sha256"]:
            raise PetoolError(
                f"{item.path} was made from {item.meta['data']['source']}, {other.path} from "
                f"{other.meta['data']['source']}: other data",
                "give each data set a folder of its own",
            )
        for row in item.rows:
            gold, where = golds.setdefault((setting, row["entry_id"]), (row["gold"], item))
            if gold != row["gold"]:
                raise PetoolError(
                    f"{item.path} and {where.path} differ in the right answer of entry {row['entry_id']}",
                    "they come from different data",
                )
