"""Where entries come from: a file in any known form, the demo generator, or a data set on the Hub."""

import gzip
import hashlib
import io
import json
import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from glob import glob
from pathlib import Path
from typing import Any

from petool_lite.data import openai, petoolbench
from petool_lite.data.answers import answer_faults
from petool_lite.data.demo import generate
from petool_lite.data.entries import Entry, Tool, check_setting
from petool_lite.data.fetch import data_files, fetch
from petool_lite.data.fields import Fault, is_unicode
from petool_lite.data.openai import entry_line
from petool_lite.data.simulate import Example, examples_of, simulate
from petool_lite.data.splits import folds
from petool_lite.errors import PetoolError
from petool_lite.runs import draft
from petool_lite.text import decode_text, parse_json, parse_json_lines

FORMS = (
    "a .json or .jsonl file, also zipped or .gz; demo:train:COUNT, demo:test:COUNT, hub:OWNER/NAME[/FILE], "
    "simulated:COUNT:FILES (calls and tool lists, such as logs/*.jsonl); history:USER, history:* (what was liked); "
    "several with their copies: A + 4 * B"
)
KNOWN = "OpenAI messages with tools, Hermes or ShareGPT conversations, xLAM query/tools/answers, PEToolBench entries"

_UNPACKED, _RATIO = 64 << 20, 100  # bytes, and times its packed size, beyond which a packed file is not believed


@dataclass(frozen=True)
class Dataset:
    """The entries of one source; `total` counts its rows, `bad` says what was wrong with those left out."""

    source: str
    sha256: str
    entries: tuple[Entry, ...]
    total: int
    bad: tuple[str, ...] = ()


def source_sha256(source: str) -> str:
    """SHA-256 of a source's bytes, without parsing them."""
    if parts := _mixed(source):
        return _joint(f"{times} * {source_sha256(part)}" for times, part in parts)
    if source.startswith("simulated:"):
        count, paths = _corpus(source)
        return _joint([count, *(source_sha256(path) for path in paths)])
    if source.startswith("history:"):
        return _read(source)[1]
    return hashlib.sha256(_bytes(source)[0]).hexdigest()


def load_dataset(source: str, setting: str = "rating", skip_bad: bool = False) -> Dataset:
    """Read and parse `source` (see FORMS), whose rows are of a form in KNOWN; `setting` is for PEToolBench's. A broken
    row raises PetoolError that names file, row and field; with `skip_bad` it goes, and its message into `bad`."""
    check_setting(setting)
    if _mixed(source):
        return _mixture(source, setting, skip_bad)
    rows, digest = _read(source)
    if not rows:
        raise PetoolError(f"{source} is empty: no entries in it", f"expected {KNOWN}")
    entries: dict[str, Entry] = {}
    bad: list[str] = []
    for index, row in enumerate(rows):
        try:
            entry = _parse(row, setting, index)
            if entries.setdefault(entry.id, entry) is not entry:
                raise Fault("entry_id", f"an id of its own, found {entry.id} again")
        except Fault as fault:
            known = isinstance(row, Mapping) and row.get("entry_id") is not None
            named = f" (entry_id {str(row['entry_id'])[:40]!a})" if known else ""
            bad.append(f"{source}, entry {index}{named}, {fault}")
            if not skip_bad:
                hint = "mend it, or leave such entries out: --skip-bad, data.skip_bad=true"
                raise PetoolError(bad[0], hint) from fault
    return Dataset(source, digest, tuple(entries.values()), len(rows), tuple(bad))


def _parts(source: str) -> list[tuple[int, str]]:
    """The sources that are joined by " + ", and how many times each is taken: `A + 4 * B`."""
    found = [re.fullmatch(r"(?:(\d{1,4}) \* )?(.*)", part.strip(), re.DOTALL) for part in source.split(" + ")]
    return [(int(match[1] or 1), match[2]) for match in found if match]


def _mixed(source: str) -> list[tuple[int, str]]:
    parts = _parts(source)
    return parts if len(parts) > 1 or parts[0][0] > 1 else []


def _joint(digests: Iterable[Any]) -> str:
    return hashlib.sha256("\n".join(map(str, digests)).encode()).hexdigest()


def _mixture(source: str, setting: str, skip_bad: bool) -> Dataset:
    """The entries of several sources, each as often as it says; ids tell source and copy."""
    entries, total, bad, digests = list[Entry](), 0, list[str](), list[str]()
    for number, (times, part) in enumerate(_parts(source)):
        one = load_dataset(part, setting, skip_bad)
        digests.append(f"{times} * {one.sha256}")
        total, bad = total + times * one.total, [*bad, *one.bad]
        for copy in range(times):
            entries += (replace(entry, id=f"{number}-{copy}:{entry.id}") for entry in one.entries)
    return Dataset(source, _joint(digests), tuple(entries), total, tuple(bad))


def _corpus(source: str) -> tuple[int, list[str]]:
    count, _, names = source.removeprefix("simulated:").partition(":")
    paths: list[str] = []
    for name in map(str.strip, names.split(",")):
        paths += [name] if name.startswith(("history:", "demo:")) else sorted(glob(str(Path(name).expanduser())))
    if not 0 < _count(count) < 10**7 or not paths:
        what = f"no file matches {names}" if _count(count) and names else f"unknown simulated data: {source}"
        raise PetoolError(what, "write simulated:COUNT:FILES, such as logs/*.jsonl")
    return _count(count), paths


def load_corpus(paths: Iterable[Path | str], skip_bad: bool = True) -> tuple[list[Example], list[Tool]]:
    """The calls of the files, and the tools of those that are lists of tools, or MCP results with one."""
    calls, tools = list[Example](), list[Tool]()
    for path in map(str, paths):
        value = None if path.startswith("history:") else _value(_text(path)[0], path)
        first = value[0] if isinstance(value, list) and value else value
        keys = set(first) if isinstance(first, Mapping) and not _is_entry(first) else set()
        if keys & {"name", "function", "tool_name", "tools", "result"}:
            tools += load_tools(path)
        else:
            calls += examples_of(load_dataset(path, skip_bad=skip_bad).entries)
    return calls, tools


def _is_entry(row: Mapping[str, Any]) -> bool:
    return openai.is_row(row) or petoolbench.is_row(row)


def _parse(row: Any, setting: str, index: int) -> Entry:
    if not isinstance(row, Mapping):
        raise Fault("", "an object")
    if openai.is_row(row):
        entry = openai.parse(row, str(index))
        if wrong := answer_faults(entry):
            raise Fault("", f"a sound answer, but {'; '.join(wrong)}")
        return entry
    if petoolbench.is_row(row) or "query" in row or "input" in row:
        return petoolbench.parse(row, setting, str(index))
    raise Fault("", KNOWN)


def load_tools(source: str) -> tuple[Tool, ...]:
    """Tools from a file, packed or not, in any form, as a list, one a line, or an MCP `tools/list` result."""
    try:
        return openai.read_tools(_value(_text(source)[0], source))
    except Fault as fault:
        hint = "expected OpenAI functions, an MCP tools/list result, or such a list"
        raise PetoolError(f"{source}: {fault}", hint) from fault


def raw_rows(source: str) -> list[Any]:
    """The rows of `source` as they stand there, unparsed."""
    return [row for times, part in _parts(source) for _ in range(times) for row in _read(part)[0]]


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    """Write JSON Lines, one row at a time; what is no text in Unicode as an escape, to be named when it is read."""
    with draft(path) as work, work.open("w", encoding="utf-8") as file:
        for row in rows:
            line = json.dumps(row, ensure_ascii=False)
            file.write(f"{line if is_unicode(line) else json.dumps(row)}\n")


def write_folds(source: str, setting: str, count: int, seed: int, folder: Path) -> dict[Path, int]:
    """Write `folder`/foldN-test.jsonl and -train.jsonl for the folds of a source (see `splits`). Returns the number of
    entries in each file; they stand there as in the source."""
    parts = folds(load_dataset(source, setting).entries, count, seed)
    rows, written = raw_rows(source), {}
    for number, part in enumerate(parts):
        chosen = {"test": part, "train": [index for other in parts if other is not part for index in other]}
        for name, indexes in chosen.items():
            path = folder / f"fold{number}-{name}.jsonl"
            write_lines(path, [rows[index] for index in sorted(indexes)])
            written[path] = len(indexes)
    return written


def _bytes(source: str) -> tuple[bytes, Path]:
    """What a source holds, packed as it is, and its path."""
    if source.startswith("demo:"):
        split, _, count = source.removeprefix("demo:").partition(":")
        if split not in ("train", "test") or not 0 < (number := _count(count)) < 10**6:
            raise PetoolError(f"unknown demo data: {source}", "write demo:train:COUNT or demo:test:COUNT")
        return json.dumps(generate(split, number)).encode(), Path(source)
    path = _hub_file(source) if source.startswith("hub:") else Path(source).expanduser()
    if not path.is_file():
        told = f"{source} is a folder, not a data file" if path.is_dir() else f"no such data file: {source}"
        raise PetoolError(told, f"give {FORMS}")
    try:
        return path.read_bytes(), path
    except OSError as error:
        raise PetoolError(f"cannot read {path}: {error.strerror or error}", "check its rights") from error


def _read(source: str) -> tuple[list[Any], str]:
    if source.startswith("simulated:"):
        count, paths = _corpus(source)
        return [entry_line(entry) for entry in simulate(*load_corpus(paths), count, 0)], source_sha256(source)
    if source.startswith("history:"):
        from petool_lite.memory.lines import training_rows

        rows = training_rows(source)
        return rows, hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    text, digest = _text(source)
    value = _value(text, source) if text.strip() else []
    if isinstance(value, dict) and (_is_entry(value) or "query" in value):
        value = [value]  # a .jsonl file of one line
    if not isinstance(value, list):
        raise PetoolError(f"{source} is not a list of entries", f"expected {KNOWN}")
    return value, digest


def _text(source: str) -> tuple[str, str]:
    """The unpacked text of a source, and the SHA-256 of its bytes."""
    raw, path = _bytes(source)
    return decode_text(_unpacked(raw, path), str(path)), hashlib.sha256(raw).hexdigest()


def _value(text: str, source: str) -> Any:
    """The value of a JSON text, or the list of those that stand one a line."""
    try:
        return parse_json(text, source)
    except PetoolError:
        if not (text.lstrip().startswith("{") and "\n" in text.strip()):
            raise
        return parse_json_lines(text, source)


def _count(text: str) -> int:
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else 0


def _hub_file(source: str) -> Path:
    parts = source.removeprefix("hub:").split("/", 2)
    if len(parts) < 2 or not all(parts):
        raise PetoolError(f"unknown hub file: {source}", "write hub:OWNER/NAME or hub:OWNER/NAME/FILE")
    repo = "/".join(parts[:2])
    if len(parts) == 3:
        return fetch(repo, [parts[2]])[0].path
    names = data_files(repo)
    if len(names) != 1:
        held = ", ".join(names[:12]) or "no .json or .jsonl file"
        raise PetoolError(f"{source} does not say which file", f"write hub:{repo}/FILE; it holds {held}")
    return fetch(repo, names)[0].path


def _unpacked(raw: bytes, path: Path) -> bytes:
    """The bytes of a file that may be zipped or gzipped, both known by their content."""
    try:
        if raw[:2] == b"\x1f\x8b":
            with gzip.GzipFile(fileobj=io.BytesIO(raw)) as file:
                found = file.read(max(_UNPACKED, _RATIO * len(raw)) + 1)
            _check_size(len(raw), len(found), path)
            return found
        if not zipfile.is_zipfile(io.BytesIO(raw)):
            return raw
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            names = [name for name in archive.namelist() if name.endswith((".json", ".jsonl"))]
            if len(names) != 1:
                raise PetoolError(f"{path} holds {len(names)} JSON files", "expected exactly one")
            facts = archive.getinfo(names[0])
            _check_size(facts.compress_size, facts.file_size, path)
            return archive.read(names[0])
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError) as error:
        raise PetoolError(f"cannot unpack {path}: {error}", "get the file again") from error


def _check_size(packed: int, unpacked: int, path: Path) -> None:
    if unpacked > _UNPACKED and unpacked > _RATIO * packed:
        raise PetoolError(f"{path} unpacks {packed:,} bytes to {unpacked:,}", "no text packs that well")
