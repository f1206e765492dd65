"""llama.cpp's log: kept from the terminal, its errors kept for our own messages."""

from typing import Any

_ERROR = 4
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
