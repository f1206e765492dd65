"""How fast llama.cpp runs here: the settings, where `doctor --tune` keeps the best ones, and what they are kept for."""

import contextlib
import hashlib
import json
import os
import platform
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from petool_lite.places import cache_place
from petool_lite.runs import write_json


@dataclass(frozen=True)
class EngineSettings:
    """Speed settings of one context. Threads of 0 mean every core that this process may use. `ubatch` is the number of
    prompt tokens in one matrix product. Flash attention reads new prompts up to an eighth faster, and a returning
    user's few tokens behind 3,000 others in twice the time; it rounds otherwise. The KV type q8_0 needs it, and halves
    the memory of a prompt. With extra buffers weights are repacked at loading for kernels of this CPU, AMX among them,
    which crash in builds by some compilers: `doctor --tune` tries them in another process."""

    threads_decode: int = 0
    threads_prefill: int = 0
    ubatch: int = 512
    flash_attention: bool = False
    kv_type: str = "f16"
    extra_buffers: bool = False


@lru_cache(maxsize=1)
def library_stamp() -> str:
    """What tells the installed build of llama.cpp from any other: the sizes and times of its files."""
    spec = find_spec("llama_cpp")
    folders = [Path(folder, "lib") for folder in (spec.submodule_search_locations or [] if spec else [])]
    facts = [file.stat() for folder in folders for file in sorted(folder.glob("lib*"))]
    return " ".join(f"{item.st_size}.{item.st_mtime_ns}" for item in facts)


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
        from petool_lite.models import file_sha256

        found = file_sha256(path)
        with contextlib.suppress(OSError):  # then it is found again the next time
            write_json(kept, {"sha256": found})
        return found


def _tuned_file(model: Path) -> Path:
    machine = f"{platform.machine()} {cpu_name()} {default_threads()} {library_stamp()} {model_sha256(model)}"
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
    write_json(target := _tuned_file(model), {"settings": asdict(settings), "model": str(model), "cpu": cpu_name()})
    return target
