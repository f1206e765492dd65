"""Where entries come from: a file, the demo generator, or a file on the Hub; counted and hashed."""

import hashlib
import io
import json
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petool_lite.data.demo import generate
from petool_lite.data.entries import Entry, check_setting, parse_entry
from petool_lite.data.fetch import fetch
from petool_lite.data.splits import folds
from petool_lite.errors import PetoolError
from petool_lite.runs import write_text

FORMS = "a .json, .jsonl or zipped .json file, demo:train:COUNT, demo:test:COUNT, or hub:OWNER/NAME/FILE"

_UNPACKED, _RATIO = 64 << 20, 100  # bytes, and times its packed size, beyond which a zipped file is not believed


@dataclass(frozen=True)
class Dataset:
    """The entries of one source; `total` counts what the source holds before `limit`; sha256 is of its bytes."""

    source: str
    sha256: str
    entries: tuple[Entry, ...]
    total: int
    bad: tuple[str, ...] = ()


def source_sha256(source: str) -> str:
    """SHA-256 of a source's bytes, without parsing them."""
    if source.startswith("demo:"):
        return hashlib.sha256(json.dumps(_demo_rows(source)).encode()).hexdigest()
    with _path(source).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _path(source: str) -> Path:
    path = _hub_file(source) if source.startswith("hub:") else Path(source).expanduser()
    if path.is_dir():
        raise PetoolError(f"{source} is a folder, not a data file", f"give {FORMS}")
    if not path.is_file():
        raise PetoolError(f"no such data file: {source}", f"give {FORMS}")
    return path


def load_dataset(source: str, setting: str, limit: int = 0, skip_bad: bool = False) -> Dataset:
    """Read and parse `source` (see FORMS); a `limit` above 0 keeps the first entries only.

    A broken entry raises PetoolError that names the file, the entry and the field; with `skip_bad` it is left out and
    its message kept in `bad`.
    """
    check_setting(setting)
    rows, digest = _read(source)
    if not rows:
        raise PetoolError(f"{source} is empty: no entries in it", "expected a list of PEToolBench entries")
    chosen = rows[:limit] if limit > 0 else rows
    entries, bad, seen = [], [], set()
    for index, row in enumerate(chosen):
        try:
            entry = parse_entry(row, setting, source, index)
            if entry.id in seen:
                raise PetoolError(
                    f"{source}: entry_id {entry.id} occurs more than once", "every entry needs its own id"
                )
        except PetoolError as error:
            if not skip_bad:
                raise
            bad.append(error.message)
            continue
        seen.add(entry.id)
        entries.append(entry)
    return Dataset(source, digest, tuple(entries), len(rows), tuple(bad))


def raw_rows(source: str) -> list[Any]:
    """The entries of `source` as they stand there, unparsed."""
    return _read(source)[0]


def write_folds(source: str, setting: str, count: int, seed: int, folder: Path) -> dict[Path, int]:
    """Write `folder`/foldN-test.jsonl and -train.jsonl for the folds of a source (see `splits`).

    Returns the number of entries in each file; they stand there as in the source.
    """
    parts = folds(load_dataset(source, setting).entries, count, seed)
    rows, written = raw_rows(source), {}
    for number, part in enumerate(parts):
        chosen = {"test": part, "train": [index for other in parts if other is not part for index in other]}
        for name, indexes in chosen.items():
            path = folder / f"fold{number}-{name}.jsonl"
            write_text(path, "".join(json.dumps(rows[i], ensure_ascii=False) + "\n" for i in sorted(indexes)))
            written[path] = len(indexes)
    return written


def _read(source: str) -> tuple[list[Any], str]:
    if source.startswith("demo:"):
        rows = _demo_rows(source)
        return rows, hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    path = _path(source)
    raw = path.read_bytes()
    return _decode(_unzip(raw, path), str(path)), hashlib.sha256(raw).hexdigest()


def _demo_rows(source: str) -> list[Any]:
    _, _, rest = source.partition(":")
    split, _, count = rest.partition(":")
    if split not in ("train", "test") or not count.isdigit() or not int(count):
        raise PetoolError(f"unknown demo data: {source}", "write demo:train:COUNT or demo:test:COUNT")
    return generate(split, int(count))


def _hub_file(source: str) -> Path:
    parts = source.removeprefix("hub:").split("/", 2)
    if len(parts) != 3:
        raise PetoolError(f"unknown hub file: {source}", "write hub:OWNER/NAME/FILE")
    return fetch("/".join(parts[:2]), [parts[2]])[0].path


def _unzip(raw: bytes, path: Path) -> bytes:
    if not zipfile.is_zipfile(io.BytesIO(raw)):
        return raw
    with _opened(raw, path) as archive:
        names = [name for name in archive.namelist() if name.endswith((".json", ".jsonl"))]
        if len(names) != 1:
            raise PetoolError(f"{path} holds {len(names)} JSON files", "expected exactly one")
        facts = archive.getinfo(names[0])
        if facts.file_size > _UNPACKED and facts.file_size > _RATIO * facts.compress_size:
            raise PetoolError(
                f"{path} unpacks {facts.compress_size:,} bytes to {facts.file_size:,}", "no text packs that well"
            )
        try:
            return archive.read(names[0])
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError) as error:
            raise PetoolError(f"cannot unpack {path}: {error}", "get the file again") from error


def _opened(raw: bytes, path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(io.BytesIO(raw))
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as error:
        raise PetoolError(f"cannot unpack {path}: {error}", "get the file again") from error


def _decode(raw: bytes, source: str) -> list[Any]:
    try:
        text = raw.decode("utf-8")
        value = json.loads(text) if text.strip() else []
    except UnicodeDecodeError as error:
        raise PetoolError(f"{source} is not UTF-8 text (byte {error.start})", f"give {FORMS}") from error
    except RecursionError as error:
        raise PetoolError(f"{source} is nested too deep", f"give {FORMS}") from error
    except ValueError as error:
        rows = _json_lines(text, source) if text.lstrip().startswith("{") else None
        if rows is None:
            raise PetoolError(f"{source} is not JSON: {error}", f"give {FORMS}") from error
        return rows
    if isinstance(value, dict) and ("query" in value or "input" in value):
        return [value]  # a .jsonl file of one line
    if not isinstance(value, list):
        raise PetoolError(f"{source} is not a list of entries", "expected a JSON list of objects")
    return value


def _json_lines(text: str, source: str) -> list[Any]:
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise PetoolError(f"{source}, line {number}: not JSON ({error})", f"give {FORMS}") from error
    return rows
