"""Where entries come from: a file, the demo generator, or a file on the Hub; counted and hashed."""

import hashlib
import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petool_lite.data.demo import generate
from petool_lite.data.entries import SETTINGS, Entry, parse_entry
from petool_lite.errors import USAGE, PetoolError

FORMS = "a .json, .jsonl or zipped .json file, demo:train:COUNT, demo:test:COUNT, or hub:OWNER/NAME/FILE"


@dataclass(frozen=True)
class Dataset:
    """The entries of one source; `total` counts what the source holds before `limit`; sha256 is of its bytes."""

    source: str
    sha256: str
    entries: tuple[Entry, ...]
    total: int


def load_dataset(source: str, setting: str, limit: int = 0) -> Dataset:
    """Read and parse `source` (see FORMS); a `limit` above 0 keeps the first entries only.

    Raises PetoolError that names the file, the entry and the field.
    """
    if setting not in SETTINGS:
        raise PetoolError(f"unknown setting: {setting}", f"one of: {', '.join(SETTINGS)}", USAGE)
    rows, digest = _read(source)
    if not rows:
        raise PetoolError(f"no entries in {source}", "expected a list of PEToolBench entries")
    chosen = rows[:limit] if limit > 0 else rows
    entries = tuple(parse_entry(row, setting, source, index) for index, row in enumerate(chosen))
    identities = [entry.id for entry in entries]
    if len(set(identities)) != len(identities):
        twice = next(identity for identity in identities if identities.count(identity) > 1)
        raise PetoolError(f"{source}: entry_id {twice} occurs more than once", "every entry needs an id of its own")
    return Dataset(source, digest, entries, len(rows))


def _read(source: str) -> tuple[list[Any], str]:
    if source.startswith("demo:"):
        rows = _demo_rows(source)
        return rows, hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    path = _hub_file(source) if source.startswith("hub:") else Path(source).expanduser()
    if not path.is_file():
        raise PetoolError(f"no such data file: {source}", f"give {FORMS}")
    raw = path.read_bytes()
    return _decode(_unzip(raw, path), str(path)), hashlib.sha256(raw).hexdigest()


def _demo_rows(source: str) -> list[Any]:
    _, _, rest = source.partition(":")
    split, _, count = rest.partition(":")
    if split not in ("train", "test") or not count.isdigit() or not int(count):
        raise PetoolError(f"unknown demo data: {source}", "write demo:train:COUNT or demo:test:COUNT")
    return generate(split, int(count))


def _hub_file(source: str) -> Path:
    from huggingface_hub import hf_hub_download

    parts = source.removeprefix("hub:").split("/", 2)
    if len(parts) != 3:
        raise PetoolError(f"unknown hub file: {source}", "write hub:OWNER/NAME/FILE")
    try:
        return Path(hf_hub_download("/".join(parts[:2]), parts[2], repo_type="dataset"))
    except Exception as error:  # the hub client raises many kinds; each means the same to the user
        raise PetoolError(
            f"cannot download {source} ({type(error).__name__})",
            "check the network, or give a local copy: --set data.train=/path/to/file.json",
        ) from error


def _unzip(raw: bytes, path: Path) -> bytes:
    if not zipfile.is_zipfile(io.BytesIO(raw)):
        return raw
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        names = [name for name in archive.namelist() if name.endswith((".json", ".jsonl"))]
        if len(names) != 1:
            raise PetoolError(f"{path} holds {len(names)} JSON files", "expected exactly one")
        try:
            return archive.read(names[0])
        except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
            raise PetoolError(f"cannot unpack {path}: {error}", "get the file again") from error


def _decode(raw: bytes, source: str) -> list[Any]:
    try:
        text = raw.decode("utf-8")
        value = json.loads(text)
    except UnicodeDecodeError as error:
        raise PetoolError(f"{source} is not UTF-8 text (byte {error.start})", f"give {FORMS}") from error
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
            except ValueError as error:
                raise PetoolError(f"{source}, line {number}: not JSON ({error})", f"give {FORMS}") from error
    return rows
