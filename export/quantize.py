"""Which GGUF type each tensor gets, and the C functions of llama.cpp that make its bytes. The rule for types is that of
`llama_tensor_get_type` (src/llama-quant.cpp in llama-cpp-python 0.3.36), for the Llama architecture without experts."""

import ctypes
import math
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from petool_lite.errors import PetoolError
from petool_lite.families import Shape

# A type of files, as gguf.LlamaFileType has it after MOSTLY_ -> the tensor type that most of such a file has
_MOSTLY = {
    "q4_k_m": "Q4_K", "q4_k_s": "Q4_K", "q4_0": "Q4_0", "iq4_xs": "IQ4_XS", "q5_k_m": "Q5_K", "q5_k_s": "Q5_K",
    "q6_k": "Q6_K", "q8_0": "Q8_0", "f16": "F16", "bf16": "BF16",
}  # fmt: skip
TYPES = tuple(_MOSTLY)
Shapes = Mapping[str, tuple[int, ...]]  # GGUF tensor name -> (rows, columns) or (columns,)
_FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}


def choose_types(shapes: Shapes, file_type: str, model: Shape, has_imatrix: bool) -> dict[str, str]:
    """GGUF tensor name (`blk.3.attn_q.weight`) -> name of its gguf.GGMLQuantizationType; vectors and norms are F32."""
    default = _MOSTLY[file_type]
    types = {}
    for name, shape in shapes.items():
        if "_norm" in name or name.endswith(".bias") or name == "rope_freqs.weight":
            types[name] = "F32"
        elif default in ("F16", "BF16"):  # nothing to choose
            types[name] = default
        else:
            width = shape[-1]
            wanted = _wanted(name, width, file_type, default, model, has_imatrix)
            fitting = (kind for kind in (wanted, _FALLBACK.get(wanted, wanted)) if width % _sizes(kind)[0] == 0)
            types[name] = next(fitting, "F16")
    return types


def _wanted(name: str, width: int, file_type: str, default: str, model: Shape, has_imatrix: bool) -> str:
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if block is None:
        if name != "output.weight" and not (name == "token_embd.weight" and model.tied):
            return default
        return "Q8_0" if default == "Q8_0" or width % _sizes(default)[0] else "Q6_K"
    layer, kind = int(block[1]), block[2]
    eighth = model.layers // 8
    early = layer < eighth
    more = early or layer >= 7 * model.layers // 8 or (layer - eighth) % 3 == 2  # first, last, every third between
    raised = {  # what gets more bits than the rest of its file, where it does, and how many
        **{(part, mixed): (more, "Q6_K") for part in ("attn_v", "ffn_down") for mixed in ("q4_k_m", "q5_k_m")},
        ("attn_v", "q4_k_s"): (layer < 4, "Q5_K"),
        ("attn_v", "iq4_xs"): (model.heads // model.key_value_heads >= 4, "Q5_K"),
        ("ffn_down", "q4_k_s"): (early, "Q5_K"),
        ("ffn_down", "iq4_xs"): (early and not has_imatrix, "Q5_K"),
        ("ffn_down", "q4_0"): (early and has_imatrix, "Q4_1"),
    }
    holds, better = raised.get((kind, file_type), (False, default))
    is_70b = model.layers == 80 and model.heads != model.key_value_heads  # told by its shape, as llama.cpp does
    if kind == "attn_v" and is_70b and not holds and default == "Q4_K":
        return "Q5_K"
    return better if holds else default


def _sizes(type_name: str) -> tuple[int, int]:
    """Weights in a block of a type, and the block's bytes."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    weights, size = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    return int(weights), int(size)


@lru_cache(maxsize=1)
def _library() -> Any:
    """llama_cpp's library, ggml with it, with the signatures of the functions used here (ggml.h)."""
    import llama_cpp

    llama_cpp.llama_backend_init()  # fills ggml's tables for float16
    library = llama_cpp.llama_cpp._lib
    number, pointer, long = ctypes.c_int, ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    # type, float32 source, target, first element, rows, elements a row, importance of each column in float32 or NULL
    library.ggml_quantize_chunk.argtypes = [number, pointer, pointer, long, long, long, pointer]
    library.ggml_validate_row_data.restype = ctypes.c_bool
    library.ggml_validate_row_data.argtypes = [number, pointer, ctypes.c_size_t]
    return library


def tensor_bytes(type_name: str, *shape: int) -> int:
    """Size of a tensor of the GGUF type `type_name`; a row must be a whole number of its blocks."""
    block, size = _sizes(type_name)
    return math.prod(shape) // block * size


def quantize_rows(weights: Any, type_name: str, importance: Any = None) -> Any:
    """Float32 `weights` (rows, columns; contiguous torch tensor) as the bytes of `type_name`, numpy uint8; `importance`
    is float32 numpy (columns,), or None. Releases Python's lock. Raises PetoolError for damaged blocks."""
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
