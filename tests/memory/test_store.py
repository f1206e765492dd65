"""What is remembered of users: whole whatever happens, bounded, theirs alone, fast, and gone when it is forgotten."""

import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from support_memory import ENTRY, TOOLS, WORD, made

from petool_lite.data.entries import Call, Interaction, Tool
from petool_lite.errors import PetoolError
from petool_lite.inference.states import StateStore
from petool_lite.memory.store import _MIGRATIONS, Store, record_of

WRITER = """
import sys
from dataclasses import replace
from pathlib import Path
from support_memory import made
from petool_lite.memory.store import Store
store = Store(Path(sys.argv[1]))
for number in range(int(sys.argv[3])):
    store.add([made(number, sys.argv[2])])
    print(number, flush=True)
"""
FILL = """
WITH RECURSIVE n(k) AS (SELECT 1 UNION ALL SELECT k + 1 FROM n WHERE k < 100000)
INSERT INTO interactions SELECT NULL, 'i' || k, k % 1000 + 1, k, 'Find w' || k, '[]', t.sha256,
    '{"name": "acme.find", "arguments": {"word": "w' || k || '"}}', 'liked', NULL, NULL FROM n, toolsets t;
INSERT INTO users SELECT DISTINCT user, 'user' || user FROM interactions WHERE user > 1;
INSERT OR IGNORE INTO bearings SELECT user, value, time, number FROM interactions, json_each('["acme", "acme.find"]');
"""


def told(store: Store, user: str, *names: str, **more) -> list[tuple[str, str, str | None]]:
    offered = tuple(tool for tool in TOOLS if not names or tool.name in names)
    history = store.recalled(user, replace(ENTRY, tools=offered, **more)).history
    return [(item.query, item.call.name, item.verdict) for item in history]


def test_what_bears_on_the_tools_is_told_in_order_and_nobody_elses(tmp_path) -> None:
    store = Store(tmp_path / "deep" / "memory.sqlite")
    names = ["acme.find", "bolt__other", "crow_other", "dove.find"]
    rows = [made(number, name=name) for number, name in enumerate(names)] + [made(9, "bob", verdict="liked")]
    text = record_of("t", "ann", ENTRY, "No tool fits.")
    assert store.add([*reversed(rows), text]) == 6
    assert store.add(rows) == 0, "each id once"
    assert told(store, "ann") == [(f"Find w{n}.", names[n], None) for n in range(3)], "dove offers none of the tools"
    assert told(store, "ann", "crow_find") == [], "one name alone does not tell the provider crow"
    assert told(store, "bob") == [("Find w9.", "acme.find", "liked")]
    assert told(store, "eve") == []
    own = Interaction("Find w0.", Call("acme.find", {"word": "w0"}), "disliked")
    assert told(store, "ann", "acme.find", history=(own,)) == [("Find w0.", "acme.find", "disliked")], "told once"
    with pytest.raises(PetoolError, match="no call bob-9 of ann is remembered"):
        store.find("bob-9", "ann", "disliked")
    assert store.find("chatcmpl-ann-0", "ann", "disliked").verdict == "disliked"
    assert told(store, "ann", "acme.find") == [("Find w0.", "acme.find", "disliked")]
    assert (store.find(None).made, store.find(None, "bob").id) == ("No tool fits.", "bob-9")


def test_the_newest_of_a_user_are_kept_and_a_clock_that_jumps_back_loses_nothing(tmp_path, monkeypatch) -> None:
    path = tmp_path / "memory.sqlite"
    store = Store(path, newest=3)
    store.add([made(n) for n in (5, 1, 4)] + [made(7, "bob")])
    for number in (2, 6, 3):
        store.add([made(number, tools=TOOLS[:1])])
    assert [item.id for item in store.records()] == ["ann-4", "ann-5", "ann-6", "bob-7"]
    with sqlite3.connect(path) as db:
        counts = [db.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in ("bearings", "toolsets")]
    assert counts == [8, 2], "nothing is left of those that went"
    store = Store(tmp_path / "another.sqlite")
    for word, now in (("w0", 2e9), ("w1", 1e9)):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        store.add([record_of(word, "ann", replace(ENTRY, query=word), Call("acme.find", {"word": word}))])
    assert store.find("w1", "ann", "liked").verdict == "liked"
    assert sorted(told(store, "ann")) == [("w0", "acme.find", None), ("w1", "acme.find", "liked")]


def writer(path: Path, user: str, count: int) -> subprocess.Popen:
    line = [sys.executable, "-c", WRITER, str(path), user, str(count)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])


def test_many_processes_write_at_once_and_a_killed_one_loses_nothing(tmp_path) -> None:
    path = tmp_path / "memory.sqlite"
    both, doomed = [writer(path, user, 200) for user in ("ann", "bob")], writer(path, "eve", 10**6)
    for _ in range(50):
        number = int(doomed.stdout.readline())
    modes = {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.glob("memory.sqlite*")}
    assert (modes, stat.S_IMODE(tmp_path.stat().st_mode)) == ({0o600}, 0o700)
    os.kill(doomed.pid, signal.SIGKILL)
    rest = doomed.communicate()[0].split()
    assert [len(process.communicate()[0].split()) for process in both] == [200, 200]
    number = int(rest[-1]) if rest else number
    store = Store(path)
    assert [len(store.records(user)) for user in ("ann", "bob")] == [200, 200]
    assert [item.id for item in store.records("eve")][: number + 1] == [f"eve-{n}" for n in range(number + 1)][-1000:]
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_reading_takes_less_than_5_ms_with_100_000_interactions_of_1_000_users(tmp_path) -> None:
    store = Store(tmp_path / "memory.sqlite")
    store.add([made(0)])
    with sqlite3.connect(store.path) as db:
        db.executescript(FILL)
    assert len(store.recalled("user7", ENTRY).history) == 50
    seconds = []
    for number in range(2, 300):
        started = time.thread_time()  # of this thread: other programs of a busy machine do not count
        store.recalled(f"user{number}", ENTRY)
        seconds.append(time.thread_time() - started)
    assert sorted(seconds)[-3] < 0.005, f"median {sorted(seconds)[149]:.4f} s"


def test_who_is_forgotten_is_in_no_file(tmp_path, command) -> None:
    folder = tmp_path / "petool-lite"
    store, secret = Store(folder / "memory.sqlite"), "xylophone"
    secret_tool = Tool("acme.find", f"finds a {secret}", WORD)
    for number in range(50):
        store.add([made(number, secret, query=f"{secret} {number}", tools=(secret_tool,)), made(number, "bob")])
    states = StateStore(tmp_path / "users")
    states.save(secret, {}, [1], memoryview(b"x"))
    (folder / "memory.sqlite.damaged-1").touch()

    def holds() -> bool:
        return any(secret.encode() in file.read_bytes() for file in folder.iterdir())

    assert holds()
    env = os.environ | {"XDG_DATA_HOME": str(tmp_path), "PETOOL_LITE_CACHE": str(tmp_path)}
    result = command("history", "forget", "--user", secret, "--json", env=env)
    found = json.loads(result.stdout)
    assert (found["forgotten"], found["not_looked_into"]) == (50, [str(folder / "memory.sqlite.damaged-1")])
    assert not holds()
    assert not states.path(secret).exists()
    assert (len(store.records()), store.forget(secret)) == (50, 0)


@pytest.mark.parametrize("sound", [0, 8192])
def test_a_damaged_store_is_kept_aside_and_a_newer_one_refused(tmp_path, command, capfd, sound) -> None:
    path = tmp_path / "petool-lite" / "memory.sqlite"
    other = Store(path)
    other.add([made(n) for n in range(300)])
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with path.open("rb+") as file:
        file.seek(sound)
        file.write(b"\xa5" * (path.stat().st_size - sound))
    store = Store(path)
    store.add([made(1), made(2)])
    assert capfd.readouterr().err.count("is damaged; it is kept as") == 1
    assert [item.id for item in store.records()] == ["ann-1", "ann-2"]
    assert [item.id for item in other.records()] == ["ann-1", "ann-2"], "who has it open follows"
    assert len([file for file in path.parent.glob("memory.sqlite.damaged-*") if file.stat().st_size > 99_999]) == 1
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    env = os.environ | {"XDG_DATA_HOME": str(tmp_path)}
    result = command("rate", "last", "liked", env=env)
    assert (result.returncode, "is of version 99" in result.stderr, "Traceback" in result.stderr) == (1, True, False)


def test_a_store_of_the_version_before_is_brought_up_to_date(tmp_path) -> None:
    path, old = tmp_path / "memory.sqlite", made(1)
    with sqlite3.connect(path) as db:
        db.executescript(f"{_MIGRATIONS[0]} PRAGMA user_version = 1;")
        db.execute("INSERT INTO users VALUES (1, 'ann')")
        db.execute("INSERT INTO toolsets VALUES ('t', ?)", (old.tools,))
        values = (old.id, old.time, old.query, old.turns, old.answer)
        db.execute("INSERT INTO interactions VALUES (1, ?, 1, ?, ?, ?, 't', ?, 'liked', NULL)", values)
    store = Store(path)
    assert store.records() == [replace(old, verdict="liked")]
    store.add_result(old.id, "found: oak")
    assert store.find(old.id).result == "found: oak"
    assert store.add([made(2)]) == 1
