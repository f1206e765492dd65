"""What users did with their tools, and their verdicts: added by `call` and `serve`, read for the next request."""

import hashlib
import json
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from petool_lite.console import say
from petool_lite.data.entries import DISLIKED, LIKED, Answer, Call, Entry, Interaction, bearing, namespace, providers
from petool_lite.data.openai import tool_json
from petool_lite.errors import PetoolError
from petool_lite.memory.database import Unwritable, run, shrink
from petool_lite.places import data_root

T = TypeVar("T")

NEWEST = 1000  # interactions of a user that are kept
RECALLED = 50  # of them that a request gets at most
VERDICTS = (LIKED, DISLIKED)
_LONGEST = 1 << 16  # characters of a conversation before the query; a longer one is not kept
_json = partial(json.dumps, ensure_ascii=False)


@dataclass(frozen=True)
class Record:
    """One answer that a user got. `time` is in seconds since 1970; `turns` (the conversation before the query, None
    where it was too long to keep), `tools` and `answer` are JSON. `confidence` is the calibrated probability of the
    chosen tool, or of none, where it is known; `result` what the tool answered where it was run."""

    id: str
    user: str
    time: float
    query: str
    turns: str | None
    tools: str
    answer: str
    verdict: str | None = None
    confidence: float | None = None
    result: str | None = None

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
        run(self.path, lambda db: None)

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

        return run(self.path, work, write=True)

    def recalled(self, user: str, entry: Entry) -> Entry:
        """The entry with what the user did earlier with these providers before its own history, the newest last; one
        with a published prompt as it is."""
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
        rows = run(self.path, lambda db: db.execute(query, (user, *names, RECALLED)).fetchall())
        calls = [(text, _made(answer), verdict) for text, answer, verdict in rows]
        return with_earlier(entry, [Interaction(*item) for item in calls])  # type: ignore[arg-type]  # no texts

    def find(self, identity: str | None, user: str | None = None, verdict: str | None = None) -> Record:
        """One interaction, the newest where `identity` is None, with the verdict, if any, that it gets. Raises
        PetoolError where it is unknown or another user's."""
        plain = identity and identity.removeprefix("chatcmpl-").removeprefix("resp_")

        def work(db: sqlite3.Connection) -> Record:
            if not (found := _select(db, plain, user, 1)):
                what = "no call" + (f" {plain}" if plain else "") + (f" of {user}" if user is not None else "")
                raise PetoolError(f"{what} is remembered", "`petool-lite history list` shows what is")
            if verdict:
                db.execute("UPDATE interactions SET verdict = ? WHERE id = ?", (verdict, found[0].id))
            return replace(found[0], verdict=verdict or found[0].verdict)

        return run(self.path, work, write=verdict is not None)

    def add_result(self, identity: str, result: str) -> None:
        """Keep what the tool of a kept call answered."""
        query = "UPDATE interactions SET result = ? WHERE id = ?"
        run(self.path, lambda db: db.execute(query, (result, identity)), write=True)

    def records(self, user: str | None = None, limit: int = -1) -> list[Record]:
        """The newest `limit` interactions of a user, or of all, the newest last."""
        return run(self.path, lambda db: _select(db, None, user, limit))[::-1]

    def forget(self, user: str) -> int:
        """Remove a user with all interactions, and what the file held of them; returns how many these were."""
        own = "DELETE FROM interactions WHERE user = (SELECT id FROM users WHERE name = ?)"

        def work(db: sqlite3.Connection) -> int:
            gone = db.execute(own, (user,)).rowcount
            db.execute("DELETE FROM users WHERE name = ?", (user,))
            return gone

        count = run(self.path, work, write=True)
        shrink(self.path)
        return count


class Memory:
    """The store as `call` and `serve` use it: where it cannot be written, that is said once and costs no answer."""

    def __init__(self) -> None:
        """Open the store. Raises PetoolError for a newer version's."""
        self._said = False
        self.store: Store | None = self._tried(Store)

    def use(self, work: Callable[[Store], T]) -> T | None:
        """What `work` returns of the store; None where it cannot be used."""
        return self._tried(lambda: work(self.store)) if self.store else None

    def recalled(self, user: str, entry: Entry) -> Entry:
        """See Store; the entry as it is where the store cannot be used."""
        return self.use(lambda store: store.recalled(user, entry)) or entry

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
    return [Record(*row) for row in db.execute(query, (*given.values(), limit))]


def _made(answer: str) -> Answer:
    value = json.loads(answer)
    return value if isinstance(value, str) else Call(value["name"], value["arguments"])


def _key(call: Call) -> str:
    return json.dumps([call.name, dict(call.arguments)], sort_keys=True)
