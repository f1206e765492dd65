"""Compiled decoder layers on a CPU: what they learn is what plain ones learn. The operator that attends has a kernel
for GPUs only; here it gets one by the formula. Nothing is generated for the processor: torch's aot_eager backend runs
the same graphs."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from support_train import an_update, apart, gradients, made, rows

from petool_lite.recipe import load_recipe
from petool_lite.train import memory
from petool_lite.train.attention import kernels
from petool_lite.train.load import compile_layers, generating
from petool_lite.train.memory import Way
from petool_lite.train.run import compiles
from petool_lite.train.step import micro_batches


def weights_of(q: Any, k: Any, scale: float, window: int) -> Any:
    seen = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril()
    seen = seen.triu(1 - window) if window else seen
    return (q @ k.mT * scale).masked_fill(~seen, -torch.inf).softmax(-1)


def split(ends: Any, q: Any, *others: Any) -> Any:
    """Row by row: heads first, in float32, and as many of keys and values as of queries."""
    parts = [item.repeat_interleave(q.shape[1] // item.shape[1], 1).transpose(0, 1).float() for item in (q, *others)]
    return zip(*(item.split(ends.diff().tolist(), 1) for item in parts), strict=True)


def forward(q: Any, k: Any, v: Any, ends: Any, longest: Any, scale: float, window: int) -> Any:
    assert int(longest) == ends.diff().max()
    found = [weights_of(a, b, scale, window) @ c for a, b, c in split(ends, q, k, v)]
    return torch.cat(found, 1).transpose(0, 1).to(q.dtype).contiguous(), q.new_zeros(q.shape[1::-1]).float()


def backward(gradient: Any, q: Any, k: Any, v: Any, out: Any, sums: Any, ends: Any, longest: Any, *more: Any) -> Any:
    found = []
    for a, b, c, up in split(ends, q, k, v, gradient):
        weights, rise = weights_of(a, b, *more), up @ c.mT
        rise = weights * (rise - (rise * weights).sum(-1, keepdim=True)) * more[0]
        found.append((rise @ b, rise.mT @ a, weights.mT @ up))
    whole = [torch.cat(parts, 1).transpose(0, 1) for parts in zip(*found, strict=True)]
    shapes = [(len(item), item.shape[1], -1, item.shape[2]) for item in (q, k, v)]
    return tuple(item.reshape(shape).sum(2).to(q.dtype) for item, shape in zip(whole, shapes, strict=True))


@pytest.fixture(autouse=True)
def on_a_cpu() -> Any:
    kernels()[1].register_kernel("cpu")(forward)
    torch.library.register_kernel("petool_lite::packed_backward", "cpu")(backward)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def test_the_operator_is_one_that_torch_can_compile() -> None:
    """Its schema, gradients, shapes without values, and dispatch with sizes left open, as torch checks them."""
    heads = [torch.randn(20, count, 16, requires_grad=True) for count in (4, 2, 2)]
    ends, longest = (torch.tensor(value, dtype=torch.int32) for value in ([0, 12, 20], 12))
    torch.library.opcheck(torch.ops.petool_lite.packed.default, (*heads, ends, longest, 0.25, 5))


@pytest.mark.parametrize(("family", "kinds"), [("Llama", 1), ("Qwen3", 1), ("Gemma3Text", 2)])
def test_compiled_layers_learn_the_same_with_a_graph_a_kind_for_all_lengths(float32, family, kinds) -> None:
    local = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    plain = made(family, num_hidden_layers=2, **(local if kinds == 2 else {}))
    model = copy.deepcopy(plain)
    compile_layers(model, "aot_eager")

    def evaluate() -> None:
        with generating(model), torch.no_grad():
            model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False, pad_token_id=0)

    for budget, middle in ((1, evaluate), (50, lambda: None), (1000, evaluate)):
        loss, found = an_update(model, budget, middle)
        wanted, exact = an_update(plain, budget)
        assert loss == pytest.approx(wanted, rel=1e-6)
        assert apart(found, exact) < 1e-5
    counters = torch._dynamo.utils.counters
    assert (counters["stats"]["unique_graphs"], dict(counters["graph_break"])) == (kinds, {})


def test_layers_that_do_not_compile_run_as_they_are_and_it_is_told(float32, monkeypatch) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    plain, said = made(num_hidden_layers=1), []
    model = copy.deepcopy(plain)
    compile_layers(model, broken)
    (batch,) = micro_batches(rows(), 1000)
    assert not compiles(model, batch, lambda text, *_: said.append(text))
    told = "the layers do not compile and run as they are: Failed to find C compiler"
    assert said == ["compiling the layers, about half a minute", told]
    assert an_update(model, 50)[0] == an_update(plain, 50)[0]
    compile_layers(model, "aot_eager")
    assert compiles(model, batch, lambda *_: None)
    assert not gradients(model)


def test_it_is_compiled_only_where_it_was_measured_and_pays(monkeypatch) -> None:
    kept = Way("bf16", False, 65536, 54.1)

    def decided(method: str = "full", way: Way | None = kept, tokens: float = 2e7) -> bool:
        recipe = load_recipe("demo", [f"train.method={method}"])[1]
        return memory.pays_to_compile(recipe, way, tokens)

    monkeypatch.setattr(memory.shutil, "which", lambda name: f"/usr/bin/{name}" if name == "gcc" else None)
    assert decided()
    again = replace(kept, checkpointing=True)
    others = decided("lora"), decided(way=None), decided(way=again), decided(tokens=9.9e6)
    assert not any(others)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not decided()
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr(memory.shutil, "which", lambda name: None)
    assert not decided()
