"""What users did with their tools, and their verdicts: added by `call` and `serve`, read for the next request. The file
is SQLite's in WAL mode, which many processes share, a kill -9 leaves whole, and only its owner may read."""

import contextlib
import fcntl
import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

from petool_lite.console import say
from petool_lite.data.entries import DISLIKED, LIKED, Answer, Call, Entry, Interaction, bearing, namespace, providers
from petool_lite.data.fields import Fault
from petool_lite.data.openai import read_tools, tool_json
from petool_lite.errors import MACHINE, PetoolError
from petool_lite.places import data_root

T = TypeVar("T")

NEWEST = 1000  # interactions of a user that are kept
RECALLED = 50  # of them that a request gets at most
VERDICTS = (LIKED, DISLIKED)
_LONGEST = 1 << 16  # characters of a conversation before the query; a longer one is not kept
_json, _tools = partial(json.dumps, ensure_ascii=False), lru_cache(maxsize=64)(read_tools)

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


@dataclass(frozen=True)
class Record:
    """One answer that a user got."""

    id: str
    user: str
    time: float  # seconds since 1970
    query: str
    turns: str | None  # JSON, as tools and answer are; None if too long to keep
    tools: str
    answer: str
    verdict: str | None = None
    confidence: float | None = None  # the calibrated probability of the choice
    result: str | None = None  # what a tool said

    @property
    def made(self) -> Answer:
        """The call, or the text."""
        return _made(self.answer)

    @property
    def called(self) -> str:
        """The called tool's name, or the text."""
        return self.made.name if isinstance(self.made, Call) else self.made

    def facts(self) -> dict[str, Any]:
        """The record without tools and turns."""
        names = ("id", "user", "time", "query", "verdict", "confidence", "result")
        return {name: getattr(self, name) for name in names} | {"answer": json.loads(self.answer)}


def record_of(identity: str, user: str, entry: Entry, answer: Answer, confidence: float | None = None) -> Record:
    """What is kept of an entry that is answered now."""
    turns, tools = _json(list(entry.turns)), _json([tool_json(tool) for tool in entry.tools])
    made = answer.to_json() if isinstance(answer, Call) else _json(answer)
    kept = turns if len(turns) <= _LONGEST else None
    return Record(identity, user, time.time(), entry.query, kept, tools, made, confidence=confidence)


class Store:
    """The interactions of all users of this account. Safe to share between threads and processes."""

    def __init__(self, path: Path | None = None, newest: int = NEWEST) -> None:
        """Open memory.sqlite in `data_root`, or `path`; it keeps the `newest` interactions a user. Raises Unwritable
        where it cannot be written, as every method does, and PetoolError for a newer version's."""
        self.path = path or data_root() / "memory.sqlite"
        self._newest = newest
        _run(self.path, lambda db: None)

    def add(self, records: Sequence[Record]) -> int:
        """Keep interactions, all or none; those whose id is there are left out. Returns how many were new."""
        older = (
            "DELETE FROM interactions WHERE number IN (SELECT number FROM interactions WHERE user = "
            "(SELECT id FROM users WHERE name = ?) ORDER BY time DESC, number DESC LIMIT -1 OFFSET ?)"
        )

        def work(db: sqlite3.Connection) -> int:
            added = sum(_insert(db, item) for item in records)
            db.executemany(older, [(user, self._newest) for user in {item.user for item in records}])
            return added

        return _run(self.path, work, write=True)

    def recalled(self, user: str, entry: Entry) -> Entry:
        """The entry, unless published, with what the user did earlier with these providers before its own history."""
        if entry.published is not None:
            return entry
        known = providers(entry)
        names = {name for tool in entry.tools for name in (tool.name, known[tool.name])}
        query = (
            "SELECT query, answer, verdict FROM interactions WHERE number IN (SELECT number FROM ("
            "SELECT DISTINCT b.time, b.number FROM bearings b JOIN users u ON u.id = b.user WHERE u.name = ? "
            f"AND b.provider IN ({', '.join('?' * len(names))}) ORDER BY b.time DESC, b.number DESC LIMIT ?)) "
            "ORDER BY time, number"
        )
        rows = _run(self.path, lambda db: db.execute(query, (user, *names, RECALLED)).fetchall())
        calls = [(text, _made(answer), verdict) for text, answer, verdict in rows if _whole(text, answer)]
        return with_earlier(entry, [Interaction(*item) for item in calls])  # type: ignore[arg-type]  # no texts

    def find(self, identity: str | None, user: str | None = None, verdict: str | None = None) -> Record:
        """One interaction, the newest for None, with the verdict that it gets, if any. Raises PetoolError for none."""
        plain = identity and identity.removeprefix("chatcmpl-").removeprefix("resp_")

        def work(db: sqlite3.Connection) -> Record:
            if not (found := _select(db, plain, user, 1)):
                what = "no call" + (f" {plain}" if plain else "") + (f" of {user}" if user is not None else "")
                raise PetoolError(f"{what} is remembered", "`petool-lite history list` shows what is")
            if verdict:
                db.execute("UPDATE interactions SET verdict = ? WHERE id = ?", (verdict, found[0].id))
            return replace(found[0], verdict=verdict or found[0].verdict)

        return _run(self.path, work, write=verdict is not None)

    def add_result(self, identity: str, result: str) -> None:
        """Keep what the tool of a kept call answered."""
        query = "UPDATE interactions SET result = ? WHERE id = ?"
        _run(self.path, lambda db: db.execute(query, (result, identity)), write=True)

    def records(self, user: str | None = None, limit: int = -1) -> list[Record]:
        """The newest `limit` interactions of a user, or of all, the newest last."""
        return _run(self.path, lambda db: _select(db, None, user, limit))[::-1]

    def forget(self, user: str) -> int:
        """Remove a user's interactions from file and log; returns how many. PetoolError where others read the log."""
        own = "DELETE FROM interactions WHERE user = (SELECT id FROM users WHERE name = ?)"

        def work(db: sqlite3.Connection) -> int:
            gone = db.execute(own, (user,)).rowcount
            db.execute("DELETE FROM users WHERE name = ?", (user,))
            return gone

        count = _run(self.path, work, write=True)
        _run(self.path, lambda db: db.execute("VACUUM"))
        if _run(self.path, lambda db: db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]):
            raise PetoolError(f"another program is reading {self.path}: its log still holds the texts", "try again")
        return count


class Memory:
    """The store as `call` and `serve` use it: where it cannot be written, that is said once and costs no answer."""

    def __init__(self) -> None:
        """Open the store. Raises PetoolError for a newer version's."""
        self._said = False
        self.store: Store | None = self._tried(Store)

    def use(self, work: Callable[[Store], T]) -> T | None:
        """What `work` returns of the store; None where it cannot be used."""
        return self._tried(partial(work, self.store)) if self.store else None

    def _tried(self, work: Callable[[], T]) -> T | None:
        try:
            return work()
        except Unwritable as error:
            if not self._said:
                say(f"note: nothing is remembered: {error.message}")
            self._said = True
            return None


def with_earlier(entry: Entry, earlier: Sequence[Interaction]) -> Entry:
    """The entry with the last of the `earlier` calls that bear on its tools, and that it does not tell itself."""
    turned = [item["function"] for turn in entry.turns for item in turn.get("tool_calls") or ()]
    calls = [Call(made["name"], json.loads(made["arguments"] or "{}")) for made in turned]
    told = {_key(made) for made in [*calls, *(item.call for item in entry.history)]}
    known = [earlier[index] for index in bearing(replace(entry, history=tuple(earlier)))]
    new = [item for item in known if _key(item.call) not in told]
    return replace(entry, history=(*new[-RECALLED:], *entry.history))


def names_of_provider(name: str) -> set[str]:
    """Every name that a request may know the provider of a tool by: the tool's, and what it may be read as."""
    owner = namespace(name)
    return {name, owner} | ({name.split("_")[0]} if owner == name and "_" in name else set())


def _insert(db: sqlite3.Connection, item: Record) -> bool:
    """Whether the record was new."""
    if db.execute("SELECT 1 FROM interactions WHERE id = ?", (item.id,)).fetchone():
        return False
    digest = hashlib.sha256(item.tools.encode()).hexdigest()
    db.execute("INSERT OR IGNORE INTO toolsets VALUES (?, ?)", (digest, item.tools))
    db.execute("INSERT OR IGNORE INTO users (name) VALUES (?)", (item.user,))
    user = db.execute("SELECT id FROM users WHERE name = ?", (item.user,)).fetchone()[0]
    values = (item.id, user, item.time, item.query, item.turns, digest, item.answer, item.verdict, item.confidence)
    query = "INSERT INTO interactions VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
    number = db.execute(query, (*values, item.result)).lastrowid
    names = names_of_provider(item.called) if isinstance(item.made, Call) else ()
    db.executemany("INSERT INTO bearings VALUES (?, ?, ?, ?)", [(user, name, item.time, number) for name in names])
    return True


def _select(db: sqlite3.Connection, identity: str | None, user: str | None, limit: int) -> list[Record]:
    """The newest first."""
    given = {column: value for column, value in {"i.id": identity, "u.name": user}.items() if value is not None}
    query = (
        "SELECT i.id, u.name, i.time, i.query, i.turns, t.tools, i.answer, i.verdict, i.confidence, i.result "
        "FROM interactions i JOIN users u ON u.id = i.user JOIN toolsets t ON t.sha256 = i.tools "
        f"WHERE {' AND '.join(f'{column} = ?' for column in given) or '1'} ORDER BY i.time DESC, i.number DESC LIMIT ?"
    )
    found = [Record(*row) for row in db.execute(query, (*given.values(), limit))]
    return [item for item in found if _whole(item.query, item.answer, item.tools, item.turns, item.time)]


def _whole(query: Any, answer: Any, tools: Any = "[]", turns: Any = "[]", time: Any = 0.0) -> bool:
    """Whether a row's values can be read: a damaged file may hold others."""
    try:
        made, _ = _made(answer), _tools(tools)
        plain = made if isinstance(made, str) else {made.name: dict(made.arguments)}
        told = isinstance(query, str) and isinstance(time, float) and isinstance(json.loads(turns or "[]"), list)
        return told and bool(json.dumps(plain, ensure_ascii=False).encode())
    except (Fault, ValueError, TypeError, LookupError):
        return False


def _made(answer: str) -> Answer:
    value = json.loads(answer)
    return value if isinstance(value, str) else Call(value["name"], value["arguments"])


def _key(call: Call) -> str:
    return json.dumps([call.name, dict(call.arguments)], sort_keys=True)


def _run(path: Path, work: Callable[[sqlite3.Connection], T], write: bool = False) -> T:
    """What `work` returns, given a connection to the file; where it writes, all of it is done or nothing. A damaged
    file is set aside, which is said, and a new one begun. Raises Unwritable, and PetoolError for a newer version's."""
    try:
        try:
            return _once(path, work, write)
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # the latter from a message with a damaged name
            if getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF not in _DAMAGE:
                raise
            _set_aside(path)
            return _once(path, work, write)
    except (OSError, sqlite3.Error, UnicodeError) as error:
        hint = "make room, or give a place that can be written: XDG_DATA_HOME"
        raise Unwritable(f"cannot use {path}: {error}", hint, MACHINE) from error


def _once(path: Path, work: Callable[[sqlite3.Connection], T], write: bool) -> T:
    with _alone(path):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        path.chmod(0o600)  # SQLite gives its log and its index of the log the same mode
        db = sqlite3.connect(path, timeout=_WAIT_S, isolation_level=None)
        db.text_factory = lambda raw: raw.decode("utf-8", "replace")  # damage that SQLite cannot see costs a row
    with contextlib.closing(db):
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version > len(_MIGRATIONS):
            hint = "update petool-lite, or do without: --no-store"
            raise PetoolError(f"{path} is of version {version}, this program knows {len(_MIGRATIONS)}", hint)
        db.executescript("PRAGMA synchronous = NORMAL; PRAGMA secure_delete = ON;")
        if version < len(_MIGRATIONS):
            with _alone(path):
                db.execute("PRAGMA journal_mode = WAL")
                version = db.execute("PRAGMA user_version").fetchone()[0]
                for number, script in enumerate(_MIGRATIONS[version:], version + 1):
                    db.executescript(f"BEGIN IMMEDIATE; {script} PRAGMA user_version = {number}; COMMIT;")
        if not write:
            return work(db)
        db.execute("BEGIN IMMEDIATE")
        found = work(db)
        db.execute("COMMIT")  # without it, closing takes all back
        return found


def _set_aside(path: Path) -> None:
    """Rename the damaged file and its log, unless another process has done so."""
    with _alone(path):
        damage = contextlib.suppress(sqlite3.DatabaseError, UnicodeDecodeError)
        with damage, contextlib.closing(sqlite3.connect(path)) as db:
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
