"""Opening a GGUF file in llama.cpp and a context over it: the one place that loads the library for running models.

It uses the C interface because the high-level class cannot turn off `use_extra_bufts`: on machines with AMX those
kernels crash in builds by some compilers.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from petool_lite.errors import PetoolError
from petool_lite.gguf_header import check_gguf
from petool_lite.inference.settings import EngineSettings, default_threads

_BATCH = 2048  # the most tokens in one call of llama_decode
_KV_TYPES = {"f16": 1, "q8_0": 8}  # ggml's numbers
_ERROR = 4  # ggml's level of a message
_kept: list[str] = []
_callback: Any = None  # ctypes callbacks must outlive their use


def quiet(llama_cpp: Any) -> None:
    """Send llama.cpp's log to memory instead of stderr; safe to call again."""
    global _callback
    _kept.clear()
    if _callback is None:

        def keep(level: int, text: bytes, data: Any) -> None:
            if level == _ERROR:
                _kept.append(text.decode("utf-8", "replace").strip())

        _callback = llama_cpp.llama_log_callback(keep)
        llama_cpp.llama_log_set(_callback, None)


def first_error() -> str:
    """The first error that llama.cpp logged since the last `quiet`, or "no reason given"."""
    return next((line for line in _kept if line), "no reason given")


class Closing:
    """What holds C memory until `close`: a `with` block calls it."""

    def close(self) -> None:
        """Free what is held; calling it again does nothing."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def held_signals() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM that come inside are answered at the end; yields the list that they are put in.

    Raised in Python code that C code has called, such as the log's, an interrupt would be printed and lost.
    """
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
    """Let waiting threads spin for a moment and then sleep; OpenMP reads this when it is loaded.

    Threads that spin at every barrier make llama.cpp up to a hundred times slower where another program keeps one core
    busy, and threads that sleep at once nearly three times slower on a quiet machine.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def open_model(path: Path, vocab_only: bool = False) -> tuple[Any, Any]:
    """The library and the loaded model, memory-mapped, on the CPU; free it with `llama_model_free`.

    Raises PetoolError if it does not load.
    """
    quiet_threads()
    import llama_cpp

    check_gguf(path)
    quiet(llama_cpp)
    llama_cpp.llama_backend_init()
    options = llama_cpp.llama_model_default_params()
    options.use_extra_bufts = False  # AMX kernels may crash, see the module's docstring
    options.n_gpu_layers = 0
    options.vocab_only = vocab_only
    with held_signals():
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
    if not model:
        raise PetoolError(f"llama.cpp cannot load {path}: {first_error()}", "the file may be damaged; export it again")
    return llama_cpp, model


def open_context(lib: Any, model: Any, n_ctx: int, settings: EngineSettings, sequences: int = 1) -> Any:
    """A context of `n_ctx` tokens that all its `sequences` share; free it with `llama_free`.

    Raises PetoolError if there is no room for it.
    """
    options = lib.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch = n_ctx, _BATCH, settings.ubatch
    options.n_seq_max, options.kv_unified = sequences, True
    options.n_threads = settings.threads_decode or default_threads()
    options.n_threads_batch = settings.threads_prefill or default_threads()
    on, off = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED, lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
    options.flash_attn_type = on if settings.flash_attention else off
    options.type_k = options.type_v = _KV_TYPES[settings.kv_type]
    with held_signals():
        context = lib.llama_init_from_model(model, options)
    if not context:
        raise PetoolError(f"llama.cpp cannot open a context of {n_ctx} tokens: {first_error()}", "use less")
    return context
