"""The adapter side of a merge: read a PEFT LoRA adapter and add its delta to one base tensor in float32."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petool_lite.errors import PetoolError

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: tensor name -> (A of shape (r, in), B of shape (out, r)), both float32, and the scale."""

    modules: Mapping[str, tuple[Any, Any]]
    scale: float


def load_adapter(folder: Path) -> Adapter:
    """Read adapter_config.json and adapter_model.safetensors.

    Raises PetoolError if a file is missing or damaged, or holds more than plain LoRA matrices.
    """
    from safetensors import SafetensorError, safe_open

    config_file, weights_file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for file in (config_file, weights_file):
        if not file.is_file():
            raise PetoolError(f"adapter file missing: {file}", "train the run again")
    try:
        config = json.loads(config_file.read_text())
    except ValueError as error:
        raise PetoolError(f"damaged adapter: {config_file} ({error})", "train the run again") from error
    for key, harmless in (("modules_to_save", None), ("bias", "none"), ("use_dora", False)):
        if config.get(key, harmless) not in (harmless, None, [], False):
            raise PetoolError(f"the adapter uses {key} = {config[key]!r}", "only plain LoRA can be merged")
    pairs: dict[str, dict[str, Any]] = {}
    try:
        with safe_open(weights_file, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                module, side = _split(name)
                pairs.setdefault(module, {})[side] = file.get_tensor(name).float()
    except SafetensorError as error:
        raise PetoolError(f"damaged adapter: {weights_file} ({error})", "train the run again") from error
    broken = [module for module, pair in pairs.items() if set(pair) != {"A", "B"}]
    if broken or not pairs:
        raise PetoolError(f"the adapter {folder} is incomplete: {', '.join(broken) or 'no matrices'}")
    rank = int(config["r"])
    scale = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
    return Adapter({f"{module}.weight": (pair["A"], pair["B"]) for module, pair in pairs.items()}, scale)


def _split(name: str) -> tuple[str, str]:
    for side in ("A", "B"):
        suffix = f".lora_{side}.weight"
        if name.startswith(_PREFIX) and name.endswith(suffix):
            return name.removeprefix(_PREFIX).removesuffix(suffix), side
    raise PetoolError(f"the adapter holds {name}, which is no LoRA matrix of a linear layer", "only LoRA can be merged")


def merged(weight: Any, name: str, adapter: Adapter | None) -> tuple[Any, bool]:
    """`weight` + scale * B @ A in float32 where the adapter has the tensor `name`; and whether anything changed."""
    if adapter is None or name not in adapter.modules:
        return weight.float(), False
    low, high = adapter.modules[name]
    if (high.shape[0], low.shape[1]) != tuple(weight.shape):
        raise PetoolError(
            f"{name} has the shape {tuple(weight.shape)}, its adapter {(high.shape[0], low.shape[1])}",
            "the adapter belongs to another base model",
        )
    delta = (high @ low) * adapter.scale
    return weight.float() + delta, bool(delta.any())
