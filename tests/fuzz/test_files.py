"""GGUF and state files of any content: read, or refused by a PetoolError before C code sees them."""

import contextlib
import json
import os
import shutil
import sqlite3
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support_fuzz import FACTOR, cases
from support_gguf import write_gguf
from support_memory import ENTRY, made

from petool_lite.data.openai import read_tools
from petool_lite.errors import PetoolError
from petool_lite.gguf_base import gguf_fields, open_gguf
from petool_lite.inference.states import StateStore
from petool_lite.memory.lines import training_rows
from petool_lite.memory.store import Store

LOAD = """
import sys
from pathlib import Path
from petool_lite.errors import PetoolError
from petool_lite.inference.llama import LlamaModel
for name in sys.stdin.read().split():
    print(name, flush=True)
    try:
        with LlamaModel(Path(name), n_ctx=64) as model:
            model.generate(model.encode("ab"), 2)
    except PetoolError:
        pass
print("end")
"""
NUMBERS = [0, 1, 2, 3, 7, 31, 63, 255, 257, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1]
HEADER = 11_000  # bytes before the tensors' data, about
place = st.integers(0, HEADER)
change = st.one_of(
    st.tuples(st.just("byte"), place, st.integers(0, 255)),
    st.tuples(st.sampled_from(["u32", "u64"]), place, st.sampled_from(NUMBERS)),
    st.tuples(st.just("u32"), st.integers(0, 40), st.sampled_from(NUMBERS)),
    st.tuples(st.just("key"), st.integers(0, 30), st.sampled_from(NUMBERS)),
    st.tuples(st.just("cut"), st.integers(0, 70_000), st.just(0)),
    st.tuples(st.just("drop"), st.integers(4, HEADER), st.integers(1, 9)),
)
ACCEPTED: list[Path] = []


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> bytes:
    """A whole Llama of 60 KB in GGUF that llama.cpp loads and runs."""
    return write_gguf(tmp_path_factory.mktemp("sound") / "sound.gguf").read_bytes()


def damaged(raw: bytes, changes: list[tuple[str, int, int]]) -> bytes:
    """The file with some numbers, bytes or lengths changed; "key" changes the value of a key of the model."""
    found = bytearray(raw)
    for kind, place, number in changes:
        if kind == "key":
            spots = [index for index in range(len(found) - 8) if found[index : index + 6] == b"llama."][:12]
            if not spots:
                continue
            spot = spots[place % len(spots)]
            place, kind = spot + struct.unpack_from("<Q", found, spot - 8)[0] + 4, "u32"
        size = {"byte": 1, "u32": 4, "u64": 8}.get(kind)
        if size and place + size <= len(found):
            found[place : place + size] = (number % 256**size).to_bytes(size, "little")
        elif kind in ("cut", "drop"):
            del found[place : place + number if kind == "drop" else None]
    return bytes(found)


@cases(700)
@given(changes=st.lists(change, min_size=1, max_size=3))
def test_any_gguf_is_read_or_refused(tmp_path, sound, changes) -> None:
    path = tmp_path / "any.gguf"
    path.unlink(missing_ok=True)  # a file of its own each time: what was found of one is remembered
    path.write_bytes(damaged(sound, changes))
    try:
        gguf_fields(open_gguf(path))
    except PetoolError:
        return
    if len(ACCEPTED) < 60 * FACTOR:
        ACCEPTED.append(path.rename(tmp_path / f"accepted{len(ACCEPTED)}.gguf"))


def test_what_is_accepted_does_not_crash_llama_cpp() -> None:
    """After the test above: each file that passed is loaded and run in another process."""
    assert ACCEPTED or FACTOR == 1
    left = [str(path) for path in ACCEPTED]
    crashed = []
    while left:
        quiet = os.environ | {"GGML_NO_BACKTRACE": "1"}
        line = [sys.executable, "-c", LOAD]
        done = subprocess.run(line, input="\n".join(left), capture_output=True, text=True, env=quiet)
        seen = done.stdout.split()
        if seen and seen[-1] == "end":
            break
        crashed.append((seen[-1] if seen else "none", done.returncode, done.stderr[-300:]))
        left = left[len(seen) :]
    assert not crashed, crashed


@cases(200)
@given(changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=3), cut=st.integers(0, 300))
def test_any_state_file_is_used_whole_or_not_at_all(tmp_path, changes, cut) -> None:
    store, key = StateStore(tmp_path), {"model": "a" * 64}
    path = store.path("ann")
    path.unlink(missing_ok=True)
    store.save("ann", key, [1, 2, 3], memoryview(bytes(range(64))))
    assert path.stat().st_mode & 0o777 == 0o600
    raw = bytearray(path.read_bytes())
    whole = bytes(raw)
    for place, number in changes:
        raw[place % len(raw)] = number
    path.write_bytes(raw if cut > 200 else raw[: len(raw) - cut])
    state = store.read("ann", key)
    assert state is None or (path.read_bytes() == whole and state[0] == [1, 2, 3])


@pytest.fixture(scope="module")
def remembered(tmp_path_factory) -> Path:
    """A whole store of 60 interactions, all of it in its one file."""
    path = tmp_path_factory.mktemp("store") / "memory.sqlite"
    Store(path).add([made(n, verdict=(None, "liked")[n % 2], query=f"Find {'oak ' * 20}") for n in range(60)])
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return path


spot = st.one_of(st.integers(0, 120), st.integers(0, 1 << 16), st.integers(0, 15).map(lambda page: page << 12))


@cases(40)
@given(changes=st.lists(st.tuples(spot, st.binary(min_size=1, max_size=8)), max_size=4), cut=st.integers(0, 90_000),
       kind=st.sampled_from(["byte", "byte", "text", "wal"]))  # fmt: skip
def test_any_store_is_used_or_kept_aside(tmp_path, remembered, changes, cut, kind) -> None:
    path = tmp_path / "store" / "memory.sqlite"
    shutil.rmtree(path.parent, ignore_errors=True)
    path.parent.mkdir()
    raw = bytearray(remembered.read_bytes())
    for place, new in changes:
        found = raw.find(b'{"' if place % 2 else b"Find", place % len(raw)) if kind == "text" else place % len(raw)
        raw[found : found + len(new)] = new  # of the same length: pages stay where they are
    path.write_bytes(raw if cut > 60_000 else raw[:cut])
    if kind == "wal":
        path.with_name("memory.sqlite-wal").write_bytes(bytes(raw[:4096]))
    try:
        store = Store(path)
        store.add([made(99)])
        store.recalled("ann", ENTRY)
        for item in store.records():
            assert json.dumps([len(read_tools(item.tools)), item.facts()])
        store.find("ann-99", "ann", "liked")
        with contextlib.suppress(PetoolError):  # too few
            training_rows("history:*", store)
        store.forget("ann")
    except PetoolError as error:
        assert "\n" not in error.message
