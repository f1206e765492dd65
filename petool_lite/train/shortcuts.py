"""What layers compute and nothing reads is left out where that changes no loss and no gradient: one function.

Two things. The last layer's MLP runs for the tokens that answers are predicted from. And where a layer is computed a
second time in the backward pass, its last product is not: its value was needed in the forward pass alone. By the counts
of products the two save 3 and, with checkpointing, 8 % of them (3B shape); neither was timed alone.
"""

import sys
from typing import Any

# Families whose layers add the MLP's result to the sum as it is. A norm behind it (Gemma) would read the value again.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


class Places:
    """Where the answers of the current micro-batch are predicted from, as indices into its tokens; None for all."""

    where: Any = None


def shorten(causal: Any) -> Places | None:
    """Leave out what nothing reads in a causal language model of FAMILIES; None for others, which stay as they are.

    Whoever calls the model sets `where` before each forward pass. It has no effect where the model generates.
    """
    if causal.config.model_type not in FAMILIES:
        return None
    places = Places()
    layers = causal.model.layers
    _answers_only(layers[-1].mlp, places)
    if type(causal.model).forward.__module__.startswith("unsloth."):
        _no_last_product([layer.mlp.down_proj for layer in layers])
    return places


def _answers_only(mlp: Any, places: Places) -> None:
    """Let `mlp` compute the tokens of `places`; the others' results are zero."""
    import torch

    plain = mlp.forward

    def forward(x: Any) -> Any:
        if places.where is None or not mlp.training:
            return plain(x)
        found = plain(x.index_select(1, places.where))
        return torch.zeros_like(x).index_copy(1, places.where, found.to(x.dtype))

    mlp.forward = forward


_unread: dict[int, int] = {}  # address of a weight whose product nothing reads when it comes again -> its outputs


def _no_last_product(linears: list[Any]) -> None:
    """Where Unsloth computes a layer again, return memory of the right shape for the products of `linears`.

    The names are those of Unsloth 2026.10.9: its MLP multiplies by the last matrix through one of two functions.
    """
    fast_lora: Any = sys.modules["unsloth.kernels.fast_lora"]
    computing_again = sys.modules["unsloth_zoo.gradient_checkpointing"].in_gradient_checkpoint_recompute
    first = not _unread
    _unread.clear()  # of an earlier model in this process
    _unread.update({getattr(item, "base_layer", item).weight.data_ptr(): item.out_features for item in linears})
    if not first:
        return
    plain, dropping = fast_lora.matmul_lora, fast_lora._matmul_lora_ext

    def unread(x: Any, weight: Any) -> Any:
        width = _unread.get(weight.data_ptr()) if computing_again() else None
        return None if width is None else x.new_empty(*x.shape[:-1], width)

    def product(x: Any, weight: Any, *rest: Any, **more: Any) -> Any:
        found = unread(x, weight)
        return plain(x, weight, *rest, **more) if found is None else found

    def product_dropping(x: Any, dropped: Any, weight: Any, *rest: Any) -> Any:
        found = unread(x, weight)
        return dropping(x, dropped, weight, *rest) if found is None else found

    fast_lora.matmul_lora, fast_lora._matmul_lora_ext = product, product_dropping
