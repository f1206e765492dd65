"""A base with a fresh LoRA adapter, through Unsloth. The only module that imports unsloth."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from petool_lite.base import Base
from petool_lite.errors import MACHINE, PetoolError
from petool_lite.recipe import Recipe
from petool_lite.train.devices import arithmetic
from petool_lite.train.start import WEIGHTS, start_adapter
from petool_lite.train.varlen import use_varlen


def load_model(recipe: Recipe, base: Base) -> tuple[Any, Any]:
    """The recipe's base with an adapter on it, and its tokenizer; raises PetoolError if it does not load."""
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from unsloth import FastLanguageModel  # must come before transformers and trl

    import torch
    from safetensors import SafetensorError

    try:
        model, tokenizer = FastLanguageModel.from_pretrained(
            str(base.directory),
            max_seq_length=recipe.model.max_tokens,
            dtype=arithmetic(),
            load_in_4bit=recipe.model.precision == "nf4",
        )
    except torch.OutOfMemoryError as error:
        raise PetoolError(
            f"the base {base.name} does not fit the GPU's memory", "set model.precision=nf4", MACHINE
        ) from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise PetoolError(f"the base {base.name} does not load: {first_line}", "get the model again") from error
    dispatch = sys.modules.get("unsloth.utils.attention_dispatch")  # on a CPU Unsloth leaves attention to transformers
    if dispatch:
        print("Unsloth's attention of packed rows:", use_varlen(dispatch))  # to train.log
    model = FastLanguageModel.get_peft_model(
        model,
        r=recipe.lora.r,
        lora_alpha=recipe.lora.alpha,
        lora_dropout=recipe.lora.dropout,
        target_modules=recipe.lora.targets,
        use_gradient_checkpointing="unsloth" if recipe.train.checkpointing else False,
        random_state=recipe.train.seed,
    )
    adapter = start_adapter(recipe)
    if adapter is not None:
        _load_adapter(model, adapter)
    return model, tokenizer


def _load_adapter(model: Any, folder: Path) -> None:
    """Put the weights of a saved adapter in place of the fresh ones; every tensor on either side must have its pair."""
    from peft import set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found: Any = set_peft_model_state_dict(model, load_file(folder / WEIGHTS))
    except (RuntimeError, SafetensorError, OSError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise PetoolError(f"the adapter {folder} does not fit the base: {first_line}", "give its own base") from error
    absent = [name for name in found.missing_keys if "lora_" in name]
    if absent or found.unexpected_keys:
        odd = [*absent, *found.unexpected_keys][0]
        raise PetoolError(f"the adapter {folder} does not fit the base: {odd}", "give the base it was trained on")


def save_adapter(model: Any, folder: Path, base: Base) -> None:
    """Write the trained adapter in PEFT's format, under the recipe's name of the base, where PEFT puts the cache."""
    model.save_pretrained(str(folder), selected_adapters=["default"])
    config_file = folder / "adapter_config.json"
    config = json.loads(config_file.read_text())
    config["base_model_name_or_path"] = base.name
    config_file.write_text(json.dumps(config, indent=2))


@contextmanager
def generating(model: Any) -> Iterator[None]:
    """Switch a model in training over to generating and back; every mode and flag of its modules is put back."""
    from unsloth import FastLanguageModel

    kept = [(module, module.training, getattr(module, "gradient_checkpointing", None)) for module in model.modules()]
    cached = model.config.use_cache
    FastLanguageModel.for_inference(model)
    try:
        yield
    finally:
        FastLanguageModel.for_training(model)
        model.config.use_cache = cached
        for module, training, checkpointing in kept:
            module.training = training
            if checkpointing is not None:
                module.gradient_checkpointing = checkpointing
