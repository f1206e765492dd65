"""Small models, rows and updates for tests of training."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from petool_lite.train import step
from petool_lite.train.attention import attend_packed
from petool_lite.train.step import answer_loss, micro_batches

ROWS = ((20, 12), (9, 1), (33, 30), (17, 16))
UPDATES = """
import json, sys
import torch
from petool_lite.models import resolve_base
from petool_lite.recipe import load_recipe
from petool_lite.train.load import load_model
from support_train import an_update, apart

places, sizes, again = json.loads(sys.argv[1])
for place in places:
    for precision in ("bf16", "nf4"):
        recipe = load_recipe("demo", [f"model.base={place}", f"model.precision={precision}", "lora.dropout=0.0"])[1]
        model, _ = load_model(recipe, resolve_base(place), again)
        torch.manual_seed(1)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.05)
        rows = [{"input_ids": torch.randint(3, 300, (n,)).tolist(), "answer_start": start} for n, start in sizes]
        (one, single), (two, packed) = (an_update(model, budget, given=rows) for budget in (1, 5000))
        norm = sum(float(gradient.norm()) for gradient in packed.values())
        small = sum(module.weight.numel() for module in model.modules() if type(module).__name__ == "Linear4bit")
        found = [precision, [one, two], apart(packed, single), norm, len(packed), small > 0]
        print("UPDATE", json.dumps(found), file=sys.__stdout__)
"""


def made(family: str = "Llama", packed: bool = True, adapter: bool = False, **changes: Any) -> Any:
    """A small float32 model, ready for packed rows as `load_model` makes one; with an `adapter` that does something."""
    import transformers

    family, _, window = family.partition(" ")
    changes |= {"sliding_window": 8, "num_hidden_layers": 6} if window else {}
    shape = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4}
    settings = {"vocab_size": 300, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True}
    config = getattr(transformers, f"{family}Config")(**settings | shape | changes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    if adapter:
        from peft import LoraConfig, get_peft_model

        for weight in model.parameters():  # biases and norms are 0 and 1, which would hide their loss
            torch.nn.init.normal_(weight, std=0.05)
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.05)
    if packed:
        pack(model)
    return model


def pack(model: Any) -> Any:
    attend_packed(step.causal_of(model))
    return model


def rows() -> list[dict[str, Any]]:
    torch.manual_seed(1)
    return [{"input_ids": torch.randint(0, 300, (n,)).tolist(), "answer_start": start} for n, start in ROWS]


def gradients(model: Any) -> dict[str, Any]:
    found = {name: p.grad.float().clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def an_update(
    model: Any, budget: int, between: Callable[[], None] = lambda: None, given: Sequence[dict[str, Any]] = ()
) -> tuple[float, dict[str, Any]]:
    """Loss and gradients of all or the `given` rows in micro-batches of `budget` tokens; `between` runs after each."""
    total = 0.0
    for batch in micro_batches([*given] or rows(), budget):
        loss = answer_loss(model, batch)
        loss.backward()
        total += loss.item()
        between()
    return total, gradients(model)


def apart(found: dict[str, Any], wanted: dict[str, Any]) -> float:
    """The largest distance between two gradients of the same parameter, relative to the wanted one."""
    assert found.keys() == wanted.keys()
    return max(float((found[name] - wanted[name]).norm() / (wanted[name].norm() + 1e-9)) for name in wanted)


def updates(places: Sequence[Path], sizes: Sequence[tuple[int, int]], again: bool = True) -> list[Any]:
    """Updates through Unsloth, which changes transformers: in a process of its own. For each model and precision: its
    name, the losses of rows alone and packed, the largest relative distance of their gradients, the sum of the packed
    ones' norms and their number, and whether weights are in 4 bits; `again`: with checkpointing."""
    given = json.dumps([[str(place) for place in places], sizes, again])
    line = [sys.executable, "-c", UPDATES, given]
    result = subprocess.run(line, capture_output=True, text=True, cwd=Path(__file__).parent)
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line[7:]) for line in result.stdout.splitlines() if line.startswith("UPDATE ")]
