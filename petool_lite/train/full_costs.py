"""Memory of full fine-tuning on a GPU, predicted from what transformers' Llama modules keep for their backward pass.

Weights, gradients and optimizer follow from the method; what is kept is compared with what a CPU keeps
(tests/train/test_full.py). Ten runs of SmolLM2-135M on one H200 took 10.1 to 15.9 GiB, within 3 % of this. Speed is not
predicted: they shared their GPU.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from petool_lite.train.planner import Dimensions

# A GPU holds that share of what is kept and computed with, by those ten runs: not all of it at the same moment.
ON_GPU = 0.885
# Bytes that an optimizer holds of a weight; paged states lie in the machine's memory.
_STATES = {"adamw_torch": 8, "adamw_8bit": 2, "paged_adamw_32bit": 0}


def parameters(model: "Dimensions") -> int:
    """Weights of the whole model."""
    tables = model.vocabulary * model.hidden * (1 if model.tied else 2)
    return model.layers * (model.weights() + 2 * model.hidden) + tables + model.hidden


def resident(model: "Dimensions", optimizer: str) -> float:
    """Bytes of float32 weights and gradients, bfloat16 copies of the weights for a micro-step, and the state of
    `optimizer` ("" for none)."""
    return parameters(model) * (4 + 4 + 2 + _STATES.get(optimizer, 0))


def updating(model: "Dimensions", optimizer: str) -> float:
    """Bytes while the optimizer steps: nothing is kept of the rows, and AdamW's roots of its second moments come to
    weights, gradients and state."""
    roots = 4 if optimizer == "adamw_torch" else 0
    return parameters(model) * (4 + 4 + _STATES[optimizer] + roots)


def kept(model: "Dimensions", checkpointing: bool) -> float:
    """Bytes that a layer keeps of a token: with checkpointing its input, in float32."""
    return 4 * model.hidden if checkpointing else _layer(model)


def _layer(model: "Dimensions") -> float:
    """What autograd saves of a layer: two sums in float32, each with its normed form and a bfloat16 copy for every
    linear that reads it; heads and their result; four of the MLP's inner values."""
    own, keys = model.heads * model.size, model.key_heads * model.size
    norms = 2 * (4 + 4) * model.hidden + (3 + 2) * 2 * model.hidden
    return norms + 2 * (own + 2 * keys) + 2 * own + 4 * model.heads + 4 * 2 * model.inner


def work(model: "Dimensions", checkpointing: bool, tokens: int, answers: float) -> float:
    """Bytes at the fullest moment of the backward pass beside what is kept: in a layer (computed again with
    checkpointing), or at the output head, whose gradient is as large as the matrix."""
    inside = tokens * (2 * 4 * model.inner + 3 * 4 * model.hidden + checkpointing * _layer(model))
    head = tokens * answers * model.vocabulary * 16 + 2 * model.vocabulary * model.hidden
    return max(inside, head)


def ways() -> list[tuple[str, bool, bool]]:
    """Precision, checkpointing and offload of each way to train."""
    return [("bf16", True, False), ("bf16", False, False)]


def preferred(choice: Any) -> tuple[bool, int]:
    """Sort key of choices whose speed is not known: what does not compute twice, then the largest micro-steps."""
    return choice.checkpointing, -choice.token_budget
