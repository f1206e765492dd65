"""What only a GPU shows: its attention kernel, Unsloth's layers whose inputs wait in host memory, compiled layers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import own_runs, rows_of
from support_families import LLAMA3, family_model
from support_train import an_update, apart, made, updates

from petool_lite.recipe import load_recipe
from petool_lite.train import load, memory, train
from petool_lite.train.attention import bounds_of, kernels, packed_attention
from petool_lite.train.load import compile_layers, load_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]
LENGTHS = (300, 1, 77, 8, 1030)


@pytest.mark.parametrize(("heads", "keys", "size", "window"), [(9, 3, 64, 0), (24, 8, 128, 0), (4, 1, 256, 50)])
def test_packed_attention_is_that_of_the_rows_alone(heads, keys, size, window) -> None:
    """Forward and backward against scaled_dot_product_attention in float64, a row at a time on the CPU."""
    torch.manual_seed(0)
    shapes = [(1, count, sum(LENGTHS), size) for count in (heads, keys, keys)]
    exact = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    ours = [item.detach().to("cuda", torch.bfloat16).requires_grad_() for item in exact]
    gradient = torch.randn(1, sum(LENGTHS), heads, size, dtype=torch.float64)
    options = {"scaling": size**-0.5, "sliding_window": window or None}
    wanted = packed_attention(None, *exact, None, bounds=bounds_of(LENGTHS, "cpu"), **options)[0]
    wanted.backward(gradient)
    kernels()
    found = packed_attention(None, *ours, None, bounds=bounds_of(LENGTHS, "cuda"), **options)[0]
    found.backward(gradient.to("cuda", torch.bfloat16))
    sides = [found, *(item.grad for item in ours)], [wanted, *(item.grad for item in exact)]
    for mine, right in zip(*sides, strict=True):
        assert float((mine.cpu().double() - right).norm() / right.norm()) < 1e-2


def test_layers_computed_again_from_inputs_in_host_memory_give_the_same(tmp_path) -> None:
    place, sizes = family_model("Llama", LLAMA3, tmp_path / "model"), ((900, 860), (9, 1), (700, 666), (1500, 1499))
    for again, kept in zip(updates([place], sizes), updates([place], sizes, again=False), strict=True):
        assert [*again[1], kept[1][1]] == pytest.approx([kept[1][0]] * 3, rel=2e-3)
        assert again[3] == pytest.approx(kept[3], rel=2e-2)
        assert again[4] == kept[4] >= 28


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_compiled_layers_learn_the_same_on_a_gpu(family) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = made(family).to("cuda")
    plain = [an_update(model, budget) for budget in (1, 50, 1000)]
    compile_layers(model)
    for budget, (loss, exact) in zip((1, 50, 1000), plain, strict=True):
        mine, found = an_update(model, budget)
        assert mine == pytest.approx(loss, rel=2e-3)
        assert apart(found, exact) < 5e-2
    counters = torch._dynamo.utils.counters
    assert (counters["stats"]["unique_graphs"], dict(counters["graph_break"])) == (1, {})


def test_a_run_with_compiled_layers_says_so_is_evaluated_and_learns_the_same(tmp_path, monkeypatch) -> None:
    for name, place in (("PETOOL_LITE_RUNS", "runs"), ("TENSORBOARD_LOGGING_DIR", "log")):
        monkeypatch.setenv(name, str(tmp_path / place))
    place = family_model("Llama", LLAMA3, tmp_path / "model")
    pairs = {"model.base": place, "data.train": "demo:train:40", "train.method": "full", "train.rows": 4}
    pairs |= {"train.memory": "auto", "train.eval_data": "demo:test:2", "train.eval_every": 5}
    recipe = load_recipe("demo", [f"{key}={value}" for key, value in pairs.items()])[1]
    losses, said = [], []
    for compiled in (False, True):
        monkeypatch.setattr(memory, "pays_to_compile", lambda *_, now=compiled: now)
        run = train(f"run{compiled}", recipe, lambda text, *_: said.append(text))
        assert json.loads((run / "manifest.json").read_text())["compiled"] is compiled
        losses.append([row["loss"] for row in rows_of(run)])
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    assert "compiling the layers, about half a minute" in said
    assert any("compiled layers; predicted peak" in text for text in said)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")
def test_a_model_parted_among_two_gpus_learns_what_one_learns_and_goes_on(tmp_path, monkeypatch) -> None:
    from safetensors.torch import load_file

    place = family_model("Llama", LLAMA3, tmp_path / "model")
    pairs = {"model.base": place, "data.train": "demo:train:40", "lora.dropout": 0.0, "train.rows": 6}
    pairs |= {"train.max_steps": 4, "train.save_every": 2, "train.token_budget": 700, "train.optimizer": "adamw_torch"}
    settings = [f"{key}={value}" for key, value in pairs.items()]
    launch = "accelerate.commands.launch --num_processes 2 --use_fsdp --fsdp_version 2 --mixed_precision no"
    launch += " --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP --fsdp_state_dict_type SHARDED_STATE_DICT"
    launch += " --fsdp_cpu_ram_efficient_loading false -m petool_lite train"
    adapters = []
    for more in (["demo", *(part for pair in settings for part in ("--set", pair))], ["--resume"]):
        line = [sys.executable, "-m", *launch.split(), *more, *map(str, (tmp_path / "runs").glob("demo-*"))]
        result = subprocess.run(line, env=own_runs(tmp_path), capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        (run,) = (tmp_path / "runs").glob("demo-*")
        adapters.append(load_file(run / "adapter" / "adapter_model.safetensors"))
        if more != ["--resume"]:
            for name in ("checkpoints/checkpoint-4", "adapter", "manifest.json"):
                (run / name).rename(tmp_path / Path(name).name)
    for name, first in adapters[0].items():  # sums of a backward pass come in any order
        assert (adapters[1][name] - first).norm() < 2e-2 * first.norm() + 1e-3

    monkeypatch.setenv("PETOOL_LITE_RUNS", str(tmp_path / "alone"))
    monkeypatch.setattr(load, "load_model", lambda *told, plain: load_model(*told, True))
    alone = train("alone", load_recipe("demo", settings)[1])
    losses = [[row["loss"] for row in rows_of(place)] for place in (run, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)
