"""The file behind the store: SQLite in WAL mode, which many processes share and which a kill -9 leaves whole. A file of
a newer version is refused, a damaged one kept aside and begun anew. Only its owner may read it."""

import contextlib
import fcntl
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from petool_lite.console import say
from petool_lite.errors import MACHINE, PetoolError

T = TypeVar("T")

_WAIT_S = 5.0  # for another process that is writing
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)

# Each brings the file from the version before to its own; user_version counts them.
_MIGRATIONS = (
    """
    CREATE TABLE users (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
    CREATE TABLE toolsets (sha256 TEXT PRIMARY KEY, tools TEXT NOT NULL);
    CREATE TABLE interactions (
        number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, user INTEGER NOT NULL, time REAL NOT NULL,
        query TEXT NOT NULL, turns TEXT, tools TEXT NOT NULL, answer TEXT NOT NULL,
        verdict TEXT CHECK (verdict IN ('liked', 'disliked')), confidence REAL
    );
    CREATE INDEX interactions_by_user ON interactions (user, time, number);
    CREATE INDEX interactions_by_time ON interactions (time, number);
    CREATE INDEX interactions_by_tools ON interactions (tools);
    -- for every name that a later request may know the called tool's provider by
    CREATE TABLE bearings (
        user INTEGER, provider TEXT, time REAL, number INTEGER, PRIMARY KEY (user, provider, time, number)
    ) WITHOUT ROWID;
    CREATE TRIGGER interactions_gone AFTER DELETE ON interactions BEGIN
        DELETE FROM bearings WHERE user = OLD.user AND number = OLD.number;
        DELETE FROM toolsets WHERE sha256 = OLD.tools AND NOT EXISTS
            (SELECT 1 FROM interactions WHERE tools = OLD.tools);
    END;
    """,
    "ALTER TABLE interactions ADD COLUMN result TEXT;",  # what the tool answered where it was run
)


class Unwritable(PetoolError):
    """The place of the store cannot be written."""


def run(path: Path, work: Callable[[sqlite3.Connection], T], write: bool = False) -> T:
    """What `work` returns, given a connection to the file; where it writes, all of it is done or nothing. A damaged
    file is set aside, which is said, and a new one begun. Raises Unwritable, and PetoolError for a newer version's."""
    try:
        try:
            return _once(path, work, write)
        except sqlite3.DatabaseError as error:
            if error.sqlite_errorcode & 0xFF not in _DAMAGE:
                raise
            _set_aside(path)
            return _once(path, work, write)
    except (OSError, sqlite3.Error, UnicodeEncodeError) as error:
        hint = "make room, or give a place that can be written: XDG_DATA_HOME"
        raise Unwritable(f"cannot use {path}: {error}", hint, MACHINE) from error


def shrink(path: Path) -> None:
    """Leave nothing of what was deleted in the file or its log. Raises PetoolError where another process reads."""

    def work(db: sqlite3.Connection) -> bool:
        db.execute("VACUUM")
        return bool(db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0])

    if run(path, work):
        raise PetoolError(f"another program is reading {path}: its log still holds the texts", "try again")


def _once(path: Path, work: Callable[[sqlite3.Connection], T], write: bool) -> T:
    with _alone(path):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        path.chmod(0o600)  # SQLite gives its log and its index of the log the same mode
        db = sqlite3.connect(path, timeout=_WAIT_S, isolation_level=None)
    with contextlib.closing(db):
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version > len(_MIGRATIONS):
            hint = "update petool-lite, or do without: --no-store"
            raise PetoolError(f"{path} is of version {version}, this program knows {len(_MIGRATIONS)}", hint)
        db.executescript("PRAGMA synchronous = NORMAL; PRAGMA secure_delete = ON;")
        if version < len(_MIGRATIONS):
            _migrate(path, db)
        if not write:
            return work(db)
        db.execute("BEGIN IMMEDIATE")
        found = work(db)
        db.execute("COMMIT")  # without it, closing takes all back
        return found


def _migrate(path: Path, db: sqlite3.Connection) -> None:
    with _alone(path):
        db.execute("PRAGMA journal_mode = WAL")
        version = db.execute("PRAGMA user_version").fetchone()[0]
        for number, script in enumerate(_MIGRATIONS[version:], version + 1):
            db.executescript(f"BEGIN IMMEDIATE; {script} PRAGMA user_version = {number}; COMMIT;")


def _set_aside(path: Path) -> None:
    """Rename the damaged file and its log, unless another process has done so."""
    with _alone(path):
        with contextlib.suppress(sqlite3.DatabaseError), contextlib.closing(sqlite3.connect(path)) as db:
            if db.execute("PRAGMA quick_check(1)").fetchone() == ("ok",):
                return
        aside = f"{path}.damaged-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        for ending in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.rename(f"{path}{ending}", f"{aside}{ending}")
    say(f"note: {path} is damaged; it is kept as {aside}, and a new one is started")


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep other processes and threads from making, changing or renaming the file meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
