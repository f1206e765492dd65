"""Users' states on disk: only a whole file of one's own is read, whatever happened to it."""

import os
import time

from petool_lite.inference.states import StateKey, StateStore

KEY = StateKey("0" * 64, "f16", False, "1")


def test_only_a_whole_file_of_ones_own_is_read(tmp_path) -> None:
    """Cut and changed files: tests/fuzz/test_files.py."""
    store = StateStore(tmp_path)
    for change in (
        lambda path: path.write_text("something else entirely" * 9),
        lambda path: path.chmod(0o666),  # anyone may have written to it
        lambda path: path.write_bytes(path.read_bytes() + b"x"),
    ):
        store.save("ann", KEY, [1, 2, 3], memoryview(bytes(5000)))
        with store.open("ann", KEY) as state:
            assert state is not None
        change(store.path("ann"))
        with store.open("ann", KEY) as state:
            assert state is None


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
