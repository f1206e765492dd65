"""A tiny random model as a directory and as GGUF files, and a way to bench it in a process of its own."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_files(tiny_model, smollm2) -> dict[str, Path]:
    """The directory of a tiny model with SmolLM2's tokenizer, and its GGUF files by type."""
    from petool_lite.export import export_base

    folder = tiny_model(smollm2.directory, max_position_embeddings=1024)
    return {"folder": folder} | {kind: export_base(str(folder), kind) for kind in ("f16", "q4_k_m")}
