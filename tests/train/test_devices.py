"""Two processes on one CPU train as one does."""

import json
import subprocess
import sys

import pytest
from support import own_runs, rows_of, tiny_settings


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_and_one_of_them_writes(trained, tiny, tmp_path) -> None:
    """The same losses, gradient norms and adapter but for rounding; rows differ in number and length on both."""
    from safetensors.torch import load_file

    plain = ["train.max_steps=4", "train.rows=3", "train.token_budget=300", "lora.dropout=0.0"]
    runs = []
    for name, launcher in (("two", ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]), ("one", [])):
        root = tmp_path / name
        root.mkdir()
        line = [sys.executable, "-m", *launcher, "petool_lite", "train", "demo", *tiny_settings(tiny, *plain), "--json"]
        variables = own_runs(root) | {"OMP_NUM_THREADS": "1"}
        result = subprocess.run(line, cwd=root, env=variables, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stderr
        documents = [row for row in result.stdout.splitlines() if row.startswith("{")]
        assert len(documents) == 1, "only the first process reports"
        runs.append(root / json.loads(documents[0])["run"])
    assert len(list((tmp_path / "two" / "runs").iterdir())) == 1, "one run directory"
    for mine, alone in zip(*map(rows_of, runs), strict=True):
        assert mine["tokens"] == alone["tokens"]
        assert mine["loss"] == pytest.approx(alone["loss"], rel=1e-3)
        assert mine["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-2)
    mine, alone = (load_file(run / "adapter" / "adapter_model.safetensors") for run in runs)
    for name, found in mine.items():
        assert (found - alone[name]).norm() < 0.05 * alone[name].norm() + 1e-3
    assert {path.name for path in runs[0].iterdir()} == {path.name for path in runs[1].iterdir()}
