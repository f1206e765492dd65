"""The adapter side of a merge: read a PEFT LoRA adapter, and add its delta to rows of a base tensor in float32."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petool_lite.adapters import WEIGHTS, read_adapter_config
from petool_lite.errors import PetoolError


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: tensor name -> (A of shape (r, in), B of shape (out, r)), both float32, and the scale."""

    modules: Mapping[str, tuple[Any, Any]]
    scale: float
    rank: int
    base_name: str

    def delta(self, name: str, first: int = 0, last: int | None = None) -> Any:
        """Rows [first, last) of scale * B @ A for the tensor `name`, float32, computed as PEFT does."""
        low, high = self.modules[name]
        return (high[first:last] @ low) * self.scale


def load_adapter(folder: Path) -> Adapter:
    """Read adapter_config.json and adapter_model.safetensors. Raises PetoolError if a file is missing or damaged, holds
    more than plain LoRA matrices, or was never trained."""
    from safetensors.torch import load_file

    config = read_adapter_config(folder)
    pairs: dict[str, dict[str, Any]] = {}
    for name, matrix in load_file(folder / WEIGHTS).items():
        # base_model.model.model.layers.0.mlp.up_proj.lora_A.weight
        module, _, side = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        pairs.setdefault(module, {})[side] = matrix.float().contiguous()
    broken = [module for module, pair in pairs.items() if set(pair) != {"A", "B"}]
    if broken:
        raise PetoolError(f"the adapter {folder} is incomplete: {', '.join(broken)}", "train the run again")
    for module, pair in pairs.items():
        if not all(bool(matrix.isfinite().all()) for matrix in pair.values()):
            raise PetoolError(f"damaged adapter: {module} holds values that are not finite", "train the run again")
        if not all(bool(matrix.any()) for matrix in pair.values()):
            raise PetoolError(f"the adapter does not change {module}", "the adapter is untrained; train the run again")
    modules = {f"{module}.weight": (pair["A"], pair["B"]) for module, pair in pairs.items()}
    return Adapter(modules, config.scaling, config.r, config.base)


def nf4_round_trip(weight: Any) -> Any:
    """A float32 matrix (rows, columns) through NF4 and back, bfloat16 on the CPU: what 4-bit training saw. bitsandbytes
    with the settings of training: blocks of 64, scales quantized again, bfloat16 weights and compute."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    packed, state = quantize_4bit(
        weight.to(device, torch.bfloat16), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    return dequantize_4bit(packed, state).to("cpu", torch.bfloat16)
