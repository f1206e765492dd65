"""Data files from the Hugging Face Hub, in the Hub client's own cache."""

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from petool_lite.console import Report, silent
from petool_lite.errors import USAGE, PetoolError, first_line
from petool_lite.places import library_places

REPO = "travisxu/PEToolBench"
FILES = tuple(f"user_entries_{split}_{setting}.json" for split in ("sft", "test") for setting in "prc")
_LOCAL_COPY = "or give a local copy: --set data.train=/path/to/file.json"


@dataclass(frozen=True)
class Fetched:
    """One file on this disk and the commit (40 hex digits) it came from."""

    name: str
    path: Path
    revision: str


def fetch(
    repo: str = REPO, names: Sequence[str] = FILES, revision: str | None = None, report: Report = silent
) -> list[Fetched]:
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
        with _in_words(repo, name):
            path = Path(hf_hub_download(repo, name, repo_type="dataset", revision=revision, tqdm_class=quiet))
        done.append(Fetched(name, path, path.parents[len(PurePosixPath(name).parts) - 1].name))
    report(f"fetch {repo}", len(names), len(names), f"commit {done[-1].revision[:12]}")
    return done


def data_files(repo: str) -> list[str]:
    """The names of the JSON files of a Hub data set."""
    library_places()
    from huggingface_hub import HfApi

    with _in_words(repo):
        found = [row.rfilename for row in HfApi().dataset_info(repo, timeout=30).siblings or []]
    return sorted(name for name in found if name.endswith((".json", ".jsonl", ".json.gz", ".jsonl.gz", ".zip")))


@contextmanager
def _in_words(*place: str) -> Iterator[None]:
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
