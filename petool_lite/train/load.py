"""The model that is trained: a base with a LoRA adapter through Unsloth, or all of a base through transformers. The
only module that imports unsloth. Full fine-tuning does without: there Unsloth keeps the weights themselves in bfloat16,
in which small updates are lost, and was no faster (docs/training.md)."""

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from petool_lite.adapters import CONFIG, WEIGHTS, read_adapter_config, start_adapter
from petool_lite.console import Report
from petool_lite.errors import PetoolError, first_line, in_words
from petool_lite.families import chat_template
from petool_lite.inference.gpu import four_bits, gpu_available, own_gpu
from petool_lite.models import Base, resolve_base
from petool_lite.prompt.render import exported_template, recorded_style
from petool_lite.recipe import Recipe
from petool_lite.runs import read_manifest
from petool_lite.train.attention import PACKED, attend_packed, teach
from petool_lite.train.devices import arithmetic, sharded

# What a model's folder holds besides its configuration and weights.
_TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template*",
    "generation_config.json",
)  # fmt: skip


def load_model(recipe: Recipe, base: Base, checkpointing: bool, plain: bool = False) -> tuple[Any, Any]:
    """The recipe's base, with an adapter on it unless all of it learns, and its tokenizer. With `checkpointing` layers
    keep their inputs only, and compute the rest again. An adapter is Unsloth's, or where `plain` PEFT's, on layers that
    can be parted among GPUs. Raises PetoolError if the base does not load."""
    import torch
    from safetensors import SafetensorError

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    load = _load_plain if recipe.train.method == "full" or plain else _load_adapted
    try:
        model, tokenizer = load(recipe, base, checkpointing)
    except torch.OutOfMemoryError:  # of which `run` tells
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise PetoolError(f"the base {base.name} does not load: {first_line(error)}", "get the model again") from error
    if recipe.train.method == "lora" and (start := start_adapter(recipe.model.adapter)):
        _load_adapter(model, start)
    return model.train(), tokenizer


def _load_adapted(recipe: Recipe, base: Base, checkpointing: bool) -> tuple[Any, Any]:
    # compiled anew for micro-batches of ever other lengths, layers took longer and kept more for the backward pass
    os.environ.setdefault("UNSLOTH_COMPILE_DISABLE", "1")
    from unsloth import FastLanguageModel  # must come before transformers and trl

    model, tokenizer = FastLanguageModel.from_pretrained(
        str(base.directory), max_seq_length=recipe.model.max_tokens, dtype=arithmetic(),
        load_in_4bit=recipe.model.precision == "nf4", use_safetensors=True,  # never a pickled file
    )  # fmt: skip
    model = FastLanguageModel.get_peft_model(
        model, **_lora(recipe), random_state=recipe.train.seed,
        use_gradient_checkpointing="unsloth" if checkpointing else False,
    )  # fmt: skip
    dispatch, causal = sys.modules.get("unsloth.utils.attention_dispatch"), causal_of(model)
    if recipe.train.objective == "sft" and dispatch and type(causal.model).forward.__module__.startswith("unsloth."):
        print("attention of packed rows:", teach(dispatch))  # to train.log
    elif recipe.train.objective == "sft":  # on a CPU, and for families whose layers Unsloth leaves to transformers
        attend_packed(causal)
    return model, tokenizer


def _load_plain(recipe: Recipe, base: Base, checkpointing: bool) -> tuple[Any, Any]:
    """Weights that learn are in float32, copied to bfloat16 by `computing`; a model to be parted waits on the CPU."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # every checkpoint would draw one
    options: dict[str, Any] = {"dtype": torch.float32 if recipe.train.method == "full" else arithmetic()}
    if recipe.train.method == "lora" and recipe.model.precision == "nf4":  # in numbers that can be parted
        four = four_bits(bnb_4bit_quant_storage=torch.bfloat16)
        options |= {"device_map": {"": own_gpu()}, "quantization_config": four}
    model: Any = AutoModelForCausalLM.from_pretrained(base.directory, use_safetensors=True, **options)
    tokenizer = AutoTokenizer.from_pretrained(base.directory)
    attend_packed(model)
    if not sharded():
        model.to(own_gpu() if gpu_available() else "cpu")
    if recipe.train.method == "lora":
        torch.manual_seed(recipe.train.seed)
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **_lora(recipe)))
    if checkpointing:  # the trainer would do so at the first step, after the dry step
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, tokenizer


def _lora(recipe: Recipe) -> dict[str, Any]:
    """The adapter's shape, as arguments of PEFT."""
    start = start_adapter(recipe.model.adapter)
    return {
        "r": recipe.lora.r, "lora_alpha": recipe.lora.alpha, "lora_dropout": recipe.lora.dropout,
        "target_modules": recipe.lora.targets, "use_rslora": start is not None and read_adapter_config(start).rslora,
    }  # fmt: skip


def compile_layers(model: Any, backend: str = "inductor") -> None:
    """Have the decoder layers compiled when they first run: once for all, and for micro-batches of every length."""
    import torch

    limits: Any = torch._dynamo.config
    limits.recompile_limit, limits.allow_unspec_int_on_nn_module = 32, True
    for layer in causal_of(model).model.layers:
        layer.compile(dynamic=True, backend=backend)


def exchange_compiled(model: Any, given: Sequence[Any] = ()) -> list[Any]:
    """Take what `compile_layers` made from the decoder layers, or give it back to them; returns what they had."""
    layers = causal_of(model).model.layers
    had = [layer._compiled_call_impl for layer in layers]
    for layer, call in zip(layers, given or [None] * len(layers), strict=True):
        layer._compiled_call_impl = call
    return had


def _load_adapter(model: Any, folder: Path) -> None:
    """Put the weights of a saved adapter in place of the fresh ones; every tensor on either side must have its pair."""
    from peft import set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    what, hint = f"the adapter {folder} does not fit the base", "give the base it was trained on"
    with in_words(what, hint, RuntimeError, SafetensorError, OSError):
        found: Any = set_peft_model_state_dict(model, load_file(folder / WEIGHTS))
        if odd := [*(name for name in found.missing_keys if "lora_" in name), *found.unexpected_keys]:
            raise RuntimeError(odd[0])


def check_start(recipe: Recipe, report: Report) -> None:
    """Refuse a start that cannot be right for the recipe's objective, base or LoRA shape; tell what looks odd."""
    if recipe.train.objective == "dpo":
        if not recipe.model.adapter:
            raise PetoolError("dpo needs the adapter that a first stage left", "--set model.adapter=RUN_OR_FOLDER")
        if recipe.lora.dropout:
            raise PetoolError("dpo compares two models, both without dropout", "--set lora.dropout=0.0")
    folder = start_adapter(recipe.model.adapter)
    if folder is None:
        return
    found, mine = read_adapter_config(folder), recipe.lora
    alpha = int(found.alpha) if found.alpha == int(found.alpha) else found.alpha  # as recipes have it
    pairs = {"r": (mine.r, found.r), "alpha": (mine.alpha, alpha), "targets": (sorted(mine.targets), [*found.targets])}
    wrong = [f"--set 'lora.{key}={json.dumps(theirs)}'" for key, (wanted, theirs) in pairs.items() if theirs != wanted]
    if wrong:
        raise PetoolError(f"the adapter {folder} has another shape than the recipe", " ".join(wrong))
    if found.rslora:
        report(f"the adapter {folder.name} scales by alpha / sqrt(r) (rslora), as what is trained on", 0, 0, "")
    same = found.base == recipe.model.base
    with suppress(PetoolError):  # a name that is not to be found is another base
        same = same or resolve_base(found.base).directory == resolve_base(recipe.model.base).directory
    if not same:
        what = f"the adapter {folder} was trained on {found.base or 'a base that it does not name'}"
        raise PetoolError(f"{what}, the recipe says {recipe.model.base}", f"--set model.base={found.base}")
    if (folder.parent / "manifest.json").is_file():
        manifest = read_manifest(folder.parent)
        recorded_style(manifest.get("prompt_style"), manifest.get("prompt_layout"))
        for key, now in (("prompt_style", recipe.data.style), ("setting", recipe.data.setting)):
            if manifest.get(key) != now:
                report(f"note: the adapter learned with {key} {manifest.get(key)}, this run uses {now}", 0, 0, "")


def causal_of(model: Any) -> Any:
    """The causal language model in what is trained: inside of PEFT's, or the model itself, all of which learns."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def computing(model: Any) -> Any:
    """The arithmetic of forward passes: bfloat16 where the machine has it, the loss and norms in float32 anyway."""
    import torch

    return torch.autocast(next(model.parameters()).device.type, torch.bfloat16, arithmetic() == torch.bfloat16)


def save_trained(model: Any, folder: Path, base: Base, tuned: Mapping[str, Any] | None = None) -> None:
    """Write what was trained to the new `folder`: an adapter in PEFT's format, its weights `tuned` if they were
    gathered, or a whole model in transformers', in bfloat16 beside the base's own configuration and tokenizer files."""
    import torch

    if causal_of(model) is not model:
        model.save_pretrained(str(folder), selected_adapters=["default"], state_dict=tuned)
        config = json.loads((folder / CONFIG).read_text())
        config["base_model_name_or_path"] = base.name  # as the recipe says it; PEFT puts the cache there
        (folder / CONFIG).write_text(json.dumps(config, indent=2))
        return
    weights = {name: weight.to("cpu", torch.bfloat16) for name, weight in model.state_dict().items()}
    if model.lm_head.weight is model.model.embed_tokens.weight:
        del weights["lm_head.weight"]
    model.save_pretrained(folder, state_dict=weights, max_shard_size="5GB")
    config = json.loads((base.directory / "config.json").read_text())
    config["dtype" if "dtype" in config else "torch_dtype"] = "bfloat16"
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_tokenizer(folder, base)


def save_tokenizer(folder: Path, base: Base, style: str = "") -> None:
    """Write the base's tokenizer to `folder`, with the chat template of the `style` that an adapter was trained on."""
    for path in {path for pattern in _TOKENIZER for path in base.directory.glob(pattern)}:
        shutil.copy(path, folder / path.name)
    if style:
        (folder / "chat_template.jinja").write_text(exported_template(chat_template(base.directory), style))


@contextmanager
def generating(model: Any) -> Iterator[None]:
    """Switch a model in training over to generating and back; every mode and flag of its modules is put back, and its
    layers compute as they were written meanwhile: a cache grows with every token."""
    causal, unsloths, cached = causal_of(model), hasattr(model, "for_inference"), model.config.use_cache
    attending = causal.config._attn_implementation
    flags = ("training", "gradient_checkpointing")
    kept = [(part, name, getattr(part, name)) for part in model.modules() for name in flags if hasattr(part, name)]
    compiled = exchange_compiled(model)
    try:
        if unsloths:
            model.for_inference()
        else:
            model.eval().config.use_cache = True
        if attending == PACKED:
            causal.set_attn_implementation("sdpa")  # with a cache and padding, which packed rows have not
        yield
    finally:
        if attending == PACKED:
            causal.set_attn_implementation(PACKED)
        if unsloths:
            model.for_training()
        exchange_compiled(model, compiled)
        model.config.use_cache = cached
        for part, name, value in kept:
            setattr(part, name, value)
