"""Results: a JSON line a reply and a meta file, as report.schema.json says; rows of different work never mix."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from petool_lite.bench.score import Score, error_class, score_row
from petool_lite.console import Report
from petool_lite.data.files import write_lines
from petool_lite.errors import USAGE, PetoolError, in_words
from petool_lite.runs import write_json

ROWS_SCHEMA = 3
_ALIKE = ("variant", "setting", "engine", "decoding", "style")  # one value in a whole file
_AGAIN = "run bench again with --fresh, or take the line or the file away"
_LONGEST = 160  # characters of what is wrong with a row
# What must be as before for rows to be added, and what shards have in common, in the words of a refusal.
_SAME = {"data": "data set", "setting": "setting", "style": "prompt style",
         "model_sha256": "model", "engine": "engine", "decoding": "decoding", "max_reply_tokens": "reply limit",
         "variant": "variant"}  # fmt: skip


@dataclass(frozen=True)
class Results:
    """One results file: rows in the order of the data, meta, whether its last line was cut, and its name in reports."""

    path: Path
    rows: tuple[dict[str, Any], ...]
    meta: dict[str, Any]
    cut_line: bool
    name: str

    @cached_property
    def triples(self) -> dict[str, tuple[dict[str, Any], Score, str]]:
        """Row, score and class of error of each entry by its id."""
        scored = ((row, score_row(row)) for row in self.rows)
        return {row["entry_id"]: (row, score, error_class(row, score)) for row, score in scored}

    @property
    def by_entry(self) -> dict[str, Score]:
        """Scores of the rows whose engine did not fail, by entry id."""
        return {key: score for key, (_, score, kind) in self.triples.items() if kind != "engine_error"}


@lru_cache
def _validator(kind: str) -> Any:
    from jsonschema import Draft202012Validator

    text = resources.files("petool_lite.bench").joinpath("report.schema.json").read_text(encoding="utf-8")
    return Draft202012Validator({"$defs": json.loads(text)["$defs"], "$ref": f"#/$defs/{kind}"})


def _checked(text: bytes, kind: str, place: str) -> dict[str, Any]:
    """A row or meta that follows its schema and can be written again; raises PetoolError that names `place`."""
    try:
        value = json.loads(text.decode())
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        raise PetoolError(f"{place}: not JSON in UTF-8", _AGAIN) from None
    schema = value.get("schema", 1) if isinstance(value, dict) else ROWS_SCHEMA
    if schema != ROWS_SCHEMA:
        what = f"{place}: made by another version of petool-lite (schema {schema}, this one reads {ROWS_SCHEMA})"
        raise PetoolError(what, _AGAIN)
    fault = next(_validator(kind).iter_errors(value), None)
    if fault is not None:
        field = fault.json_path.removeprefix("$").lstrip(".")[:_LONGEST]
        raise PetoolError(f"{place}: {f'{field} {fault.message[-_LONGEST:]}'.strip()}", _AGAIN)
    return dict(value)


def meta_path(results: Path) -> Path:
    """results-<variant>.meta.json beside results-<variant>.jsonl."""
    return results.with_name(results.name.removesuffix(".jsonl") + ".meta.json")


def load_results(path: Path) -> Results:
    """A results file, rows in the order of the data. A cut last line is left out; other faults raise PetoolError."""
    place, rows = meta_path(path), dict[str, dict[str, Any]]()
    hint = "give a results-<variant>.jsonl that bench wrote, with its meta file"
    with in_words(f"no such results file: {path}", hint, OSError):
        *lines, last = path.read_bytes().split(b"\n")  # not splitlines: a reply may hold other line ends
        meta = _checked(place.read_bytes(), "meta", str(place))
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        row = _checked(line, "row", where)
        for key in _ALIKE:
            if row[key] != meta[key]:
                raise PetoolError(f"{where}: {key} {row[key]}, but {meta[key]} in {place.name}", _AGAIN)
        if row["entry_id"] in rows:
            raise PetoolError(f"{where}: entry {row['entry_id']} is there already", _AGAIN)
        rows[row["entry_id"]] = row
    if not rows:
        raise PetoolError(f"{path} has no result", "run bench again")
    if len(rows) > meta["entries"]:
        raise PetoolError(f"{place}: {meta['entries']} entries, but {path.name} has {len(rows)}", _AGAIN)
    ordered = sorted(rows.values(), key=lambda row: row["index"])
    return Results(path, tuple(ordered), meta, bool(last.strip()), meta["variant"])


def results_folder(place: str) -> Path:
    """The folder that holds results-*.jsonl: `place` itself, or the bench folder of the run that it names."""
    path = Path(place).expanduser()
    for folder in (path, path / "bench"):
        if folder.is_dir() and any(folder.glob("results-*.jsonl")):
            return folder
    raise PetoolError(f"no results-<variant>.jsonl in {path}", "give a folder that bench wrote, or a run")


def results_files(folder: Path) -> list[Path]:
    """The results files of a folder, but those that were begun and have no row yet."""
    return sorted(path for path in folder.glob("results-*.jsonl") if path.stat().st_size)


def load_folder(*folders: Path) -> list[Results]:
    """All results that have a row, by folder and start, under names of their own; PetoolError where these clash."""
    loaded = (map(load_results, results_files(folder)) for folder in folders)
    found = [item for items in loaded for item in sorted(items, key=lambda item: str(item.meta.get("started") or ""))]
    check_same_data({item.path: item.meta for item in found})
    variants = [item.name for item in found]
    named: dict[str, Results] = {}
    for item in found:
        name = f"{item.name} ({item.meta['setting']})" if variants.count(item.name) > 1 else item.name
        if name in named:
            raise PetoolError(f"the variant {item.name} occurs twice, as in {item.path}", "make a report of each run")
        named[name] = replace(item, name=name)
    return list(named.values())


def check_same_data(metas: Mapping[Path, Mapping[str, Any]]) -> None:
    """Raises PetoolError that names two results files of one setting that were made from different data."""
    first: dict[str, tuple[Path, Mapping[str, Any]]] = {}
    for path, meta in metas.items():
        other, known = first.setdefault(meta["setting"], (path, meta["data"]))
        if known["sha256"] != meta["data"]["sha256"]:
            what = f"{path} was made from {meta['data']['source']}, {other} from {known['source']}: other data"
            raise PetoolError(what, "give each data set a folder of its own")


class Store:
    """A results file that rows are added to: its meta, and by index the rows that it holds once it is open."""

    def __init__(self, path: Path, meta: dict[str, Any], fresh: bool) -> None:
        """Nothing is written yet. Raises PetoolError if the file is of other work than this command's `meta`, and is
        not to start `fresh`. One begun for more entries than this command asks for stays a file for all of them."""
        self.path, self.meta, self.rows = path, meta, dict[int, dict[str, Any]]()
        place = meta_path(path)
        # an empty file without its meta is what a full disk left of a start
        self._goes_on = not fresh and path.is_file() and (path.stat().st_size > 0 or place.is_file())
        if not self._goes_on:
            return
        hint = "start over with --fresh, or give another --out"
        with in_words(f"{path} has no {place.name} that says what it was made from", hint, OSError):
            held = _checked(place.read_bytes(), "meta", str(place))
        if other := _difference(held, meta, "shard"):
            raise PetoolError(f"{path} was made with {other}", hint)
        kept = ["started", "seconds", "peak_memory_gb", "gpu"]
        kept += ["entries", "limit"] if held["entries"] > meta["entries"] else []
        self.meta = meta | {key: held[key] for key in kept if key in held}

    @contextmanager
    def opened(self, report: Report) -> Iterator[None]:
        """Take more rows: those cut off or failed are made again. The caller holds the folder."""
        if self._goes_on:
            self.rows = _held(self.path, report)
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for old in (self.path, meta_path(self.path)):
                old.unlink(missing_ok=True)
        with self.path.open("a", encoding="utf-8") as self._file:
            self.save_meta()
            try:
                yield
            finally:
                self._file.flush()
                os.fsync(self._file.fileno())

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row, so that it stays whatever happens to this process next."""
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()
        self.rows[row["index"]] = dict(row)

    def save_meta(self, **changes: Any) -> None:
        """Write the meta file with these changes, and whether all of its entries have a row."""
        self.meta |= changes | {"complete": len(self.rows) == self.meta["entries"]}
        write_json(meta_path(self.path), self.meta)


def _difference(one: Mapping[str, Any], two: Mapping[str, Any], *more: str) -> str:
    """The first fact of _SAME, or of `more`, in which two metas differ: `another WORD: this, not that`; "" if none."""
    for key, word in {**_SAME, **dict(zip(more, more, strict=True))}.items():
        old, new = ((meta[key]["sha256"] if key == "data" else meta.get(key)) for meta in (one, two))
        if old != new:
            told = {"model_sha256": "model", "data": "data"}.get(key, key)
            shown = [meta[told]["source"] if key == "data" else meta.get(told) for meta in (one, two)]
            return f"another {word}: {shown[0]}, not {shown[1]}"
    return ""


def _held(path: Path, report: Report) -> dict[int, dict[str, Any]]:
    """The rows that stay, by index; the file has no others afterwards."""
    if b"\n" not in path.read_bytes():  # nothing, or a first row that was cut
        path.write_bytes(b"")
        return {}
    found = load_results(path)
    good = {row["index"]: row for row in found.rows if row["status"] != "engine_error"}
    failed = len(found.rows) - len(good)
    if found.cut_line:
        report(f"{path.name}: its last line was cut off; that entry is generated again", 0, 0, "")
    if failed:
        report(f"{path.name}: {failed} failures of the engine are tried again", 0, 0, "")
    if failed or found.cut_line:
        write_lines(path, good.values())
    return good


def merge_shards(folders: Sequence[Path], target: Path) -> None:
    """Merge the shards' results into `target`. PetoolError, before any writing, for one absent, double or unlike."""
    if target.resolve() in [folder.resolve() for folder in folders]:
        raise PetoolError(f"{target} is one of the shards", "give another --out", USAGE)
    names = sorted({path.name for folder in folders for path in folder.glob("results-*.jsonl")})
    if not names:
        raise PetoolError(f"no results-<variant>.jsonl in {folders[0]}", "give the folders of finished shards")
    for name, parts in {name: _shards(name, folders) for name in names}.items():
        metas = [part.meta for part in parts]
        meta = metas[0] | {key: round(sum(meta[key] for meta in metas), 2) for key in ("entries", "seconds")}
        meta |= {"shard": None, "peak_memory_gb": max(meta["peak_memory_gb"] or 0.0 for meta in metas)}
        write_lines(target / name, sorted((row for part in parts for row in part.rows), key=lambda row: row["index"]))
        write_json(meta_path(target / name), meta)


def _shards(name: str, folders: Sequence[Path]) -> list[Results]:
    """One variant's results of every shard; raises PetoolError where they do not make a whole."""
    parts = [load_results(folder / name) for folder in folders]
    shards = [part.meta.get("shard") or [0, 0] for part in parts]
    if sorted(shards) != [[place, len(parts)] for place in range(len(parts))]:
        told = ", ".join(f"{part.path} is shard {one}/{of}" for part, (one, of) in zip(parts, shards, strict=True))
        what = f"these are not all shards of one bench, each once: {told}"
        raise PetoolError(what, "they come from bench --shard i/n")
    for part in parts:
        if not part.meta["complete"]:
            what = f"{part.path} is not finished: {len(part.rows)} of {part.meta['entries']} entries"
            raise PetoolError(what, "run it again")
        if other := _difference(part.meta, parts[0].meta, "limit", "versions", "commit"):
            hint = "shards of one bench need the same data, model and settings"
            raise PetoolError(f"{part.path} and {parts[0].path} have {other}", hint)
    return parts
