"""A machine that cannot train a recipe is told so before anything is read, with what would run there."""

import importlib

import pytest

from petool_lite.errors import PetoolError
from petool_lite.recipe import load_recipe
from petool_lite.train import plan

memory = importlib.import_module("petool_lite.train.memory")


def test_a_recipe_for_a_gpu_says_what_runs_here(command, tmp_path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    result = command("train", "rating", cwd=tmp_path)
    assert result.returncode == 3
    assert "needs a GPU" in result.stderr
    assert "petool-lite train demo" in result.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("capability", "fits"), [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_a_gpu_without_bfloat16_is_refused_before_anything_is_read(monkeypatch, capability, fits) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with pytest.raises(PetoolError) as error:
        plan(load_recipe("rating", ["model.base=/gone", "train.eval_every=1", "train.eval_data=/gone"])[1])
    told = "Tesla T4 has the compute capability 7.5, training needs 8.0"
    assert (error.value.message == told, error.value.exit_code) == ((False, 1) if fits else (True, 3))
    assert fits or "CUDA_VISIBLE_DEVICES= petool-lite train demo" in error.value.hint


def test_a_base_that_cannot_fit_a_cpus_memory_is_refused(smollm2, monkeypatch) -> None:
    """By the least that it takes, and with what would fit."""
    import torch

    monkeypatch.setattr(memory, "arithmetic", lambda: torch.float32)
    for settings, free, told, hint in (
        (["train.method=full"], 1.9, "2.0 GiB of memory on a CPU, 1.9", "--set train.method=lora --set model.precis"),
        ([], 0.4, "0.5 GiB of memory on a CPU, 0.4", "would fit: --set train.method=lora --set model.precision=nf4"),
        (["model.precision=nf4"], 0.1, "0.2 GiB of memory on a CPU, 0.1", "take a smaller base"),
    ):
        monkeypatch.setattr(memory, "free_memory", lambda free=free: free * 2**30)
        with pytest.raises(PetoolError) as error:
            memory.check_cpu_memory(load_recipe("demo", settings)[1], smollm2.directory, smollm2.name)
        assert f"needs at least {told} GiB are free" in error.value.message
        assert (hint in error.value.hint, error.value.exit_code) == (True, 3)
    monkeypatch.setenv("WORLD_SIZE", "2")  # each process has its own
    monkeypatch.setattr(memory, "free_memory", lambda: 0.9 * 2**30)
    with pytest.raises(PetoolError, match=r"at least 1\.0 GiB"):
        memory.check_cpu_memory(load_recipe("demo", ["train.method=lora"])[1], smollm2.directory, smollm2.name)


@pytest.mark.parametrize("width", ["float32", "bfloat16"])
def test_what_runs_on_a_small_machine_is_not_refused(smollm2, monkeypatch, width) -> None:
    import torch

    monkeypatch.setattr(memory, "arithmetic", lambda: getattr(torch, width))
    monkeypatch.setattr(memory, "free_memory", lambda: 2.5 * 2**30)
    for settings in ([], ["model.precision=nf4"], ["train.method=full"]):
        memory.check_cpu_memory(load_recipe("demo", settings)[1], smollm2.directory, smollm2.name)


def test_free_memory_is_what_the_kernel_could_give(tmp_path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    3145728 kB\nSwapFree:  1048576 kB\n\nOdd: 1\n")
    assert memory.free_memory(tmp_path / "meminfo") == 4 * 2**30
    (tmp_path / "meminfo").write_text("SwapFree:  1048576 kB\n")
    assert memory.free_memory(tmp_path / "meminfo") == float("inf")
    assert memory.free_memory(tmp_path / "gone") == float("inf")
    assert memory.free_memory() > 2**27
