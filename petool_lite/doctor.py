"""`doctor`: what this machine can do, found by trying it."""

import platform
import shutil
import sys
from pathlib import Path
from typing import Any

from petool_lite.base import embedded_gguf
from petool_lite.errors import PetoolError
from petool_lite.runs import versions


def examine() -> dict[str, Any]:
    """Facts of this machine: Python, CPU, GPU, llama.cpp's health by a real decode, disk. Sizes in GiB."""
    return {
        "python": sys.version.split()[0],
        "machine": platform.machine(),
        "cpu": _cpu(),
        "gpu": _gpu(),
        "llama_cpp": _llama_cpp(),
        "disk_free_gb": round(shutil.disk_usage(Path.cwd()).free / 2**30, 1),
        "versions": versions(),
    }


def _cpu() -> dict[str, Any]:
    from petool_lite.inference.settings import default_threads

    info = Path("/proc/cpuinfo")
    flags = info.read_text().partition("flags")[2].partition("\n")[0].split() if info.is_file() else []
    return {"cores": default_threads(), "amx": "amx_tile" in flags, "avx512": "avx512f" in flags}


def _gpu() -> dict[str, Any] | None:
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return {
        "name": torch.cuda.get_device_name(),
        "memory_gb": round(total / 2**30, 1),
        "free_gb": round(free / 2**30, 1),
        "bf16": torch.cuda.is_bf16_supported(),
    }


def _llama_cpp() -> dict[str, Any]:
    from petool_lite.inference.llama import LlamaModel

    try:
        with LlamaModel(embedded_gguf(), n_ctx=512) as model:
            ids = model.encode("The quick brown fox jumps over the lazy dog. " * 30)[:256]
            reply = model.generate(ids, 16)
    except (PetoolError, ImportError, OSError) as error:
        return {"works": False, "why": str(error)}
    return {
        "works": True,
        "prefill_tokens_per_s": round(reply.prompt_tokens / reply.prefill_s),
        "decode_tokens_per_s": round(len(reply.ids) / reply.decode_s) if reply.decode_s and reply.ids else 0,
    }
