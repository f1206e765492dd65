"""Full fine-tuning: packed rows are exact, its memory is what autograd keeps, and a run of it survives what others do."""

import copy
import json
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from support import full_settings, own_runs, wait_for

from petool_lite.errors import PetoolError
from petool_lite.recipe import load_recipe
from petool_lite.train import full_costs, microstep
from petool_lite.train.attention import PACKED, offer_to_transformers
from petool_lite.train.microstep import micro_steps, model_loss
from petool_lite.train.model import generating
from petool_lite.train.planner import Choice, Dimensions, Load, Room, chosen, forecasts, peak_bytes, picked

ROWS = ((20, 12), (9, 1), (33, 30), (17, 16))
LLAMA_3B = Dimensions(3072, 8192, 28, 24, 8, 128, 128256, True)
SMOLLM2 = Dimensions(576, 1536, 30, 9, 3, 64, 49152, True)
GIB = 2**30


def whole(packed: bool = True, **changes: Any) -> Any:
    """A small float32 model, ready for packed rows as `load_model` makes one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4}
    torch.manual_seed(0)
    settings = {"vocab_size": 300, "num_key_value_heads": 2, "tie_word_embeddings": True}
    model = LlamaForCausalLM(LlamaConfig(**settings | shape | changes)).train()
    if packed:
        offer_to_transformers()
        model.set_attn_implementation(PACKED)
    return model


def rows() -> list[dict[str, Any]]:
    torch.manual_seed(1)
    return [{"input_ids": torch.randint(0, 300, (n,)).tolist(), "answer_start": start} for n, start in ROWS]


def gradients(model: Any) -> dict[str, Any]:
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def an_update(model: Any, budget: int) -> tuple[float, dict[str, Any]]:
    """Loss and gradients of all rows, in micro-steps of `budget` tokens."""
    total = 0.0
    for step in micro_steps(rows(), budget):
        loss = model_loss(model, step)
        loss.backward()
        total += loss.item()
    return total, gradients(model)


def apart(found: dict[str, Any], wanted: dict[str, Any]) -> float:
    """The largest relative distance between two gradients of the same parameter."""
    assert found.keys() == wanted.keys()
    return max(float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted)


@pytest.fixture
def float32(monkeypatch) -> None:
    monkeypatch.setattr(microstep, "computing", lambda model: nullcontext())


@pytest.fixture
def bfloat16(monkeypatch) -> None:
    """What GPUs and CPUs with instructions for it do."""
    monkeypatch.setattr(microstep, "computing", lambda model: torch.autocast("cpu", dtype=torch.bfloat16))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tied", [True, False])
def test_packed_rows_are_exact(float32, tied, checkpointing) -> None:
    """Against transformers' own attention and loss, a row at a time; no difference but float32's rounding."""
    model = whole(packed=False, tie_word_embeddings=tied)
    plain = copy.deepcopy(model)
    wanted = torch.zeros(())
    for row in rows():
        logits = plain(torch.tensor([row["input_ids"]])).logits[0, row["answer_start"] - 1 : -1]
        answers = torch.tensor(row["input_ids"][row["answer_start"] :])
        wanted = wanted + torch.nn.functional.cross_entropy(logits, answers, reduction="sum")
    wanted.backward()
    exact = gradients(plain)
    offer_to_transformers()
    model.set_attn_implementation(PACKED)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for budget in (1, 50, 1000):
        loss, found = an_update(model, budget)
        assert loss == pytest.approx(wanted.item(), rel=1e-5), budget
        assert apart(found, exact) < 1e-4, budget


def test_packed_rows_agree_in_bfloat16(bfloat16) -> None:
    model = whole()
    single, packed = an_update(model, 1), an_update(model, 1000)
    assert packed[0] == pytest.approx(single[0], rel=2e-3)
    assert apart(packed[1], single[1]) < 3e-2


def test_a_row_does_not_see_its_neighbours(float32) -> None:
    model = whole()
    one, *others = rows()
    changed = [{**row, "input_ids": [7] * len(row["input_ids"])} for row in others]
    states = []
    for batch in ([one, *others], [one, *changed]):
        (step,) = micro_steps([*batch], 1000)
        bounds = microstep.bounds_of(step.lengths, "cpu")
        hidden = model.model(step.ids[None], position_ids=step.positions[None], bounds=bounds, use_cache=False)[0][0]
        start = sum(step.lengths[: step.lengths.index(19)])
        states.append(hidden[start : start + 19])
    assert torch.equal(*states)


def test_without_bounds_nothing_is_computed() -> None:
    """Rows that would see each other in silence are impossible: the attention wants to be told where they end."""
    with pytest.raises(TypeError, match="bounds"):
        whole().model(torch.tensor([[1, 2, 3]]))


def test_generating_is_as_plain_and_leaves_training_as_it_was() -> None:
    model, plain = whole(), whole(packed=False).eval()
    ids = torch.tensor([[0, 0, 5, 6, 7], [1, 2, 3, 4, 5]])
    options = {"attention_mask": (ids > 0).long(), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with generating(model), torch.no_grad():
        found = model.generate(ids, **options)
    assert torch.equal(found, plain.generate(ids, **options))
    assert model.config._attn_implementation == PACKED
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_predicted_activations_are_what_autograd_keeps(bfloat16, checkpointing) -> None:
    """Distinct memory that the backward pass holds, without weights and their copies, of a model of SmolLM2's width."""
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    losses, found = [], {}
    for count in (1, 3):
        model = whole(num_hidden_layers=count, **shape)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        (step,) = micro_steps([{"input_ids": list(range(257)), "answer_start": 250}], 1000)
        held: dict[int, int] = {}

        def keep(item: Any, held: dict[int, int] = held) -> Any:
            storage = item.untyped_storage()
            if item.numel() >= 256 * 9 and 256 in item.shape:
                held[storage.data_ptr()] = storage.nbytes()
            return item

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda item: item):
            losses.append(model_loss(model, step))  # holds what is kept
        found[count] = sum(held.values())
    of_two = (found[3] - found[1]) / 2 / 256
    assert of_two == pytest.approx(full_costs.kept(SMOLLM2, checkpointing), rel=0.1)
