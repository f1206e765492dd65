"""Saved LoRA adapters in PEFT's format: training goes on from what export can merge, and one check says which."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from petool_lite.errors import PetoolError, in_words
from petool_lite.runs import TRAINED, find_run, runs_root
from petool_lite.text import read_object

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Settings under which an adapter is more than scaling * B @ A.
_MORE = (
    "lora_bias", "use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication",
    "trainable_token_indices", "target_parameters", "megatron_config", "alora_invocation_tokens", "use_qalora",
    "use_bdlora", "arrow_config", "monteclora_config", "velora_config", "corda_config",
)  # fmt: skip
_SIDES = (".lora_A.weight", ".lora_B.weight")
# Ways to begin that change the base's own weights: without that base the adapter means something else.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq")
_AGAIN = "save it again, or give another adapter"


@dataclass(frozen=True)
class AdapterConfig:
    """A plain LoRA adapter: rank `r`, `alpha`, the `scaling` of B @ A that follows from them (with `rslora` alpha over
    the root of r), the linears it changes by their last names, as its weights hold them, and the base it names."""

    r: int
    alpha: float
    rslora: bool
    scaling: float
    targets: tuple[str, ...]
    base: str


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Read `folder`/adapter_config.json and the names in adapter_model.safetensors, no weight. Raises PetoolError where
    a file is missing or damaged, or the adapter is more than scaling * B @ A: neither trained on nor merged."""
    path = folder / CONFIG
    if not path.is_file():
        raise PetoolError(f"adapter file missing: {path}", "give the folder that PEFT or petool-lite saved")
    config = read_object(path, f"damaged adapter: {path}", _AGAIN)
    with in_words(f"damaged adapter: {path}", _AGAIN, LookupError, TypeError, ValueError, OverflowError):
        r, alpha, rslora = int(config["r"]), float(config["lora_alpha"]), bool(config.get("use_rslora"))
        if r < 1 or not math.isfinite(alpha) or alpha == 0:
            raise ValueError(f"r {r}, lora_alpha {alpha:g}")
    if (kind := config.get("peft_type", "LORA")) != "LORA":
        raise PetoolError(f"the adapter {folder} is of the kind {kind}", "only LoRA can be trained on and merged")
    used = [key for key in _MORE if config.get(key)] + (["bias"] if config.get("bias") not in (None, "none") else [])
    if used:
        what = f"the adapter {folder} uses {used[0]} = {json.dumps(config[used[0]])[:80]}"
        raise PetoolError(what, "only plain LoRA matrices can be trained on and merged; train it without that setting")
    if (begun := str(config.get("init_lora_weights") or "").lower()).startswith(_CHANGED_BASE):
        what = f"the adapter {folder} began with {begun}, which changes the base's own weights"
        raise PetoolError(what, "save it converted to plain LoRA (PEFT: path_initial_model_for_weight_conversion)")
    scaling, base = alpha / (math.sqrt(r) if rslora else r), str(config.get("base_model_name_or_path") or "")
    return AdapterConfig(r, alpha, rslora, scaling, _targets(folder), base)


def _targets(folder: Path) -> tuple[str, ...]:
    """Last names of the linears that the weights are of; `target_modules` may be a pattern, or not say it."""
    from safetensors import SafetensorError, safe_open

    if not (path := folder / WEIGHTS).exists():
        raise PetoolError(f"no {WEIGHTS} in {folder}", "pickled weights (.bin) are not read; save it as safetensors")
    with in_words(f"damaged adapter: {path}", _AGAIN, SafetensorError, OSError), safe_open(path, "np") as file:
        names = list(file.keys())
    odd = [name for name in names if not name.endswith(_SIDES) or "embed_tokens" in name or "lm_head" in name]
    if odd or not names:
        what = f"the adapter {folder} holds {odd[0] if odd else 'no matrices'}"
        raise PetoolError(what, "only LoRA matrices of the layers' linears can be trained on and merged")
    return tuple(sorted({name.rsplit(".", 3)[1] for name in names}))


def start_adapter(name: str) -> Path | None:
    """Folder of the adapter called `name`, a complete run's or one in PEFT's format; None for no name."""
    if not name:
        return None
    path = Path(name).expanduser()
    if not (path / CONFIG).is_file():
        if not any((place / "recipe.toml").is_file() for place in (path, runs_root() / name)):
            raise PetoolError(f"no adapter: {name}", "give a complete run, or a folder with adapter_config.json")
        run = find_run(name)
        path, whole = run / TRAINED["lora"], run / TRAINED["full"]
        if whole.is_dir():
            what = f"the run {run} has no adapter: all its weights learned"
            raise PetoolError(what, f"--set model.adapter= --set model.base={whole}")
    return path
