"""What a run was made on: the machine, the code, and how much memory it took."""

import os
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

from petool_lite.inference.settings import cpu_name, default_threads
from petool_lite.runs import versions


def machine(gpu: bool) -> dict[str, Any]:
    """The machine as results record it; memory in GiB."""
    device = "cpu"
    if gpu:
        import torch

        device = torch.cuda.get_device_name() if torch.cuda.is_available() else device
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"device": device, "cpu": cpu_name(), "cores": default_threads(), "host_ram_gb": round(ram, 1)}


def commit() -> str:
    """The commit of the checkout that this code runs from, "-dirty" if it was changed; else the installed version."""
    line = ["git", "-C", str(Path(__file__).resolve().parent)]
    describe = [*line, "describe", "--always", "--dirty", "--abbrev=12"]
    try:  # a package in a virtual environment may lie in a checkout of something else
        subprocess.run([*line, "ls-files", "--error-unmatch", Path(__file__).name], check=True, capture_output=True)
        return subprocess.run(describe, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return versions().get("petool-lite", "unknown")


def forget_peak() -> None:
    """Count the peak of this process's memory from now on, where the kernel lets it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_gb() -> float:
    """The most memory that this process held since `forget_peak`, in GiB; 0 where the kernel does not tell."""
    with suppress(OSError):
        told = Path("/proc/self/status").read_text().partition("VmHWM:")[2]
        return round(int(told.split()[0]) / 2**20, 3)
    return 0.0
