"""The adapter side of a merge: read a PEFT LoRA adapter, and add its delta to rows of a base tensor in float32."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petool_lite.export.weights import Tensor

from petool_lite.errors import PetoolError

_PREFIX = "base_model.model."
_EMBEDDINGS = ("embed_tokens", "lm_head", "lora_embedding")
# settings that mean more than scale * B @ A, and the values under which they mean nothing
_PLAIN = {
    "bias": ("none",),
    "use_dora": (),
    "fan_in_fan_out": (),
    "rank_pattern": (),
    "alpha_pattern": (),
    "target_parameters": (),
    "layer_replication": (),
    "alora_invocation_tokens": (),
}
_TRAINED_EMBEDDINGS = ("modules_to_save", "trainable_token_indices")


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
    """Read adapter_config.json and adapter_model.safetensors.

    Raises PetoolError if a file is missing or damaged, holds more than plain LoRA matrices, or was never trained.
    """
    from safetensors import SafetensorError, safe_open

    config = _config(folder)
    weights_file = folder / "adapter_model.safetensors"
    pairs: dict[str, dict[str, Any]] = {}
    try:
        with safe_open(weights_file, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                module, side = _split(name)
                pairs.setdefault(module, {})[side] = file.get_tensor(name).float().contiguous()
    except (SafetensorError, OSError) as error:
        raise PetoolError(f"damaged adapter: {weights_file} ({error})", "train the run again") from error
    broken = [module for module, pair in pairs.items() if set(pair) != {"A", "B"}]
    if broken or not pairs:
        raise PetoolError(f"the adapter {folder} is incomplete: {', '.join(broken) or 'no matrices'}")
    for module, pair in pairs.items():
        if not all(bool(matrix.isfinite().all()) for matrix in pair.values()):
            raise PetoolError(f"damaged adapter: {module} holds values that are not finite", "train the run again")
        if not all(bool(matrix.any()) for matrix in pair.values()):
            raise PetoolError(f"the adapter does not change {module}", "the adapter is untrained; train the run again")
    rank, alpha = int(config["r"]), float(config["lora_alpha"])
    return Adapter(
        modules={f"{module}.weight": (pair["A"], pair["B"]) for module, pair in pairs.items()},
        scale=alpha / (rank**0.5 if config.get("use_rslora") else rank),
        rank=rank,
        base_name=str(config.get("base_model_name_or_path") or ""),
    )


def _config(folder: Path) -> dict[str, Any]:
    """The adapter's settings, once it is sure that they describe plain LoRA matrices."""
    config_file = folder / "adapter_config.json"
    for file in (config_file, folder / "adapter_model.safetensors"):
        if not file.is_file():
            raise PetoolError(f"adapter file missing: {file}", "train the run again")
    try:
        config: dict[str, Any] = json.loads(config_file.read_text())
        float(config["lora_alpha"]) / int(config["r"])
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise PetoolError(f"damaged adapter: {config_file} ({error!r})", "train the run again") from error
    for key in _TRAINED_EMBEDDINGS:
        if config.get(key):
            raise PetoolError(
                f"the adapter has trained embeddings or whole modules ({key} = {config[key]})",
                "only LoRA matrices can be merged; train without that setting",
            )
    for key, harmless in _PLAIN.items():
        if config.get(key) and config[key] not in harmless:
            raise PetoolError(f"the adapter uses {key} = {config[key]!r}", "only plain LoRA can be merged")
    return config


def _split(name: str) -> tuple[str, str]:
    if any(part in name for part in _EMBEDDINGS):
        raise PetoolError(
            f"the adapter has trained embeddings: {name}",
            "only LoRA matrices of the layers' linears can be merged; train without it",
        )
    for side in ("A", "B"):
        suffix = f".lora_{side}.weight"
        if name.startswith(_PREFIX) and name.endswith(suffix):
            return name.removeprefix(_PREFIX).removesuffix(suffix), side
    raise PetoolError(f"the adapter holds {name}, which is no LoRA matrix of a linear layer", "only LoRA can be merged")


def check_fit(adapter: Adapter, tensors: list[Tensor], base_name: str) -> None:
    """Raise PetoolError unless every matrix of the adapter has its tensor in the base, of the right shape."""
    known = {tensor.name: tensor.shape for tensor in tensors}
    for name, (low, high) in adapter.modules.items():
        if name not in known:
            raise PetoolError(
                f"the adapter changes {name}, which the base {base_name} does not have",
                "the adapter belongs to another base model",
            )
        if (high.shape[0], low.shape[1]) != known[name] or low.shape[0] != high.shape[1]:
            raise PetoolError(
                f"{name} has the shape {known[name]}, its adapter {(high.shape[0], low.shape[1])}",
                "the adapter belongs to another base model",
            )


def nf4_round_trip(weight: Any) -> Any:
    """A float32 matrix (rows, columns) through NF4 and back, bfloat16 on the CPU: what 4-bit training saw.

    bitsandbytes with the settings of training: blocks of 64, scales quantized again, bfloat16 weights and compute.
    """
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    packed, state = quantize_4bit(
        weight.to(device, torch.bfloat16), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    return dequantize_4bit(packed, state).to("cpu", torch.bfloat16)
