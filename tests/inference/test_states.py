"""Users' states on disk: only a whole file of one's own is read, whatever happened to it."""

import os
import signal
import subprocess
import sys
import time

import pytest
from support import wait_until

from petool_lite.inference.states import StateKey, StateStore

KEY = StateKey("0" * 64, 1024, "f16", False, "1")


@pytest.mark.parametrize("change", ["cut", "flip", "empty", "foreign", "open", "grown"])
def test_only_a_whole_file_of_ones_own_is_read(tmp_path, change) -> None:
    store = StateStore(tmp_path)
    store.save("ann", KEY, [1, 2, 3], memoryview(bytes(5000)))
    path = store.path("ann")
    raw = bytearray(path.read_bytes())
    raw[3000] ^= 1
    {
        "cut": lambda: os.truncate(path, 2000),
        "flip": lambda: path.write_bytes(raw),
        "empty": lambda: path.write_bytes(b""),
        "foreign": lambda: path.write_text("something else entirely" * 9),
        "open": lambda: path.chmod(0o666),  # anyone may have written to it
        "grown": lambda: path.write_bytes(path.read_bytes() + b"x"),
    }[change]()
    with store.open("ann", KEY) as state:
        assert state is None
    store.save("ann", KEY, [4], memoryview(bytes(10)))
    with store.open("ann", KEY) as state:
        assert state is not None
        assert state.ids == [4]


def test_the_least_recently_used_files_go_first(tmp_path) -> None:
    store = StateStore(tmp_path, limit=4000)
    data = memoryview(bytes(1000))
    for age, user in ((30, "a"), (20, "b"), (10, "c")):
        store.save(user, KEY, [1, 2], data)
        os.utime(store.path(user), (time.time() - age,) * 2)
    with store.open("a", KEY) as state:
        assert state is not None
        assert (state.ids, bytes(state.data)) == ([1, 2], bytes(1000))
    store.save("d", KEY, [3], data)
    assert [store.path(user).exists() for user in "abcd"] == [True, False, True, True]
    assert StateStore(tmp_path, limit=500).save("e", KEY, [1], data) == 0  # larger than all the room there is


_WRITER = """
import sys
from pathlib import Path
from petool_lite.inference.states import StateKey, StateStore
store = StateStore(Path(sys.argv[1]))
key = StateKey("0" * 64, 1024, "f16", False, "1")
print("ready", flush=True)
while True:
    store.save("ann", key, [int(sys.argv[2])] * 3, memoryview(bytes([int(sys.argv[2])]) * 20_000_000))
"""


def test_two_writers_and_kill_9_leave_a_whole_file(tmp_path) -> None:
    """Readers see one writer's whole state at any time, also after both were killed amid a write."""
    store = StateStore(tmp_path)
    writers = [
        subprocess.Popen([sys.executable, "-c", _WRITER, tmp_path, str(number)], stdout=subprocess.PIPE)
        for number in (1, 2)
    ]
    try:
        for writer in writers:
            writer.stdout.readline()
        seen = set()
        wait_until(store.path("ann").exists, "the first state is written")
        for _ in range(60):
            with store.open("ann", KEY) as state:
                assert state is not None
                assert set(bytes(state.data)) == {state.ids[0]}
                seen.add(state.ids[0])
            if seen == {1, 2}:
                break
            time.sleep(0.02)
    finally:
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
            writer.wait()
            writer.stdout.close()
    with store.open("ann", KEY) as state:
        assert state is not None
        assert set(bytes(state.data)) == {state.ids[0]}
