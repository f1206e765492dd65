"""Published data files from the Hugging Face Hub: one pinned commit, every file checked against a lock.

The lock is `fetch.lock.json` beside the files: {"repo", "revision", "files": {name: {"sha256", "bytes"}}}. The first
fetch writes it with the commit that the branch stands at; later ones ask for that commit and accept those bytes only.
"""

import errno
import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath

from petool_lite.console import Report, silent
from petool_lite.errors import USAGE, PetoolError
from petool_lite.models import cache_root, file_sha256
from petool_lite.runs import draft, write_json

LOCK = "fetch.lock.json"
REPO = "travisxu/PEToolBench"
FILES = tuple(f"user_entries_{split}_{setting}.json" for split in ("sft", "test") for setting in "prc")
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
_LOCAL_COPY = "or give a local copy: --set data.train=/path/to/file.json"


@dataclass(frozen=True)
class Fetched:
    """One checked file on this disk, its SHA-256, its size, and the commit (40 hex digits) it came from."""

    name: str
    path: Path
    sha256: str
    bytes: int
    revision: str


@dataclass(frozen=True)
class _Stamp:
    sha256: str
    bytes: int


@dataclass(frozen=True)
class _Lock:
    repo: str
    revision: str
    files: dict[str, _Stamp]


def fetch(
    repo: str = REPO,
    names: Sequence[str] = FILES,
    revision: str | None = None,
    folder: Path | None = None,
    report: Report = silent,
) -> list[Fetched]:
    """Put the files `names` of the Hub data set `repo` into `folder`, and return them in that order.

    Without `revision` the commit in the lock is used, or, where there is no lock, the newest one, which the lock then
    records. A `revision` (a commit of 40 hex digits) replaces the commit of the lock, and with it the checksums. Files
    that are there and match are not asked for again, so that a complete folder needs no network; a file that was
    changed on disk is downloaded again, and `report` says so. The default folder is data/OWNER--NAME in cache_root().

    Raises PetoolError if the Hub cannot be reached or refuses, if a name is not there, or if the downloaded bytes are
    not those of the lock (or, on first use, those the Hub itself lists); a file is then not put in place.
    """
    _check_request(repo, names, revision)
    folder = folder.expanduser() if folder else cache_root() / "data" / repo.replace("/", "--")
    lock, published = _open_lock(folder, repo, names, revision, report)
    done = []
    for number, name in enumerate(names):
        path, known = folder / name, lock.files.get(name)
        report(f"fetch {repo}", number, len(names), name)
        expected = known.sha256 if known else published.get(name)
        found = _sha256_on_disk(path)
        changed = known is not None and found not in (None, expected)
        if changed:
            report(f"{path} was changed (SHA-256 {found}, {LOCK} has {expected}): downloading it again", 0, 0, "")
        with _in_words(f"hub:{repo}/{name}" + (f" in place of the changed {path}" if changed else ""), repo):
            if found is None or found != expected:
                _download(repo, name, lock.revision, path, expected)
            if known is None:
                lock = replace(lock, files={**lock.files, name: _Stamp(file_sha256(path), path.stat().st_size)})
                write_json(folder / LOCK, asdict(lock))
        done.append(Fetched(name, path, **asdict(lock.files[name]), revision=lock.revision))
    report(f"fetch {repo}", len(names), len(names), f"commit {lock.revision[:12]}")
    return done


def _check_request(repo: str, names: Sequence[str], revision: str | None) -> None:
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo) or "--" in repo or ".." in repo:
        raise PetoolError(f"not the name of a Hub data set: {repo}", "write OWNER/NAME", USAGE)
    if not names:
        raise PetoolError("no file to fetch", f"name some of: {', '.join(FILES)}", USAGE)
    for name in names:
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or "\\" in name or ".." in parts or name == LOCK:
            raise PetoolError(f"not the name of a data file: {name!r}", "write its path inside the data set", USAGE)
    if revision is not None and not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise PetoolError(
            f"not a commit: {revision}", "give all 40 hex digits of a commit; a branch or tag can move", USAGE
        )


def _open_lock(
    folder: Path, repo: str, names: Sequence[str], revision: str | None, report: Report
) -> tuple[_Lock, dict[str, str | None]]:
    """The lock to go by, and for names it lacks what the Hub lists: {name: SHA-256, None for a file outside LFS}."""
    lock = _read_lock(folder / LOCK, repo)
    if lock is None or revision not in (None, lock.revision):
        lock = _Lock(repo, revision or "", {})
    missing = [name for name in names if name not in lock.files]
    if not missing:
        return lock, {}
    with _in_words(f"hub:{repo}/{missing[0]}" if len(missing) == 1 else f"hub:{repo}", repo):
        commit, published = _look_up(repo, lock.revision)
    absent = [name for name in missing if name not in published]
    if absent:
        raise PetoolError(
            f"cannot download hub:{repo}/{absent[0]}: no such file at commit {commit}",
            f"it holds: {', '.join(sorted(published)[:12]) or 'no files'}",
        )
    if not lock.revision:
        report(f"{repo} stands at commit {commit}; {folder / LOCK} keeps to it", 0, 0, "")
    return replace(lock, revision=commit), published


def _read_lock(path: Path, repo: str) -> _Lock | None:
    if not path.exists():
        return None
    remedy = f"delete {path} to pin a commit anew"
    try:
        value = json.loads(path.read_text())
        files = {str(name): _Stamp(str(row["sha256"]), int(row["bytes"])) for name, row in value["files"].items()}
        lock = _Lock(str(value["repo"]), str(value["revision"]), files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PetoolError(f"cannot read {path} ({type(error).__name__})", remedy) from error
    if lock.repo != repo:
        raise PetoolError(f"{path} is of {lock.repo}, not of {repo}", "give every data set a folder of its own")
    return lock


def _sha256_on_disk(path: Path) -> str | None:
    try:
        return file_sha256(path) if path.is_file() else None
    except OSError as error:
        raise PetoolError(f"cannot read {path}: {error.strerror}", "check its permissions, or delete it") from error


def _look_up(repo: str, revision: str) -> tuple[str, dict[str, str | None]]:
    from huggingface_hub import HfApi

    found = HfApi().dataset_info(repo, revision=revision or None, files_metadata=True, timeout=30)
    listed = {row.rfilename: row.lfs.sha256 if row.lfs else None for row in found.siblings or []}
    return revision or found.sha, listed


def _download(repo: str, name: str, commit: str, path: Path, expected: str | None) -> None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import tqdm

    with draft(path) as complete, tempfile.TemporaryDirectory(prefix=".fetch-", dir=path.parent) as own:
        # A folder of its own as cache too: a copy in the user's Hub cache may be the very one that was changed.
        got = hf_hub_download(
            repo,
            name,
            repo_type="dataset",
            revision=commit,
            local_dir=own,
            cache_dir=own,
            tqdm_class=partial(tqdm, disable=True),  # the command draws its own progress
        )
        found = file_sha256(Path(got))
        if expected is not None and found != expected:
            raise PetoolError(
                f"{name} of {repo} at commit {commit} has other contents: expected SHA-256 {expected}, found {found}",
                "the download was thrown away; try again, and if this stays, ask the publisher; to accept other "
                f"contents give another commit as revision, or delete {LOCK} to pin anew",
            )
        Path(got).replace(complete)


@contextmanager
def _in_words(what: str, repo: str) -> Iterator[None]:
    """Turn every failure of the Hub client or of the disk into one PetoolError."""
    try:
        yield
    except PetoolError:
        raise
    except Exception as error:  # the hub client raises many kinds, some of them of the HTTP library under it
        reason, hint = _explain(error, repo)
        raise PetoolError(f"cannot download {what}: {reason}", hint) from error


def _explain(error: BaseException, repo: str) -> tuple[str, str]:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__  # the client looked for a copy because of this
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "the Hub client is in offline mode", f"unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE, {_LOCAL_COPY}"
    if isinstance(error, errors.GatedRepoError):
        page = f"{constants.ENDPOINT}/datasets/{repo}"
        return "its owner asks for consent first (gated)", f"accept the terms at {page}, then run `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such data set, or a private one", "check OWNER/NAME; for a private one run `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return "no such commit", f"check the revision, or delete {LOCK} to pin anew"
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return "no such file at this commit", "check the name, or give another revision"
    if isinstance(error, OSError) and error.errno in _DISK:
        place = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{place}", "make room for it, or use another folder (PETOOL_LITE_CACHE)"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__, f"check the network and try again, {_LOCAL_COPY}"
