"""What a process may use without being told: cores, and folders to write to. One that is missing or read-only costs
speed or memory between calls, never the answer: a folder of this user's in the temporary one takes its part."""

import atexit
import getpass
import os
import shutil
import stat
import tempfile
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from petool_lite.console import say
from petool_lite.errors import MACHINE, PetoolError, in_words


def user_path(text: str | Path) -> Path:
    """A path as somebody typed it, `~` resolved; raises PetoolError where the system knows no such home folder."""
    with in_words(f"no such folder: {text}", "write the path without ~", RuntimeError):
        return Path(text).expanduser()


def cache_root() -> Path:
    """$PETOOL_LITE_CACHE, else ~/.cache/petool-lite, else a folder in the temporary directory, which is said once."""
    wanted = _wanted()
    return wanted if wanted and _writable(wanted) else _substitute(wanted)


def cache_place(*parts: str) -> Path:
    """Where a thing that can be made again lies, or is to be written: a cache may be complete and read-only."""
    there = (_wanted() or cache_root()).joinpath(*parts)
    return there if there.exists() else cache_root().joinpath(*parts)


def own_folder(name: str, root: Path | None = None, rights: int = 0o022) -> Path | None:
    """A folder in `root` (None: the cache) that is this user's, no link, with none of `rights` for others; or None."""
    with suppress(OSError, PetoolError):
        folder = (root or cache_root()) / name
        folder.mkdir(mode=0o700, exist_ok=True)
        facts = folder.lstat()
        own = stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid() and not facts.st_mode & rights
        return folder if own else None
    return None


def data_root() -> Path:
    """petool-lite in $XDG_DATA_HOME, else ~/.local/share: for what cannot be made again; maybe missing or read-only."""
    given = Path(os.environ.get("XDG_DATA_HOME", ""))  # one that is not absolute is to be ignored, says XDG
    home = (_home_cache() or Path(os.devnull, "no home")).parent
    return (given if given.is_absolute() else home / ".local" / "share") / "petool-lite"


def library_places() -> None:
    """Give the libraries that train and export what they stop without: a writable cache, and the user's name. They tell
    their makers nothing: TRL's report looks a name up in a thread, and the environment changed meanwhile (SIGSEGV)."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    try:
        getpass.getuser()
    except (KeyError, OSError):  # a user ID without a name, as containers have it
        os.environ["LOGNAME"] = f"uid{os.getuid()}"
    if not os.access(".", os.W_OK):
        os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(cache_root() / "unsloth"))
    if not _writable(_home_cache()):
        for variable in ("HF_HOME", "MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
            os.environ.setdefault(variable, str(cache_root() / variable.lower()))


def _home_cache() -> Path | None:
    with suppress(RuntimeError):
        return Path.home() / ".cache"
    return None


def _wanted() -> Path | None:
    given, home = os.environ.get("PETOOL_LITE_CACHE"), _home_cache()
    return user_path(given) if given else home and home / "petool-lite"


def _writable(folder: Path | None) -> bool:
    with suppress(OSError):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            return os.access(folder, os.W_OK | os.X_OK)
    return False


@lru_cache(maxsize=4)
def _substitute(wanted: Path | None) -> Path:
    """This user's own folder in the temporary directory, or, where that name is taken, one for this process alone."""
    folder = own_folder(f"petool-lite-{os.getuid()}", Path(tempfile.gettempdir()), 0o077)
    hint = "set PETOOL_LITE_CACHE or TMPDIR to a folder with room"
    with in_words("no folder for temporary files", hint, OSError, exit_code=MACHINE):
        if folder is None:
            folder = Path(tempfile.mkdtemp(prefix="petool-lite-"))
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
    why = f"{wanted} cannot be written" if wanted else "there is no home folder"
    say(f"note: {why}; {folder} is the cache instead")
    return folder


def default_threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
