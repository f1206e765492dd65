"""Rows of weights to GGUF bytes by the C functions that llama.cpp's own quantizer calls. The one import of them."""

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import Any

from petool_lite.errors import MACHINE, PetoolError


@lru_cache(maxsize=1)
def _library() -> Any:
    """libggml-base as llama_cpp ships it, with the signatures of the functions used here (ggml.h)."""
    import llama_cpp

    llama_cpp.llama_backend_init()  # fills ggml's tables for float16
    folder = Path(llama_cpp.__file__).parent / "lib"
    files = [folder / name for name in ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll")]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise PetoolError(f"no ggml-base library in {folder}", "install llama-cpp-python again", MACHINE)
    library = ctypes.CDLL(str(file))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,  # type
        ctypes.c_void_p,  # float32 source
        ctypes.c_void_p,  # target
        ctypes.c_int64,  # first element
        ctypes.c_int64,  # rows
        ctypes.c_int64,  # elements a row
        ctypes.c_void_p,  # importance of each column, float32, or NULL
    ]
    library.ggml_validate_row_data.restype = ctypes.c_bool
    library.ggml_validate_row_data.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    return library


def tensor_bytes(type_name: str, rows: int, columns: int) -> int:
    """Size of a tensor of the GGUF type `type_name`; `columns` must be a whole number of its blocks."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    return int(rows * columns // block * size)


def quantize_rows(weights: Any, type_name: str, importance: Any = None) -> Any:
    """Float32 `weights` (rows, columns; contiguous torch tensor) as the bytes of `type_name`, a numpy uint8 array.

    `importance` is a float32 numpy array of length columns, or None. The C code releases Python's lock, so threads
    run side by side. Raises PetoolError if the result is not valid by llama.cpp's own check.
    """
    import numpy as np
    from gguf import GGMLQuantizationType

    rows, columns = weights.shape
    kind = int(GGMLQuantizationType[type_name])
    target: Any = np.empty(tensor_bytes(type_name, rows, columns), np.uint8)
    library = _library()
    hint = None if importance is None else importance.ctypes.data
    size = library.ggml_quantize_chunk(kind, weights.data_ptr(), target.ctypes.data, 0, rows, columns, hint)
    if size != target.size or not library.ggml_validate_row_data(kind, target.ctypes.data, size):
        raise PetoolError(f"quantizing to {type_name} gave damaged blocks", "the base or the adapter is damaged")
    return target
