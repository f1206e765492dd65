"""What trains: the arithmetic of a processor, and two processes on one CPU, which train as one does."""

import json
import os
import platform
import subprocess
import sys

import pytest
import torch
from support import own_runs, tiny_settings

from petool_lite.train.devices import arithmetic


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_and_one_of_them_writes(trained, tiny, tmp_path) -> None:
    """The same losses, gradient norms and adapter but for rounding; rows differ in number and length on both."""
    from safetensors.torch import load_file

    module = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "petool_lite",
    ]
    plain = ["--set", "lora.dropout=0.0", "--set", "train.max_steps=4", "--set", "train.rows=3", "--json"]
    runs = []
    for name, line in (("two", module), ("one", [sys.executable, "-m", "petool_lite"])):
        root = tmp_path / name
        root.mkdir()
        variables = own_runs(root) | {"OMP_NUM_THREADS": "1"}
        line = [*line, "train", "demo", *tiny_settings(tiny), *plain, "--set", "train.token_budget=300"]
        result = subprocess.run(line, cwd=root, env=variables, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stderr
        documents = [row for row in result.stdout.splitlines() if row.startswith("{")]
        assert len(documents) == 1, "only the first process reports"
        runs.append(root / json.loads(documents[0])["run"])
    assert len(list((tmp_path / "two" / "runs").iterdir())) == 1, "one run directory"
    two, one = ([json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()] for run in runs)
    for mine, alone in zip(two, one, strict=True):
        assert mine["tokens"] == alone["tokens"]
        assert mine["loss"] == pytest.approx(alone["loss"], rel=1e-3)
        assert mine["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-2)
    mine, alone = (load_file(run / "adapter" / "adapter_model.safetensors") for run in runs)
    for name, found in mine.items():
        assert (found - alone[name]).norm() < 0.05 * alone[name].norm() + 1e-3
    assert {path.name for path in runs[0].iterdir()} == {path.name for path in runs[1].iterdir()}


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        ({"amx_bf16": True, "avx2": True}, torch.bfloat16),
        ({"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": False, "avx2": True}, torch.float32),
    ],
)
def test_a_processor_multiplies_in_what_it_has_instructions_for(found, wanted, monkeypatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert arithmetic.__wrapped__() == wanted


def asked(before: dict[str, str], told: str) -> str:
    """What torch says of its memory in a process that calls `grow_in_place` with torch imported already."""
    lines = ["import torch", told, "from petool_lite.train.devices import grow_in_place as grow", "grow()"]
    line = [sys.executable, "-c", "\n".join([*lines, "print(torch._C._accelerator_getAllocatorSettings())"])]
    clean = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
    result = subprocess.run(line, env=clean | before, capture_output=True, text=True, check=True)
    return result.stdout.strip()


@pytest.mark.skipif(platform.machine() != "x86_64" or platform.system() != "Linux", reason="asked for on such alone")
def test_the_gpus_memory_grows_in_place_unless_the_user_says_otherwise() -> None:
    assert asked({}, "") == "expandable_segments:True"
    assert asked({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "") == "max_split_size_mb:64"
    assert "expandable" not in asked({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "")
    wsl = "import platform as p; p.uname = lambda f=p.uname: f()._replace(release='6.6-microsoft-standard-WSL2')"
    assert asked({}, wsl) == ""
