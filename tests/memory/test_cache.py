"""What the engine kept on disk for a user gives the logits of a fresh reading."""

from typing import Any

import numpy as np

from petool_lite.inference.llama import LlamaModel
from petool_lite.inference.states import StateKey, StateStore
from petool_lite.models import embedded_gguf

KEY = StateKey("0" * 64, "f16", True, "1")
IDS = np.random.default_rng(0).integers(1000, 20000, 150).tolist()
SHARED = 120


def logits(store: StateStore | None, prefix: int, exact: bool) -> Any:
    """After IDS: read at once, or the first `prefix` before; with a store that part comes from its file."""
    with LlamaModel(embedded_gguf(), 1024) as model:
        if store:
            with store.open("ann", KEY) as state:
                assert state is not None
                assert model.restore(state.ids, state.data)
        elif prefix:
            model.read(IDS[:prefix])
        model.exact_reuse = exact
        reused = model.read(IDS)
        assert (reused > 0) == bool(prefix or store)
        return model._logits(-1).copy()


def test_what_is_read_from_disk_gives_the_logits_of_memory_and_of_a_fresh_reading(tmp_path) -> None:
    """To the bit where reuse is exact, as `bench` has it. `call` and `serve` read the rest in one short part, whose
    products round otherwise: with the embedded model's quantized weights logits moved by up to 0.34 of a spread of
    22."""
    store = StateStore(tmp_path)
    with LlamaModel(embedded_gguf(), 1024) as model:
        model.read(IDS[:SHARED])
        store.save("ann", KEY, IDS[:SHARED], model.state(SHARED))
    fresh, quick = logits(None, 0, False), logits(store, 0, False)
    assert np.array_equal(quick, logits(None, SHARED, False))
    assert np.array_equal(logits(store, 0, True), fresh)
    assert np.abs(quick - fresh).max() < 1.5
    assert np.corrcoef(quick, fresh)[0, 1] > 0.999
