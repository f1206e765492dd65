"""Opening a GGUF file in llama.cpp, the one place that loads it for running models: with which settings, and where
`doctor --tune` keeps the best. In C, for the high-level class cannot turn off `use_extra_bufts`: see EngineSettings."""

import contextlib
import ctypes
import hashlib
import json
import os
import platform
import signal
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from petool_lite.errors import PetoolError
from petool_lite.gguf_header import check_gguf
from petool_lite.inference import bare
from petool_lite.places import cache_place, default_threads
from petool_lite.runs import write_json


@dataclass(frozen=True)
class EngineSettings:
    """Speed settings of one context. Threads of 0 are all cores of this process, `ubatch` is how many prompt tokens are
    in one matrix product. Flash attention reads new prompts up to an eighth faster, and a returning user's few tokens
    behind 3,000 others in twice the time; it rounds otherwise. The KV type q8_0 needs it, and halves a prompt's memory.
    Extra buffers hold weights repacked for kernels of this CPU, AMX among them, which crash in builds by older GCC
    (see requirements/amx.h): `doctor --tune` tries them in another process."""

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


_errors: list[str] = []  # that llama.cpp logged since the last `quiet`
_loading: dict[tuple[Path, EngineSettings], tuple[threading.Thread, list[Any]]] = {}  # models that are on their way


def quiet(lib: Any) -> None:
    """Send llama.cpp's log to memory instead of stderr; safe to call again."""
    _errors.clear()
    lib.llama_log_set(_log(lib), None)


@lru_cache(maxsize=1)  # ctypes callbacks must outlive their use
def _log(lib: Any) -> Any:
    def keep(level: int, text: bytes, data: Any) -> None:
        if level == 4 and (line := text.decode("utf-8", "replace").strip()):  # ggml's number of errors
            _errors.append(line)

    return lib.llama_log_callback(keep)


def first_error() -> str:
    """The first error that llama.cpp logged since the last `quiet`, or "no reason given"."""
    return _errors[0] if _errors else "no reason given"


@contextlib.contextmanager
def held_signals() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM that come inside are answered at the end; yields the list that they are put in. Raised in
    Python code that C code has called, such as the log's, an interrupt would be printed and lost."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    own = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in own:
        signal.signal(number, lambda number, frame: seen.append(number))
    try:
        yield seen
    finally:
        for number, handler in own.items():
            signal.signal(number, handler)
    for caught in seen:
        own[signal.Signals(caught)](caught, None)


def quiet_threads() -> None:
    """Let waiting threads spin a moment, then sleep; OpenMP reads this when loaded. If they spin on, llama.cpp is up to
    a hundred times slower beside a busy program; if they sleep at once, nearly three times on a quiet machine."""
    if "OMP_WAIT_POLICY" not in os.environ:
        # "passive" would ignore the count where a process has had more threads than cores, as export has through torch
        os.environ["OMP_WAIT_POLICY"] = "active"
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
        os.environ.setdefault("KMP_BLOCKTIME", "0")  # LLVM's and Intel's OpenMP, where "active" has no end


def library() -> Any:
    """llama.cpp's C interface."""
    quiet_threads()
    return bare("llama_cpp", "llama_cpp")


def preload(path: Path) -> EngineSettings:
    """Begin to load a model, for `open_model`, with what tuning found here (returned). Raises PetoolError."""
    check_gguf(path)
    settings = tuned_settings(path)
    if (path, settings) in _loading:
        return settings
    lib = library()
    lib.llama_log_set(ctypes.cast(ctypes.CDLL(None).abs, lib.llama_log_callback), None)  # see `_load`
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(_load(lib, path, settings)))
    _loading[path, settings] = thread, found
    thread.start()
    return settings


def _load(lib: Any, path: Path, settings: EngineSettings, vocab_only: bool = False) -> Any:
    """The loaded model, or None. Beside Python code its log is C code that does nothing: 2,000 lines would wait."""
    lib.llama_backend_init()
    options = lib.llama_model_default_params()
    options.use_extra_bufts, options.n_gpu_layers, options.vocab_only = settings.extra_buffers, 0, vocab_only
    return lib.llama_model_load_from_file(str(path).encode(), options)


def open_model(path: Path, settings: EngineSettings, vocab_only: bool = False) -> tuple[Any, Any]:
    """The library and the loaded model, memory-mapped; `llama_model_free` frees it. Raises PetoolError."""
    check_gguf(path)
    lib, model = library(), None
    if not vocab_only and (path, settings) in _loading:
        thread, found = _loading.pop((path, settings))
        thread.join()
        model = found[0]
    quiet(lib)
    if not model:
        with held_signals():
            model = _load(lib, path, settings, vocab_only)
    if not model:
        raise PetoolError(f"llama.cpp cannot load {path}: {first_error()}", "the file may be damaged; export it again")
    return lib, model
