"""The written-out backward pass against autograd through the plain model, in every way that a recipe can ask for."""

import copy
from typing import Any

import pytest
import torch
from support import loss_row_by_row, with_weights

from petool_lite.recipe import load_recipe
from petool_lite.train import kernels, layers
from petool_lite.train.devices import repeatable
from petool_lite.train.microstep import answer_loss, micro_steps, model_loss
from petool_lite.train.planner import Choice, Dimensions, Load, pieces
from petool_lite.train.shelf import Shelf
from petool_lite.train.stack import Stack, inverse_frequencies, unsuited

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROWS = ((20, 12), (9, 1), (33, 30), (17, 16))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch) -> None:
    monkeypatch.setattr(layers, "CHUNK", 25)  # so that the MLP is taken in parts


def tuned(targets: list[str] = LINEARS, dropout: float = 0.0, dtype: Any = torch.bfloat16, **changes: Any) -> Any:
    """A small PEFT model with a base in `dtype` and float32 adapters that are not zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=300, num_key_value_heads=2, tie_word_embeddings=True, **{**shape, **changes})
    model = LlamaForCausalLM(config).to(dtype)
    settings = {"r": 4, "lora_alpha": 8, "lora_dropout": dropout, "init_lora_weights": False}
    model = get_peft_model(model, LoraConfig(target_modules=targets, **settings))
    for parameter in model.parameters():
        if parameter.requires_grad:  # values that survive rounding, so that both sides compute with the same
            parameter.data = parameter.data.bfloat16().float()
    return model


def rows() -> list[dict[str, Any]]:
    torch.manual_seed(1)
    return [{"input_ids": torch.randint(0, 300, (n,)).tolist(), "answer_start": start} for n, start in ROWS]


def gradients(model: Any) -> dict[str, Any]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def exact(model: Any, weighted: bool = False) -> tuple[float, dict[str, Any]]:
    """Loss and gradients of the plain model in float32, one row at a time, all positions through the head."""
    whole = copy.deepcopy(model).float()
    total = loss_row_by_row(whole, with_weights(rows()) if weighted else rows())
    total.backward()
    return float(total), gradients(whole)


def distance(found: dict[str, Any], wanted: dict[str, Any]) -> float:
    """Length of the difference of all gradients, relative to their own."""
    assert found.keys() == wanted.keys()
    apart = sum(float((found[name] - wanted[name]).norm() ** 2) for name in wanted)
    return (apart / sum(float(g.norm() ** 2) for g in wanted.values())) ** 0.5


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("targets", [LINEARS, ["q_proj", "down_proj"], ["k_proj", "v_proj", "up_proj"]])
def test_loss_and_gradients_are_those_of_the_plain_model(targets, recompute) -> None:
    model = tuned(targets)
    loss, wanted = exact(model)
    stack = Stack(model, recompute)
    stack.refresh()
    (step,) = micro_steps(rows(), 100)
    ours = answer_loss(stack, step, 0)
    ours.backward()
    mine = gradients(model)
    assert ours.item() == pytest.approx(loss, rel=2e-3)
    plain = model_loss(model, step)  # the library's own forward in bfloat16: how far rounding alone gets
    plain.backward()
    assert distance(mine, wanted) < 1.3 * distance(gradients(model), wanted) < 0.03


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("targets", [LINEARS, ["k_proj", "v_proj", "up_proj"]])
def test_in_float32_they_are_the_same_but_for_the_last_digits(targets, recompute) -> None:
    model = tuned(targets, dtype=torch.float32)
    loss, wanted = exact(model)
    stack = Stack(model, recompute)
    stack.refresh()
    total = 0.0
    for step in micro_steps(rows(), 40):
        part = answer_loss(stack, step, 0)
        part.backward()
        total += part.item()
    assert total == pytest.approx(loss, rel=1e-5)
    assert distance(gradients(model), wanted) < 1e-5


@pytest.mark.parametrize("budget", [1, 40, 1000])
def test_weights_of_answer_tokens_pass_through_loss_and_gradients(budget) -> None:
    model = tuned(dtype=torch.float32)
    loss, wanted = exact(model, weighted=True)
    assert distance(exact(model)[1], wanted) > 0.1, "they matter"
    stack = Stack(model, False)
    stack.refresh()
    total = 0.0
    for step in micro_steps(with_weights(rows()), budget):
        part = answer_loss(stack, step, 0)
        part.backward()
        total += part.item()
    assert total == pytest.approx(loss, rel=1e-5)
    assert distance(gradients(model), wanted) < 1e-5


def test_a_wrong_term_would_show(monkeypatch) -> None:
    """The bound above is tight enough: one element-wise gradient off by a tenth breaks it."""
    real = kernels.rms_norm_backward
    monkeypatch.setattr(kernels, "rms_norm_backward", lambda g, x, i, w, added: real(g * 1.1, x, i, w, added))
    model = tuned()
    _, wanted = exact(model)
    stack = Stack(model, True)
    stack.refresh()
    answer_loss(stack, micro_steps(rows(), 100)[0], 0).backward()
    assert distance(gradients(model), wanted) > 0.03


def test_recomputing_offloading_and_packing_change_rounding_alone() -> None:
    model = tuned()
    found, held = [], []
    ways = [(False, False, False, 100), (True, False, False, 100), (True, True, False, 100)]
    ways += [(True, True, False, 1), (True, True, True, 100)]
    for recompute, offload, heads, budget in ways:
        stack = Stack(model, recompute, offload=offload, heads=heads)
        for _ in range(2):  # the second pass uses the memory of the first again
            stack.refresh()
            model.zero_grad()
            for step in micro_steps(rows(), budget):
                answer_loss(stack, step, 0).backward()
        found.append(gradients(model))
        held.append(stack.shelf.held if stack.shelf else 0)
    kept, recomputed, offloaded, single, heads = found
    assert distance(kept, recomputed) < 5e-3
    assert distance(recomputed, offloaded) == distance(recomputed, heads) == 0
    assert distance(recomputed, single) < 0.02
    tokens, answers = sum(n - 1 for n, _ in ROWS), sum(n - start for n, start in ROWS)  # nothing follows the last
    heads_of_all = 2 * 16 * (2 * 8 * tokens + 4 * tokens + 4 * answers)  # the last layer's queries: answers alone
    ranks_of_all = 2 * 4 * (2 * 3 * tokens + 2 * tokens + answers)
    assert held[4] - held[2] == heads_of_all + ranks_of_all, "they wait there, and are not computed again"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("heads", [False, True])
def test_copies_beside_the_computation_change_nothing_on_a_gpu(heads) -> None:
    """Long rows, so that copies take a while: a copy of what is not there yet, or no longer, would show."""
    torch.manual_seed(3)
    long = [{"input_ids": torch.randint(0, 300, (n,)).tolist(), "answer_start": n - 9} for n in (7000, 6000, 3000)]
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8, "num_hidden_layers": 6}
    model = tuned(dropout=0.1, **sizes).cuda()
    found = []
    with repeatable(True):
        for offload in (False, True, True, True):
            stack = Stack(model, True, offload=offload, heads=heads)
            stack.refresh()
            model.zero_grad()
            for step in micro_steps(long, 9000):
                answer_loss(stack, step, 5).backward()
            found.append(gradients(model))
    first, *others = found
    assert all(distance(first, other) == 0 for other in others)


@pytest.mark.parametrize("heads", [False, True])
def test_the_memory_pinned_while_a_model_loads_is_what_the_shelf_takes(heads) -> None:
    layers = 24
    recipe = load_recipe("rating", ["lora.r=4"])[1]
    choice = Choice("nf4", True, True, 100, heads)
    sizes = Dimensions(64, 160, layers, 4, 2, 16, 300, True)
    count, size = pieces(sizes, recipe, choice, Load(tuple(n for n, _ in ROWS), 0.1))
    model = tuned(num_hidden_layers=layers)
    stack = Stack(model, True, offload=True, heads=heads)
    stack.refresh()
    (step,) = micro_steps(rows(), 100)
    answer_loss(stack, step, 0).backward()
    assert stack.shelf is not None
    assert count >= 3
    assert stack.shelf.reserved in (count * size, (count + 1) * size)


@pytest.mark.parametrize("widths", [(96, 96, 96), (96, 96, 160, 96)])
@pytest.mark.parametrize("tokens", [127, 128, 129, 190])
def test_the_machine_gives_little_more_than_what_waits(widths, tokens) -> None:
    shelf = Shelf(torch.device("cpu"))
    for _ in range(2):
        shelf.clear()
        for width in 28 * widths:  # a layer of Llama-3.2-3B, a 32nd as wide, without and with its heads
            shelf.put(torch.zeros(tokens, width, dtype=torch.bfloat16))
        assert shelf.held == 2 * tokens * 28 * sum(widths)
        assert shelf.reserved < 1.2 * shelf.held


def _columns_dropped(x: Any, chance: float, seed: int, added: Any = None) -> Any:
    """Like kernels.dropped, but whole columns, so that the plain model can drop the same however tokens are parted."""
    generator = torch.Generator().manual_seed(seed % 1_000_003)
    kept = (torch.rand(x.shape[-1], generator=generator) >= chance) / (1 - chance)
    result = (x * kept).to(x.dtype)
    return result if added is None else added.add_(result)


class _Columns(torch.nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Any) -> Any:
        return _columns_dropped(x, 0.3, 5 + self.number)


@pytest.mark.parametrize("recompute", [False, True])
def test_dropout_reaches_every_adapter_alike_in_both_passes(recompute, monkeypatch) -> None:
    monkeypatch.setattr(kernels, "dropped", _columns_dropped)
    model = tuned(dropout=0.3)
    stack = Stack(model, recompute)
    for index, layer in enumerate(model.get_base_model().model.layers):
        for number, name in enumerate(LINEARS):
            part = layer.self_attn if number < 4 else layer.mlp
            getattr(part, name).lora_dropout["default"] = _Columns(7 * index + number)
    _, wanted = exact(model)
    stack.refresh()
    answer_loss(stack, micro_steps(rows(), 100)[0], 5).backward()
    assert distance(gradients(model), wanted) < 0.03


def test_dropped_elements_are_as_many_as_asked_for_and_the_rest_keeps_the_mean() -> None:
    ones = torch.ones(200, 500)
    dropped = kernels.dropped(ones, 0.1, 3)
    assert (dropped == 0).float().mean().item() == pytest.approx(0.1, abs=0.005)
    assert dropped.mean().item() == pytest.approx(1, abs=0.01)
    assert (kernels.dropped(ones, 0.1, 3) == dropped).all()
    assert (kernels.dropped(ones, 0.1, 4) != dropped).any()
    assert torch.allclose(kernels.dropped(ones, 0.1, 3, added=torch.ones(200, 500)), dropped + 1)


def test_parameters_that_a_checkpoint_replaced_are_trained() -> None:
    model = tuned()
    stack = Stack(model, True)
    linear = model.get_base_model().model.layers[0].self_attn.q_proj.lora_A["default"]
    linear.weight = torch.nn.Parameter(torch.randn_like(linear.weight))
    stack.refresh()
    answer_loss(stack, micro_steps(rows(), 100)[0], 0).backward()
    assert linear.weight.grad is not None


ROPES = [
    {"rope_type": "default", "rope_theta": 10000.0},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 8192},
]  # fmt: skip


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
def test_rotary_frequencies_are_those_of_transformers(rope) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(hidden_size=512, num_attention_heads=4, rope_parameters=rope)
    theirs = LlamaRotaryEmbedding(config).inv_freq
    assert torch.allclose(inverse_frequencies(config.to_dict(), 128), theirs, rtol=1e-5)


def test_models_that_it_does_not_compute_are_known() -> None:
    from transformers import LlamaConfig

    assert unsuited(LlamaConfig().to_dict()) == ""
    assert "biases" in unsuited(LlamaConfig(attention_bias=True).to_dict())
    assert "gelu" in unsuited({"hidden_act": "gelu"})
    assert "yarn" in unsuited({"rope_scaling": {"type": "yarn", "factor": 4.0}})
