"""`doctor`: what this machine can do, found by trying it."""

import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from petool_lite.console import Report, silent
from petool_lite.errors import PetoolError
from petool_lite.inference.gpu import gpu_facts
from petool_lite.inference.llama import LlamaModel
from petool_lite.inference.llama_open import EngineSettings, remember_settings
from petool_lite.models import embedded_gguf
from petool_lite.places import default_threads
from petool_lite.runs import versions


def examine(model: Path | None = None) -> dict[str, Any]:
    """Facts of this machine, llama.cpp's health by a real decode of `model`, else the embedded base; sizes in GiB."""
    info = Path("/proc/cpuinfo")
    flags = info.read_text().partition("flags")[2].partition("\n")[0].split() if info.is_file() else []
    cpu = {"cores": default_threads(), "avx512": "avx512f" in flags, "amx": "amx_tile" in flags}
    try:
        model = model or embedded_gguf()
        cpu |= {"amx_kernels_work": kernels_work(model)} if cpu["amx"] else {}
        with LlamaModel(model, n_ctx=512) as loaded:
            reply = loaded.generate(loaded.encode("The quick brown fox jumps over the lazy dog. " * 30)[:256], 16)
        decode = round(len(reply.ids) / reply.decode_s) if reply.decode_s and reply.ids else 0
        speed = {"prefill_tokens_per_s": round(reply.prompt_tokens / reply.prefill_s), "decode_tokens_per_s": decode}
        decoded: dict[str, Any] = {"works": True, **speed}
    except (PetoolError, ImportError, OSError) as error:
        decoded = {"works": False, "why": str(error)} if model else {"not tried": f"as {error}; --model names a file"}
    found = {"python": sys.version.split()[0], "machine": platform.machine(), "cpu": cpu, "gpu": gpu_facts()}
    free = round(shutil.disk_usage(Path.cwd()).free / 2**30, 1)
    return found | {"llama_cpp": decoded, "disk_free_gb": free, "versions": versions()}


_PROMPT, _QUERY, _REPLY = 768, 40, 24  # tokens of the probe
# A typical call is tuned: a new process, of four users one whose prompt is new, a query, ten batches of four tokens.
_NEW, _BATCHES, _TOKENS = 0.25, 10, 4
_WORTH = 0.03  # a setting must save this share of the time to replace a plainer one


def kernels_work(model: Path) -> bool:
    """Whether repacked weights, AMX among them, work and write what plain ones do; in a process they may crash."""
    said = "{doctor._trial(pathlib.Path(sys.argv[1]), doctor.EngineSettings(extra_buffers=on))[1][0] for on in (0, 1)}"
    code = f"import pathlib, sys; from petool_lite import doctor; sys.exit(len({said}) - 1)"
    return subprocess.run([sys.executable, "-c", code, str(model)], capture_output=True, timeout=600).returncode == 0


def tune(model: Path, report: Report = silent) -> dict[str, Any]:
    """Measure speed settings for `model` on this machine, one kind after the other, and remember the best. Returns the
    trials with their tokens/s and seconds of a typical call. Raises PetoolError if the model does not load."""
    cores = default_threads()
    fewer = sorted({max(1, cores // 2), max(1, cores - 1)} - {cores})
    kinds: dict[str, list[dict[str, Any]]] = {
        "prefill threads": [{"threads_prefill": count} for count in fewer],
        "decode threads": [{"threads_decode": count} for count in fewer],
        "batch size": [{"ubatch": size} for size in (128, 256, 1024)],
        "repacked weights": [{"extra_buffers": True}],
        "flash attention": [{"flash_attention": True}],
        "kv type": [{"flash_attention": True, "kv_type": "q8_0"}],
    }
    settings = EngineSettings()
    best, ids = _trial(model, settings)
    trials = [best]
    for place, (kind, changes) in enumerate(kinds.items()):
        report("tuning", place, len(kinds), kind)
        if kind == "repacked weights" and not kernels_work(model):
            continue
        for tried in [replace(settings, **change) for change in changes]:
            trial, said = _trial(model, tried)
            trials.append(trial)
            # A KV type that changes the reply is no mere matter of speed.
            if (kind != "kv type" or said == ids) and trial["call_s"] < best["call_s"] * (1 - _WORTH):
                settings, best, ids = tried, trial, said
    report("tuning", len(kinds), len(kinds), "")
    kept = remember_settings(model, settings)
    return {"model": str(model), "settings": asdict(settings), "kept_in": str(kept), "trials": trials}


def _trial(model: Path, settings: Any) -> tuple[dict[str, Any], Sequence[int]]:
    """The settings with their figures, of two runs the faster one, as others' work only adds time; the reply's ids."""
    written, runs = _PROMPT + _QUERY + _BATCHES * _TOKENS, []
    started = time.perf_counter()
    with LlamaModel(model, n_ctx=written + _REPLY, settings=settings) as loaded:
        ids = loaded.encode('{"tool": "search", "query": "The quick brown fox jumps over the lazy dog."}\n' * 80)
        loaded.read(ids[:1])
        load = time.perf_counter() - started
        for _ in range(2):
            reply = loaded.generate(ids[:_PROMPT], _REPLY)
            started = time.perf_counter()
            for length in range(_PROMPT + _QUERY, written + 1, _TOKENS):
                loaded.read(ids[:length])
            runs.append((reply.prefill_s, reply.decode_s / len(reply.ids), time.perf_counter() - started))
    prefill, decode, returning = (min(times) for times in zip(*runs, strict=True))
    figures = {"load_s": load, "prefill_tokens_per_s": _PROMPT / prefill, "decode_tokens_per_s": 1 / decode}
    figures["call_s"] = load + _NEW * prefill + returning
    return asdict(settings) | {key: round(value, 3) for key, value in figures.items()}, reply.ids
