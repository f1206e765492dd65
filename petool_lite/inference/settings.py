"""How fast llama.cpp runs here: the settings, where `doctor --tune` keeps the best ones, and what they are kept for."""

import contextlib
import hashlib
import json
import os
import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from petool_lite.models import file_sha256
from petool_lite.places import cache_place
from petool_lite.runs import write_json


@dataclass(frozen=True)
class EngineSettings:
    """Speed settings of one context. Threads of 0 mean every core that this process may use.

    `ubatch` is the number of prompt tokens in one matrix product. Flash attention is on, as llama-server has it: it
    reads prompts faster, decodes slower behind thousands of tokens, and rounds otherwise. The KV type q8_0 needs it,
    and halves the memory of a prompt.
    """

    threads_decode: int = 0
    threads_prefill: int = 0
    ubatch: int = 512
    flash_attention: bool = True
    kv_type: str = "f16"


def library_version() -> str:
    """The version of llama-cpp-python, which fixes that of llama.cpp."""
    return metadata.version("llama-cpp-python")


def default_threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def model_sha256(path: Path) -> str:
    """SHA-256 of a model file, remembered for as long as its size and time stay the same (2 GB take seconds)."""
    facts = path.stat()
    name = hashlib.sha256(f"{path.resolve()} {facts.st_size} {facts.st_mtime_ns} {facts.st_ino}".encode()).hexdigest()
    kept = cache_place("hashes", f"{name[:32]}.json")
    try:
        return str(json.loads(kept.read_text())["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        found = file_sha256(path)
        with contextlib.suppress(OSError):  # then it is found again the next time
            write_json(kept, {"sha256": found})
        return found


def _tuned_file(model: Path) -> Path:
    machine = f"{platform.machine()} {cpu_name()} {default_threads()} {library_version()} {model_sha256(model)}"
    return cache_place("tuned", f"{hashlib.sha256(machine.encode()).hexdigest()[:32]}.json")


def cpu_name() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    return text.partition("model name")[2].partition("\n")[0].lstrip("\t :") or platform.processor()


def tuned_settings(model: Path) -> EngineSettings:
    """What `doctor --tune` found for this model file on this machine; the defaults where it never ran."""
    try:
        return EngineSettings(**json.loads(_tuned_file(model).read_text())["settings"])
    except (OSError, ValueError, KeyError, TypeError):
        return EngineSettings()


def remember_settings(model: Path, settings: EngineSettings) -> Path:
    """Keep `settings` for this model file on this machine; returns the file."""
    target = _tuned_file(model)
    write_json(target, {"settings": asdict(settings), "model": str(model), "cpu": cpu_name()})
    return target
