"""Where entries come from: a file in any known form, the demo generator, or a data set on the Hub."""

import errno
import gzip
import hashlib
import io
import json
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from glob import glob
from pathlib import Path, PurePosixPath
from typing import Any

from petool_lite.console import Report, silent
from petool_lite.data import SETTINGS, demo, openai, petoolbench, values
from petool_lite.data.answers import answer_faults
from petool_lite.data.entries import Entry, Tool, check_setting
from petool_lite.data.fields import Fault, is_unicode
from petool_lite.data.openai import entry_line
from petool_lite.data.simulate import Example, examples_of, simulate
from petool_lite.data.splits import folds
from petool_lite.errors import USAGE, PetoolError, first_line, in_words
from petool_lite.places import library_places
from petool_lite.runs import draft
from petool_lite.text import decode_text, parse_json

FORMS = (
    "a .json or .jsonl file, also zipped or .gz; demo:train:COUNT, demo:test:COUNT, values:COUNT (calls of 169 "
    "functions, so many of each), hub:OWNER/NAME[/FILE], simulated:COUNT[/SEED][@SETTING]:FILES (calls and tool "
    "lists, such as logs/*.jsonl); history:USER, history:* (what was liked); several with their copies: A + 4 * B"
)
KNOWN = "OpenAI messages with tools, Hermes or ShareGPT conversations, xLAM query/tools/answers, PEToolBench entries"
REPO = "travisxu/PEToolBench"
FILES = tuple(f"user_entries_{split}_{setting}.json" for split in ("sft", "test") for setting in "prc")
_LOCAL_COPY = "or give a local copy: --set data.train=/path/to/file.json"

_Part = tuple[int, str, list[Any], str]  # of a source: how often it is taken, its own source, rows and SHA-256
_UNPACKED, _RATIO = 64 << 20, 100  # bytes, and times its packed size, beyond which a packed file is not believed


@dataclass(frozen=True)
class Dataset:
    """The entries of one source; `total` counts its rows, `bad` says what was wrong with those left out."""

    source: str
    sha256: str
    entries: tuple[Entry, ...]
    total: int
    bad: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fetched:
    """One file on this disk and the commit (40 hex digits) it came from."""

    name: str
    path: Path
    revision: str


def source_sha256(source: str) -> str:
    """SHA-256 of a source's bytes, without parsing them."""
    return _joint([(times, _part_sha256(part)) for times, part in _parts(source)])


def load_dataset(source: str, setting: str = "rating", skip_bad: bool = False) -> Dataset:
    """Read and parse `source` (see FORMS), whose rows are of a form in KNOWN; `setting` is for PEToolBench's. A broken
    row raises PetoolError that names file, row and field; with `skip_bad` it goes, and its message into `bad`."""
    check_setting(setting)
    parts = ((times, part, *_read(part)) for times, part in _parts(source))
    return _parsed(source, parts, setting, skip_bad)


def load_settings(source: str, skip_bad: bool = False) -> list[Dataset]:
    """`load_dataset` in each setting that entries have prompts for, read once; entries without one are in the first."""
    parts = [(times, part, *_read(part)) for times, part in _parts(source)]
    settings = dict.fromkeys(name for _, _, rows, _ in parts for row in rows for name in petoolbench.settings_of(row))
    return [_parsed(source, parts, name, skip_bad, others=not number) for number, name in enumerate(settings)]


def _parsed(source: str, parts: Iterable[_Part], setting: str, skip_bad: bool, others: bool = True) -> Dataset:
    """The entries of each part, as often as it is taken, with `others` than PEToolBench's; ids tell part and copy."""
    entries, total, bad, digests = list[Entry](), 0, list[str](), list[tuple[int, str]]()
    for number, (times, part, rows, digest) in enumerate(parts):
        if not rows:
            raise PetoolError(f"{part} is empty: no entries in it", f"expected {KNOWN}")
        own: dict[str, Entry] = {}
        chosen = [(index, row) for index, row in enumerate(rows) if others or _reader(row) is petoolbench]
        for index, row in chosen:
            try:
                entry = _parse(row, setting, index)
                if own.setdefault(entry.id, entry) is not entry:
                    raise Fault("entry_id", f"an id of its own, found {entry.id} again")
            except Fault as fault:
                known = isinstance(row, Mapping) and row.get("entry_id") is not None
                named = f" (entry_id {str(row['entry_id'])[:40]!a})" if known else ""
                bad.append(f"{part}, entry {index}{named}, {fault}")
                if not skip_bad:
                    raise PetoolError(bad[-1], "mend it, or leave such out: --skip-bad, data.skip_bad=true") from fault
        total += times * len(chosen)
        digests.append((times, digest))
        for copy in range(times):
            taken = own.values()
            entries += taken if part == source else (replace(one, id=f"{number}-{copy}:{one.id}") for one in taken)
    return Dataset(source, _joint(digests), tuple(entries), total, tuple(bad))


def _parts(source: str) -> list[tuple[int, str]]:
    """The sources that are joined by " + ", and how many times each is taken: `A + 4 * B`."""
    found = [re.fullmatch(r"(?:(\d{1,4}) \* )?(.*)", part.strip(), re.DOTALL) for part in source.split(" + ")]
    return [(int(match[1] or 1), match[2]) for match in found if match]


def _joint(digests: Sequence[tuple[int, str]]) -> str:
    """The digest of a source by its parts': that of the part, where there is one, taken once."""
    (times, digest), *more = digests
    return _hashed([f"{count} * {one}" for count, one in digests]) if more or times > 1 else digest


def _hashed(lines: Iterable[Any]) -> str:
    return hashlib.sha256("\n".join(map(str, lines)).encode()).hexdigest()


def _corpus(source: str) -> tuple[Any, ...]:
    """How many entries `simulated:COUNT:FILES` has, their seed (`COUNT/SEED`), setting (`COUNT@SETTING`) and files."""
    hint = f"write simulated:COUNT:FILES, such as logs/*.jsonl, or COUNT/SEED@SETTING with one of {', '.join(SETTINGS)}"
    form = rf"simulated:([1-9][0-9]{{0,6}})(?:/([0-9]{{1,9}}))?(?:@({'|'.join(SETTINGS)}))?:(.+)"
    if not (found := re.fullmatch(form, source, re.DOTALL)):
        raise PetoolError(f"unknown simulated data: {source}", hint)
    paths, made = list[str](), ("history:", "demo:", "values:")
    for name in map(str.strip, found[4].split(",")):
        if not (files := [name] if name.startswith(made) else sorted(glob(str(Path(name).expanduser())))):
            raise PetoolError(f"no file matches {name}", hint)
        paths += files
    return int(found[1]), int(found[2] or 0), found[3] or "rating", paths


def load_corpus(paths: Iterable[Path | str], skip_bad: bool = True) -> tuple[list[Example], list[Tool]]:
    """The calls of the files, and the tools of those that are lists of tools, or MCP results with one."""
    calls, tools = list[Example](), list[Tool]()
    for path in map(str, paths):
        value = None if path.startswith("history:") else _value(_text(path)[0], path)
        first = value[0] if isinstance(value, list) and value else value
        keys = set(first) if isinstance(first, Mapping) and not _reader(first) else set()
        if keys & {"name", "function", "tool_name", "tools", "result"}:
            tools += load_tools(path)
        else:
            calls += examples_of(load_dataset(path, skip_bad=skip_bad).entries, made=path.startswith("values:"))
    return calls, tools


def _reader(row: Any) -> Any:
    """The module that reads rows of this form, `openai` or `petoolbench`; None for an unknown one."""
    return next((form for form in (openai, petoolbench) if isinstance(row, Mapping) and form.is_row(row)), None)


def _parse(row: Any, setting: str, index: int) -> Entry:
    if not isinstance(row, Mapping):
        raise Fault("", "an object")
    if not (reader := _reader(row)) and not {"query", "input"} & row.keys():
        raise Fault("", KNOWN)
    if reader is not openai:
        return petoolbench.parse(row, setting, str(index))
    entry = openai.parse(row, str(index))
    if wrong := answer_faults(entry):
        raise Fault("", f"a sound answer, but {'; '.join(wrong)}")
    return entry


def load_tools(source: str) -> tuple[Tool, ...]:
    """Tools from a file, packed or not, in any form, as a list, one a line, or an MCP `tools/list` result."""
    try:
        return openai.read_tools(_value(_text(source)[0], source))
    except Fault as fault:
        raise PetoolError(f"{source}: {fault}", "expected OpenAI functions, or an MCP tools/list result") from fault


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
    """Write `folder`/foldN-test.jsonl and -train.jsonl of a source's folds (see `splits`); returns entries in each."""
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
    if source.startswith(("demo:", "values:")):
        if not (found := re.fullmatch(r"(?:demo:(train|test)|values):([1-9][0-9]{0,5})", source)):
            raise PetoolError(f"unknown made data: {source}", "write demo:train:COUNT, demo:test:COUNT or values:COUNT")
        count = int(found[2])
        rows = demo.generate(found[1], count) if found[1] else list(values.generate(count))
        return json.dumps(rows).encode(), Path(source)
    path = _hub_file(source) if source.startswith("hub:") else Path(source).expanduser()
    if not path.is_file():
        told = f"{source} is a folder, not a data file" if path.is_dir() else f"no such data file: {source}"
        raise PetoolError(told, f"give {FORMS}")
    with in_words(f"cannot read {path}", "check its rights", OSError):
        return path.read_bytes(), path


def _part_sha256(source: str) -> str:
    if source.startswith("simulated:"):
        *asked, paths = _corpus(source)
        return _hashed([*asked, *map(source_sha256, paths)])
    return _read(source)[1] if source.startswith("history:") else hashlib.sha256(_bytes(source)[0]).hexdigest()


def _read(source: str) -> tuple[list[Any], str]:
    """The rows of one part of a source, and its SHA-256."""
    if source.startswith("simulated:"):
        *asked, paths = _corpus(source)
        return [entry_line(entry) for entry in simulate(*load_corpus(paths), *asked)], _part_sha256(source)
    if source.startswith("history:"):
        from petool_lite.memory.lines import training_rows

        return (rows := training_rows(source)), _hashed([json.dumps(rows)])
    text, digest = _text(source)
    value = _value(text, source) if text.strip() else []
    if _reader(value) or (isinstance(value, dict) and "query" in value):
        value = [value]  # a .jsonl file of one line
    if not isinstance(value, list):
        raise PetoolError(f"{source} is not a list of entries", f"expected {KNOWN}")
    return value, digest


def _text(source: str) -> tuple[str, str]:
    """The text of a source, and the SHA-256 of its bytes, which may be zipped or gzipped: both known by content."""
    raw, path = _bytes(source)
    damage = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError)
    packed, found = len(raw), raw
    with in_words(f"cannot unpack {path}", "get the file again", *damage):
        if raw[:2] == b"\x1f\x8b":
            with gzip.GzipFile(fileobj=io.BytesIO(raw)) as file:
                found = file.read(max(_UNPACKED, _RATIO * packed) + 1)
        elif zipfile.is_zipfile(io.BytesIO(raw)):
            with zipfile.ZipFile(io.BytesIO(raw)) as archive:
                names = [name for name in archive.namelist() if name.endswith((".json", ".jsonl"))]
                if len(names) != 1:
                    raise PetoolError(f"{path} holds {len(names)} JSON files", "expected exactly one")
                packed = archive.getinfo(names[0]).compress_size
                with archive.open(names[0]) as member:
                    found = member.read(max(_UNPACKED, _RATIO * packed) + 1)
    if len(found) > max(_UNPACKED, _RATIO * packed):
        raise PetoolError(f"{path} unpacks {packed:,} bytes to {len(found):,} or more", "no text packs that well")
    return decode_text(found, str(path)), hashlib.sha256(raw).hexdigest()


def _value(text: str, source: str) -> Any:
    """The value of a JSON text, or the list of those that stand one a line."""
    try:
        return parse_json(text, source)
    except PetoolError:
        if not (text.lstrip().startswith("{") and "\n" in text.strip()):
            raise
        lines = enumerate(text.split("\n"), 1)  # a line feed alone: U+2028 may stand within a text
        return [parse_json(line, f"{source}, line {number}") for number, line in lines if line.strip()]


def _hub_file(source: str) -> Path:
    found = re.fullmatch(r"hub:([^/]+/[^/]+)(?:/(.+))?", source, re.DOTALL)
    if not found:
        raise PetoolError(f"unknown hub file: {source}", "write hub:OWNER/NAME or hub:OWNER/NAME/FILE")
    repo, names = found[1], [found[2]] if found[2] else data_files(found[1])
    if len(names) != 1:
        held = ", ".join(names[:12]) or "no .json or .jsonl file"
        raise PetoolError(f"{source} does not say which file", f"write hub:{repo}/FILE; it holds {held}")
    return fetch(repo, names)[0].path


def fetch(repo: str, names: Sequence[str], revision: str | None = None, report: Report = silent) -> list[Fetched]:
    """Download the files `names` of the Hub data set `repo` where they are not there. `revision` is a commit, branch or
    tag; None the newest commit, without a network the newest that is there. Raises PetoolError."""
    library_places()
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import tqdm

    if not names:
        raise PetoolError("no file to fetch", f"name some of: {', '.join(FILES)}", USAGE)
    done, quiet = [], partial(tqdm, disable=True)  # the command draws its own progress
    for number, name in enumerate(names):
        report(f"fetch {repo}", number, len(names), name)
        with _hub_errors(repo, name):
            path = Path(hf_hub_download(repo, name, repo_type="dataset", revision=revision, tqdm_class=quiet))
        done.append(Fetched(name, path, path.parents[len(PurePosixPath(name).parts) - 1].name))
    report(f"fetch {repo}", len(names), len(names), f"commit {done[-1].revision[:12]}")
    return done


def data_files(repo: str) -> list[str]:
    """The names of the JSON files of a Hub data set."""
    library_places()
    from huggingface_hub import HfApi

    with _hub_errors(repo):
        found = [row.rfilename for row in HfApi().dataset_info(repo, timeout=30).siblings or []]
    return sorted(name for name in found if name.endswith((".json", ".jsonl", ".json.gz", ".jsonl.gz", ".zip")))


@contextmanager
def _hub_errors(*place: str) -> Iterator[None]:
    """Turn every failure of the Hub client or of the disk into one PetoolError."""
    try:
        yield
    except Exception as error:  # the hub client raises many kinds, some of them of the HTTP library under it
        reason, hint = _explain(error, place[0])
        raise PetoolError(f"cannot download hub:{'/'.join(place)}: {reason}", hint) from error


def _explain(error: BaseException, repo: str) -> tuple[str, str]:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__  # the client looked for a copy because of this
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        return str(error), "make room for it, or set HF_HOME to another folder"
    consent = f"accept the terms at {constants.ENDPOINT}/datasets/{repo}, then run `hf auth login`"
    offline = f"unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE, {_LOCAL_COPY}"
    for kind, reason, hint in (
        (errors.OfflineModeIsEnabled, "the Hub client is in offline mode", offline),
        (errors.GatedRepoError, "its owner asks for consent first (gated)", consent),
        (errors.RepositoryNotFoundError, "no such data set, or a private one", "check OWNER/NAME, run `hf auth login`"),
        (errors.RevisionNotFoundError, "no such commit", "check the revision"),
        (errors.RemoteEntryNotFoundError, "no such file at this commit", "check the name, or give another revision"),
        (ValueError, first_line(error), "write OWNER/NAME, and a file's path inside the data set"),
    ):
        if isinstance(error, kind):
            return reason, hint
    return first_line(error), f"check the network and try again, {_LOCAL_COPY}"
