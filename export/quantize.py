"""Quantize a GGUF file with the quantizer inside llama-cpp-python, on all cores. The only import of it for that."""

import os
from pathlib import Path

from petool_lite.errors import PetoolError
from petool_lite.llama_log import first_error, quiet

TYPES = ("q4_k_m", "q4_k_s", "q4_0", "iq4_xs", "q5_k_m", "q5_k_s", "q6_k", "q8_0", "f16", "bf16")


def quantize(source: Path, target: Path, type_name: str) -> None:
    """Write `source` (16-bit GGUF) to `target` in one of TYPES; llama.cpp chooses the type of each tensor."""
    import llama_cpp

    quiet(llama_cpp)
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{type_name.upper()}")
    settings.nthread = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), settings)
    if code != 0 or not target.is_file():
        raise PetoolError(f"quantizing to {type_name} failed: {first_error()}", "is the disk full?")
