"""An update in packed micro-batches is exact: loss and gradients of rows one by one, in all families and methods."""

import copy
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import loss_row_by_row
from support_train import ROWS, an_update, apart, gradients, made, pack, rows

from petool_lite.train.attention import PACKED
from petool_lite.train.load import generating
from petool_lite.train.step import answer_loss, answer_trainer, micro_batches

FAMILIES = ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma3Text", "Gemma3Text with a window"]


@pytest.mark.parametrize(("adapter", "checkpointing"), [(False, False), (True, True)])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_are_exact(float32, family, adapter, checkpointing) -> None:
    """Against transformers' own attention and loss, a row at a time; no difference but float32's rounding."""
    model = made(family, packed=False, adapter=adapter)
    plain = copy.deepcopy(model)
    wanted = loss_row_by_row(plain, rows())
    wanted.backward()
    exact = gradients(plain)
    pack(model)
    if checkpointing:
        if adapter:
            model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for budget in (1, 50, 1000):
        loss, found = an_update(model, budget)
        assert loss == pytest.approx(wanted.item(), rel=1e-5), budget
        assert apart(found, exact) < 2e-4, budget


def an_update_of_the_trainer(model: Any, batch: Any, budget: int, devices: int) -> tuple[float, dict[str, Any]]:
    """Loss and gradients as AnswerTrainer makes them on several devices, one after the other, then averaged."""
    kind: Any = answer_trainer()
    plain = model.forward
    model.forward = lambda micro_batch: answer_loss(model, micro_batch)
    losses = []
    for index in range(devices):
        accelerator = SimpleNamespace(num_processes=devices, process_index=index)
        accelerator.backward, accelerator.no_sync = lambda loss: loss.backward(), lambda model: nullcontext()
        trainer = SimpleNamespace(accelerator=accelerator, model=model, tokens_seen=0, token_budget=budget, update=())
        trainer.tuned, trainer.keep_checkpointing = list(model.parameters()), lambda: None
        losses.append(kind.training_step(trainer, model, kind.collate(trainer, batch)).item())
    model.forward = plain
    return sum(losses) / devices, {name: gradient / devices for name, gradient in gradients(model).items()}


def test_the_loss_of_an_update_is_the_mean_over_answers_however_it_is_parted(float32) -> None:
    batch = rows()
    model = made(packed=False)
    plain = copy.deepcopy(model)
    wanted = loss_row_by_row(plain, batch) / sum(n - start for n, start in ROWS)
    wanted.backward()
    exact = gradients(plain)
    pack(model)
    for budget, devices in ((1, 1), (1000, 1), (50, 2), (1000, 6)):  # of six devices two have nothing to do
        loss, found = an_update_of_the_trainer(model, batch, budget, devices)
        assert loss == pytest.approx(wanted.item(), rel=1e-5), (budget, devices)
        assert apart(found, exact) < 1e-4, (budget, devices)


def test_generating_is_as_plain_and_leaves_training_as_it_was() -> None:
    model, plain = made(), made(packed=False).eval()
    ids = torch.tensor([[0, 0, 5, 6, 7], [1, 2, 3, 4, 5]])
    options = {"attention_mask": (ids > 0).long(), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with generating(model), torch.no_grad():
        found = model.generate(ids, **options)
    assert torch.equal(found, plain.generate(ids, **options))
    with pytest.raises(TypeError, match="bounds"):  # which tell rows apart
        model(ids)
    assert model.config._attn_implementation == PACKED
    assert all(module.training for module in model.modules())


def test_a_micro_batch_holds_what_its_rows_are_predicted_from() -> None:
    batch = [
        {"input_ids": [5, 6, 7, 8, 9, 10], "answer_start": 4, "entry_id": "a", "earlier": [1, 3]},
        {"input_ids": [11, 12, 13, 14], "answer_start": 1, "entry_id": "b", "earlier": []},
    ]
    (packed,) = micro_batches(batch, budget=10)
    assert packed.ids.tolist() == [5, 6, 7, 8, 9, 11, 12, 13], "a row's last token predicts nothing"
    assert (packed.where.tolist(), packed.answers.tolist()) == ([0, 1, 3, 4, 5, 6, 7], [6, 7, 9, 10, 12, 13, 14])
    assert (packed.lengths, packed.entries) == ((5, 3), ("a", "b"))
