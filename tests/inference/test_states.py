"""Users' states on disk: only a whole file of one's own is read, and it gives the logits of a fresh reading."""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from petool_lite.export import export_base
from petool_lite.inference.llama import LlamaModel
from petool_lite.inference.states import StateStore

KEY = {"model_sha256": "0" * 64, "flash_attention": False}
IDS = np.random.default_rng(0).integers(1000, 20000, 530).tolist()


def test_a_file_of_ones_own_is_read_and_the_least_recently_used_go_first(tmp_path) -> None:
    """Cut and changed files: tests/fuzz/test_files.py."""
    store, data = StateStore(tmp_path, limit=4000), memoryview(bytes(1000))
    for age, user in ((30, "a"), (20, "b"), (10, "c")):
        store.save(user, KEY, [1, 2], data)
        os.utime(store.path(user), (time.time() - age,) * 2)
    ids, kept = store.read("a", KEY)
    assert (ids, bytes(kept)) == ([1, 2], bytes(1000))
    store.save("d", KEY, [3], data)
    assert [store.path(user).exists() for user in "abcd"] == [True, False, True, True]
    assert store.read("a", KEY | {"flash_attention": True}) is None
    store.path("a").chmod(0o666)  # anyone may have written to it
    assert store.read("a", KEY) is None
    assert StateStore(tmp_path, limit=500).save("e", KEY, [1], data) == 0  # larger than all the room there is


def logits(file: Path, store: StateStore | None, prefix: int, exact: bool) -> Any:
    """After IDS: read at once, or the first `prefix` before; with a store that part comes from its file."""
    with LlamaModel(file, 1024) as model:
        if store:
            ids, state = store.read("ann", KEY)
            assert model.restore(ids, state)
            prefix = len(ids)
        elif prefix:
            model.read(IDS[:prefix])
        model.exact_reuse = exact
        reused = model.read(IDS)
        assert prefix - 512 * exact <= reused <= prefix
        return model._logits().copy()


def test_what_is_read_from_disk_gives_the_logits_of_memory_and_of_a_fresh_reading(tiny, tmp_path) -> None:
    """To the bit where reuse is exact, as `bench` has it. `call` and `serve` read the rest in one short part, whose
    products round otherwise: with the embedded model's quantized weights logits moved by up to 0.34 of 22."""
    store, file = StateStore(tmp_path), export_base(str(tiny), "q4_k_m")
    fresh = logits(file, None, 0, False)
    for shared in (20, 511, 528):  # around the end of a batch of 512
        with LlamaModel(file, 1024) as model:
            model.read(IDS[:shared])
            store.save("ann", KEY, IDS[:shared], model.state(shared))
        quick = logits(file, store, 0, False)
        assert np.array_equal(quick, logits(file, None, shared, False))
        assert np.array_equal(logits(file, store, 0, True), fresh)
        assert np.corrcoef(quick, fresh)[0, 1] > 0.999
