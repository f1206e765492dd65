"""Opening a GGUF file in llama.cpp: the one place that loads the library for running models. It uses the C interface
because the high-level class cannot turn off `use_extra_bufts`, see EngineSettings."""

import contextlib
import ctypes
import os
import signal
import threading
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from threading import Thread
from typing import Any

from petool_lite.errors import PetoolError
from petool_lite.gguf_header import check_gguf
from petool_lite.inference import bare
from petool_lite.inference.settings import EngineSettings, tuned_settings

_ERROR = 4  # ggml's level of a message
_errors: list[str] = []  # that llama.cpp logged since the last `quiet`
_loading: dict[tuple[Path, EngineSettings], tuple[Thread, list[Any]]] = {}  # models that are on their way


def quiet(lib: Any) -> None:
    """Send llama.cpp's log to memory instead of stderr; safe to call again."""
    _errors.clear()
    lib.llama_log_set(_log(lib), None)


@lru_cache(maxsize=1)  # ctypes callbacks must outlive their use
def _log(lib: Any) -> Any:
    def keep(level: int, text: bytes, data: Any) -> None:
        if level == _ERROR and (line := text.decode("utf-8", "replace").strip()):
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
    """Let waiting threads spin for a moment and then sleep; OpenMP reads this when it is loaded. Threads that spin at
    every barrier make llama.cpp up to a hundred times slower where another program keeps one core busy, and threads
    that sleep at once nearly three times slower on a quiet machine."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def library() -> Any:
    """llama.cpp's C interface."""
    quiet_threads()
    return bare("llama_cpp", "llama_cpp")


def preload(path: Path) -> EngineSettings:
    """Begin to load a model on a thread, with the settings that tuning found here, which are returned. `open_model`
    takes it from there. Raises PetoolError for what is no GGUF file."""
    check_gguf(path)
    settings = tuned_settings(path)
    if (path, settings) in _loading:
        return settings
    lib = library()
    lib.llama_log_set(ctypes.cast(ctypes.CDLL(None).abs, lib.llama_log_callback), None)  # see `_load`
    found: list[Any] = []
    thread = Thread(target=lambda: found.append(_load(lib, path, settings)))
    _loading[path, settings] = thread, found
    thread.start()
    return settings


def _load(lib: Any, path: Path, settings: EngineSettings, vocab_only: bool = False) -> Any:
    """The loaded model, None if it does not load. Beside other Python code it is run with a log in C that does nothing:
    each of 2,000 lines would wait for its turn."""
    lib.llama_backend_init()
    options = lib.llama_model_default_params()
    options.use_extra_bufts = settings.extra_buffers
    options.n_gpu_layers = 0
    options.vocab_only = vocab_only
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
