"""Signals: what a second one does, and that all processes of a run stop together."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from petool_lite.train.signals import stop_signals

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


def test_outside_a_training_loop_it_interrupts_and_the_old_handler_comes_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), stop_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert (stop.name, stop.exit_code) == ("SIGTERM", 143)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_that_a_library_swallowed_stops_before_the_first_step() -> None:
    with stop_signals() as stop:
        with contextlib.suppress(BaseException):  # as a library does while it is imported
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        with pytest.raises(KeyboardInterrupt), stop.between_steps():
            raise AssertionError("a step was taken")
    assert not stop.graceful


def test_one_process_that_stops_stops_all(tmp_path) -> None:
    lines = [[sys.executable, "-c", AGREE, rank, tmp_path / "meeting"] for rank in ("0", "1")]
    both = [subprocess.Popen(line, stdout=subprocess.PIPE, text=True) for line in lines]
    assert [process.communicate(timeout=250)[0] for process in both] == ["False True\n"] * 2
