"""Memory against what a GPU measured, and what is chosen and refused before anything is loaded."""

from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest

from petool_lite.errors import PetoolError
from petool_lite.families import family_of, shape_of
from petool_lite.recipe import load_recipe
from petool_lite.train import memory, plan
from petool_lite.train.memory import Load, choose, peak_bytes

ROWS = Load((7231, *(2761, 3100, 3290, 2500, 2900) * 140), 0.0126)
GIB = 2**30


def shape(*sizes: int):
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    llama = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True}
    return shape_of(dict(zip((*names, "head_dim", "vocab_size"), sizes, strict=True)) | llama)


LLAMA_3B, SMOLLM2 = shape(3072, 8192, 28, 24, 8, 128, 128256), shape(576, 1536, 30, 9, 3, 64, 49152)


def rating(*settings: str):
    return load_recipe("rating", ["lora.dropout=0.0", "train.optimizer=adamw_torch", *settings])[1]


def test_predicted_memory_is_within_a_tenth_of_the_measured() -> None:
    """GiB at the peak, one H200, 3B shape, Unsloth's layers, 27 November 2026."""
    for way, dropout, tokens, gib in (
        (("nf4", True), "0.0", 8192, 4.05), (("nf4", True), "0.0", 20480, 5.23), (("nf4", True), "0.1", 16261, 5.9),
        (("bf16", False), "0.0", 16240, 42.04), (("bf16", False), "0.0", 48900, 103.77),
    ):  # fmt: skip
        found = peak_bytes(LLAMA_3B, rating(f"lora.dropout={dropout}"), way, tokens, Load((3000,), 0.011))
        assert found / GIB == pytest.approx(gib, rel=0.1)
    for compiled, answers, gib in ((False, 0.05, 57.53), (True, 0.098, 35.33)):  # SmolLM2, all weights, the dry step
        load, smol = Load((1000,), answers), load_recipe("personal")[1]
        found = peak_bytes(SMOLLM2, smol, ("bf16", False), 65_520, load, optimizer=False, compiled=compiled)
        assert found / GIB == pytest.approx(gib, rel=0.05)
    local = family_of({"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"})
    gemma = replace(shape(640, 2048, 18, 4, 1, 256, 262144), family=local)
    found = peak_bytes(gemma, smol, ("bf16", False), 65_224, Load((1000,), 0.055), optimizer=False, compiled=True)
    assert found / GIB == pytest.approx(36.42, rel=0.05)


def test_lean_fits_eight_gigabytes_and_auto_keeps_all_where_it_can() -> None:
    for settings, free in (([], 140), (["lora.dropout=0.1"], 7.6)):
        lean = choose(LLAMA_3B, rating(*settings), ROWS, free * GIB)
        assert 16384 <= lean.token_budget <= 65536
        assert lean.peak_gb <= 0.9 * min(7.4, free)
        assert (lean.precision, lean.checkpointing) == ("nf4", True), "the published numerics"
    ways = {gib: choose(LLAMA_3B, rating("train.memory=auto"), ROWS, gib * GIB) for gib in (140, 80, 24, 8)}
    found = [(way.precision, way.checkpointing) for way in ways.values()]
    assert found == [("bf16", False), ("bf16", False), ("nf4", False), ("nf4", True)]
    assert all(way.peak_gb <= 0.9 * gib for gib, way in ways.items())


def test_the_published_8b_recipe_fits_24_48_and_80_gigabytes_and_70b_two_of_48(monkeypatch) -> None:
    recipe, rows = load_recipe("petoolllama")[1], Load((*(4096, 4096, 4096, 2500) * 500,), 0.015)
    model = shape(4096, 14336, 32, 32, 8, 128, 128256)
    ways = {gib: choose(model, recipe, rows, (gib - 0.9) * GIB) for gib in (24, 48, 80)}
    found = [(way.precision, way.checkpointing, way.token_budget) for way in ways.values()]
    assert found == [("nf4", False, 4096), ("bf16", False, 7168), ("bf16", False, 15360)]
    lean = choose(model, replace(recipe, train=replace(recipe.train, memory="lean")), rows, 23 * GIB)
    assert (lean.precision, lean.peak_gb < 20) == ("bf16", True), "as published"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    part = choose(shape(8192, 28672, 80, 64, 8, 128, 128256), rating(), ROWS, 47 * GIB)
    assert (part.precision, part.checkpointing, part.token_budget) == ("nf4", True, 7231)


def test_too_little_memory_is_refused_with_what_would_fit() -> None:
    with pytest.raises(PetoolError) as error:
        choose(LLAMA_3B, rating("model.precision=bf16", "train.token_budget=65536"), ROWS, 12 * GIB)
    assert (error.value.exit_code, "12.0 GiB are free" in error.value.message) == (3, True)
    fitting = [part.removeprefix("--set ") for part in error.value.hint.removeprefix("would fit: ").split(" --set ")]
    assert choose(LLAMA_3B, rating(*fitting), ROWS, 12 * GIB).peak_gb < 12
    full = rating("train.method=full", "model.precision=bf16")
    with pytest.raises(PetoolError, match=r"needs about \d\d\.\d GiB of GPU memory, 24\.0 GiB") as error:
        choose(LLAMA_3B, full, ROWS, 24 * GIB)
    assert "--set train.method=lora" in error.value.hint


def test_a_gpu_without_bfloat16_is_refused_before_anything_is_read(monkeypatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with pytest.raises(PetoolError, match=r"Tesla T4 has the compute capability 7\.5, training needs 8\.0") as error:
        plan(load_recipe("rating", ["model.base=/gone"])[1])
    assert (error.value.exit_code, "CUDA_VISIBLE_DEVICES= petool-lite train demo" in error.value.hint) == (3, True)


def test_a_base_that_cannot_fit_a_cpus_memory_is_refused_with_what_would(smollm2, monkeypatch) -> None:
    import torch

    def refusal(free: float, *settings: str) -> str:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free * GIB))
        monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(free=0))
        try:
            memory.check_cpu_memory(load_recipe("demo", settings)[1], replace(smollm2, name="it"))
        except PetoolError as error:
            assert error.exit_code == 3
            return f"{error.message} | {error.hint}"
        return ""

    monkeypatch.setattr(memory, "arithmetic", lambda: torch.float32)
    assert not any(refusal(2.5, *settings) for settings in ([], ["model.precision=nf4"], ["train.method=full"]))
    fitting = "would fit: --set train.method=lora --set model.precision=bf16"
    needed = "it needs at least 2.0 GiB of memory on a CPU, 1.9 GiB are free"
    assert refusal(1.9, "train.method=full") == f"{needed} | {fitting}"
    assert "take a smaller base" in refusal(0.1, "model.precision=nf4")
    monkeypatch.setenv("WORLD_SIZE", "2")  # each process has its own
    assert "at least 1.3 GiB" in refusal(1.0)
