"""Small models, rows and updates for tests of training."""

from collections.abc import Callable
from typing import Any

import torch

from petool_lite.train import step
from petool_lite.train.attention import attend_packed
from petool_lite.train.step import answer_loss, micro_batches

ROWS = ((20, 12), (9, 1), (33, 30), (17, 16))


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
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def an_update(model: Any, budget: int, between: Callable[[], None] = lambda: None) -> tuple[float, dict[str, Any]]:
    """Loss and gradients of all rows, in micro-batches of `budget` tokens; `between` is called after each of them."""
    total = 0.0
    for batch in micro_batches(rows(), budget):
        loss = answer_loss(model, batch)
        loss.backward()
        total += loss.item()
        between()
    return total, gradients(model)


def apart(found: dict[str, Any], wanted: dict[str, Any]) -> float:
    """The largest distance between two gradients of the same parameter, relative to the wanted one."""
    assert found.keys() == wanted.keys()
    return max(float((found[name] - wanted[name]).norm() / (wanted[name].norm() + 1e-9)) for name in wanted)
