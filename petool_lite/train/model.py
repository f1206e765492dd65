"""The model that is trained: a base with a LoRA adapter through Unsloth, or all of a base through transformers.

The only module that imports unsloth. Full fine-tuning does without: there Unsloth keeps the weights themselves in
bfloat16, in which small updates are lost, and was no faster (docs/training.md).
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from petool_lite.models import Base
from petool_lite.errors import MACHINE, PetoolError
from petool_lite.recipe import Recipe
from petool_lite.train.attention import PACKED, offer_to_transformers
from petool_lite.train.devices import arithmetic, own_device
from petool_lite.train.start import WEIGHTS, start_adapter
from petool_lite.train.varlen import use_varlen


# What a model's folder holds besides its configuration and weights.
_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
)
_SHARD = "5GB"


def load_model(recipe: Recipe, base: Base) -> tuple[Any, Any]:
    """The recipe's base with an adapter on it, or as it is for train.method = full, and its tokenizer.

    Raises PetoolError if it does not load.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return _load_whole(recipe, base) if recipe.train.method == "full" else _load_adapted(recipe, base)


def _load_adapted(recipe: Recipe, base: Base) -> tuple[Any, Any]:
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    from unsloth import FastLanguageModel  # must come before transformers and trl

    with _loading(base, "set model.precision=nf4"):
        model, tokenizer = FastLanguageModel.from_pretrained(
            str(base.directory),
            max_seq_length=recipe.model.max_tokens,
            dtype=arithmetic(),
            load_in_4bit=recipe.model.precision == "nf4",
            use_safetensors=True,  # never a pickled file, whatever else lies in the folder
        )
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


def _load_whole(recipe: Recipe, base: Base) -> tuple[Any, Any]:
    """Weights in float32, of which forward and backward passes make bfloat16 copies: see `computing`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # every checkpoint would draw one
    offer_to_transformers()
    with _loading(base, "set train.method=lora"):
        model = AutoModelForCausalLM.from_pretrained(base.directory, dtype=torch.float32, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(base.directory)
        model.set_attn_implementation(PACKED)
        model.to(own_device())
    model.train()
    if recipe.train.checkpointing:  # the trainer would do so at the first step, after the proof of the largest one
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, tokenizer


@contextmanager
def _loading(base: Base, smaller: str) -> Iterator[None]:
    """Turn a failure to load into a PetoolError; `smaller` is what would take less memory."""
    import torch
    from safetensors import SafetensorError

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise PetoolError(f"the base {base.name} does not fit the GPU's memory", smaller, MACHINE) from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise PetoolError(f"the base {base.name} does not load: {first_line}", "get the model again") from error


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


def causal_of(model: Any) -> Any:
    """The causal language model in what is trained: inside of PEFT's, or the model itself."""
    return model if is_whole(model) else model.get_base_model()


def is_whole(model: Any) -> bool:
    """Whether all weights learn."""
    return not hasattr(model, "peft_config")


def computing(model: Any) -> AbstractContextManager[Any]:
    """The arithmetic of forward passes: bfloat16 where the machine has it, the loss and norms in float32 anyway."""
    import torch

    kind, reduced = next(model.parameters()).device.type, arithmetic() == torch.bfloat16
    found: AbstractContextManager[Any] = torch.autocast(kind, dtype=torch.bfloat16, enabled=reduced)
    return found


def save_trained(model: Any, folder: Path, base: Base) -> None:
    """Write what was trained to the new `folder`: an adapter in PEFT's format, or a whole model in transformers'."""
    if is_whole(model):
        _save_whole(model, folder, base)
    else:
        _save_adapter(model, folder, base)


def _save_whole(model: Any, folder: Path, base: Base) -> None:
    """Weights in bfloat16, beside the base's own configuration and tokenizer files."""
    import torch
    from huggingface_hub import save_torch_state_dict

    folder.mkdir()
    weights = {name: weight.to("cpu", torch.bfloat16) for name, weight in model.state_dict().items()}
    if model.lm_head.weight is model.model.embed_tokens.weight:
        del weights["lm_head.weight"]
    save_torch_state_dict(weights, folder, max_shard_size=_SHARD)
    config = json.loads((base.directory / "config.json").read_text())
    config["dtype" if "dtype" in config else "torch_dtype"] = "bfloat16"
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for path in sorted({path for pattern in _TOKENIZER for path in base.directory.glob(pattern)}):
        shutil.copy(path, folder / path.name)


def _save_adapter(model: Any, folder: Path, base: Base) -> None:
    """The adapter under the recipe's name of the base, where PEFT puts the cache."""
    model.save_pretrained(str(folder), selected_adapters=["default"])
    config_file = folder / "adapter_config.json"
    config = json.loads(config_file.read_text())
    config["base_model_name_or_path"] = base.name
    config_file.write_text(json.dumps(config, indent=2))


@contextmanager
def generating(model: Any) -> Iterator[None]:
    """Switch a model in training over to generating and back; every mode and flag of its modules is put back."""
    switch = _whole_generating if is_whole(model) else _adapted_generating
    kept = [(module, module.training, getattr(module, "gradient_checkpointing", None)) for module in model.modules()]
    cached = model.config.use_cache
    try:
        with switch(model):
            yield
    finally:
        model.config.use_cache = cached
        for module, training, checkpointing in kept:
            module.training = training
            if checkpointing is not None:
                module.gradient_checkpointing = checkpointing


@contextmanager
def _whole_generating(model: Any) -> Iterator[None]:
    model.eval()
    model.config.use_cache = True
    model.set_attn_implementation("sdpa")  # with a cache and padding, which packed rows have not
    try:
        yield
    finally:
        model.set_attn_implementation(PACKED)


@contextmanager
def _adapted_generating(model: Any) -> Iterator[None]:
    from unsloth import FastLanguageModel

    FastLanguageModel.for_inference(model)
    try:
        yield
    finally:
        FastLanguageModel.for_training(model)
