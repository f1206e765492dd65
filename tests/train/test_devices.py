"""What trains: a processor's arithmetic, two processes on one CPU, which train and stop as one does, and signals."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from support import own_runs, rows_of, tiny_settings

from petool_lite.train.devices import arithmetic
from petool_lite.train.signals import stop_signals


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


def test_a_processor_multiplies_in_what_it_has_instructions_for(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, wanted in (("amx_bf16", torch.bfloat16), ("avx512_bf16", torch.bfloat16), ("avx2", torch.float32)):
        found = {"amx_bf16": False, "avx512_bf16": False, name: True}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found)
        assert arithmetic.__wrapped__() == wanted


def test_the_gpus_memory_grows_in_place_unless_the_user_says_otherwise() -> None:
    """As torch, imported already, says it of its memory."""
    lines = ["import platform, torch", "from petool_lite.train.devices import grow_in_place"]
    lines += ["platform.uname = lambda real=platform.uname: real()._replace(machine='x86_64', release='6.6')"]
    lines += ["grow_in_place()", "print(torch._C._accelerator_getAllocatorSettings())"]
    for own, said in (({}, "expandable_segments:True"), ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split")):
        clean = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name} | own
        assert said in subprocess.check_output([sys.executable, "-c", "\n".join(lines)], env=clean, text=True)


STUBBORN = """
import time
from petool_lite.train.signals import stop_signals
with stop_signals() as stop:
    with stop.between_steps():
        print("ready", flush=True)
        while True:
            time.sleep(0.01)
"""
AGREE = """
import os, sys
import torch
from petool_lite.train.devices import agreed
torch.distributed.init_process_group("gloo", f"file://{sys.argv[2]}", rank=int(sys.argv[1]), world_size=2)
os.environ["WORLD_SIZE"] = "2"
print(agreed(False), agreed(sys.argv[1] == "1"))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_waits_and_the_second_ends_at_once(number) -> None:
    line = [sys.executable, "-c", STUBBORN]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        said = process.stderr.readline() + process.stderr.readline()  # until then a second one would be lost in it
        assert "once more leaves at once" in said
        assert process.poll() is None
        process.send_signal(number)
        assert process.wait(100) == -number


def test_a_signal_outside_a_training_loop_stops_before_the_first_step_also_where_a_library_swallowed_it() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_signals() as stop:
        with pytest.raises(KeyboardInterrupt):  # which a library may suppress while it is imported
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        with pytest.raises(KeyboardInterrupt), stop.between_steps():
            raise AssertionError("a step was taken")
    assert (stop.name, stop.exit_code, stop.graceful) == ("SIGTERM", 143, False)
    assert signal.getsignal(signal.SIGTERM) is before


def test_one_process_that_stops_stops_all(tmp_path) -> None:
    lines = [[sys.executable, "-c", AGREE, rank, tmp_path / "meeting"] for rank in ("0", "1")]
    both = [subprocess.Popen(line, stdout=subprocess.PIPE, text=True) for line in lines]
    assert [process.communicate(timeout=250)[0] for process in both] == ["False True\n"] * 2
