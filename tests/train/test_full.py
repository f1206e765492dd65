"""Full fine-tuning: packed rows are exact, its memory is what autograd keeps, and a run of it survives a kill."""

import copy
import json
import shutil
import signal
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import full_settings, held_after, loss_row_by_row, own_runs, with_weights

from petool_lite.errors import PetoolError
from petool_lite.models import resolve_base
from petool_lite.recipe import load_recipe
from petool_lite.train import dry_run, full_costs, microstep
from petool_lite.train.attention import PACKED, offer_to_transformers
from petool_lite.train.microstep import answer_trainer, micro_steps, model_loss
from petool_lite.train.model import generating, load_model
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
    wanted = loss_row_by_row(plain, rows())
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


def an_update_of_the_trainer(
    model: Any, batch: list[dict[str, Any]], budget: int, devices: int
) -> tuple[float, dict[str, Any]]:
    """Loss and gradients as AnswerTrainer makes them on several devices, one after the other, then averaged."""
    kind: Any = answer_trainer(load_recipe("demo", ["train.method=full", f"train.token_budget={budget}"])[1])
    plain = model.forward

    def forward(*inputs: Any, answer_step: Any = None, seed: int = 0, **options: Any) -> Any:
        return plain(*inputs, **options) if answer_step is None else model_loss(model, answer_step)

    model.forward = forward
    losses = []
    for index in range(devices):
        accelerator = SimpleNamespace(
            num_processes=devices,
            process_index=index,
            backward=lambda loss: loss.backward(),
            no_sync=lambda model: nullcontext(),
        )
        trainer = SimpleNamespace(
            accelerator=accelerator, model=model, stack=None, tokens_seen=0, tuned=list(model.parameters())
        )
        losses.append(kind.training_step(trainer, model, kind.collate(trainer, batch)).item())
    model.forward = plain
    return sum(losses) / devices, {name: gradient / devices for name, gradient in gradients(model).items()}


@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_of_an_update_is_the_mean_by_weight_however_it_is_parted(float32, weighted) -> None:
    batch = with_weights(rows()) if weighted else rows()
    weights = [row.get("answer_weights", [1.0] * (len(row["input_ids"]) - row["answer_start"])) for row in batch]
    model = whole(packed=False)
    plain = copy.deepcopy(model)
    wanted = loss_row_by_row(plain, batch) / sum(map(sum, weights))
    wanted.backward()
    exact = gradients(plain)
    offer_to_transformers()
    model.set_attn_implementation(PACKED)
    for budget, devices in ((1, 1), (1000, 1), (50, 2), (1000, 6)):  # of six devices two have nothing to do
        loss, found = an_update_of_the_trainer(model, batch, budget, devices)
        assert loss == pytest.approx(wanted.item(), rel=1e-5), (budget, devices)
        assert apart(found, exact) < 1e-4, (budget, devices)


def test_weights_of_one_are_the_loss_without_weights(float32) -> None:
    """Without weights it is torch's own sum, to the last bit; weights of one add no more than rounding to that."""
    model = whole()
    ones = [{**row, "answer_weights": [1.0] * (len(row["input_ids"]) - row["answer_start"])} for row in rows()]
    (plain,), (weighted,) = micro_steps(rows(), 1000), micro_steps(ones, 1000)
    assert plain.weights is None
    assert weighted.weights.dtype == torch.float32
    bounds = microstep.bounds_of(plain.lengths, "cpu")
    hidden = model.model(plain.ids[None], position_ids=plain.positions[None], bounds=bounds, use_cache=False)[0][0]
    own = torch.nn.functional.cross_entropy(model.lm_head(hidden[plain.where]).float(), plain.answers, reduction="sum")
    assert torch.equal(model_loss(model, plain), own)
    assert model_loss(model, weighted).item() == pytest.approx(own.item(), rel=1e-6)


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


def plan(*settings: str) -> Any:
    return load_recipe("smol-rating", ["train.method=full", *settings])[1]


LOAD = Load((4000, *(700, 800, 900) * 400), 0.03)


def test_memory_is_twenty_bytes_a_weight_or_eighteen_and_what_the_rows_take() -> None:
    nothing = Load((1,), 0.0)
    found = {}
    for name, model, weights in (("135M", SMOLLM2, 134.5e6), ("3B", LLAMA_3B, 3.21e9)):
        assert full_costs.parameters(model) == pytest.approx(weights, rel=0.01)
        found[name] = peak_bytes(model, plan(), Choice("bf16", True, False, 2048), nothing)
        assert found[name] / weights == pytest.approx(20, rel=0.01), name
        both = [
            peak_bytes(model, plan(), Choice("bf16", False, False, 2048), LOAD, optimizer=flag)
            for flag in (True, False)
        ]
        assert (both[0] - both[1]) / weights == pytest.approx(8, rel=0.01), "what the rows take is the same in both"
    state = {name: full_costs.resident(SMOLLM2, name) / full_costs.parameters(SMOLLM2) for name in ("", "adamw_8bit")}
    assert state == {"": 10, "adamw_8bit": 12}


def test_the_planner_picks_what_computes_once_and_refuses_a_large_model() -> None:
    recipe = plan()
    ways = forecasts(SMOLLM2, recipe, LOAD, None)
    assert all(way.choice.precision == "bf16" and not way.choice.offload and way.host_gb == 0 for way in ways)
    assert all(way.tokens_per_s is None for way in ways)
    roomy = picked(ways, recipe, "auto", Room(140 * GIB, 0))
    tight = picked(ways, recipe, "auto", Room(5 * GIB, 0))
    assert (roomy.choice.checkpointing, tight.choice.checkpointing) == (False, True)
    assert tight.peak_gb <= 4.5
    lean = picked(ways, recipe, "lean", Room(140 * GIB, 0))
    assert (lean.choice.checkpointing, lean.peak_gb < 7.4) == (False, True)
    with pytest.raises(PetoolError, match=r"needs about 69\.\d GiB of GPU memory, 24\.0 GiB") as error:
        chosen(LLAMA_3B, recipe, LOAD, None, Room(24 * GIB, 8 * GIB))
    assert (error.value.exit_code, "--set train.method=lora" in error.value.hint) == (3, True)
    with pytest.raises(PetoolError, match="GiB of GPU memory") as error:
        chosen(SMOLLM2, plan("train.token_budget=32768"), LOAD, None, Room(8 * GIB, 8 * GIB))
    assert "train.checkpointing" in error.value.hint or "train.token_budget" in error.value.hint
    fitting = [part.removeprefix("--set ") for part in error.value.hint.removeprefix("would fit: ").split(" --set ")]
    assert chosen(SMOLLM2, plan(*fitting), LOAD, None, Room(8 * GIB, 8 * GIB)).peak_gb < 8


def test_what_does_not_go_together_is_told_at_once() -> None:
    wrong = ["model.precision=nf4", "model.adapter=runs/a", "train.objective=dpo", "train.offload=true"]
    with pytest.raises(PetoolError) as error:
        load_recipe("demo", ["train.method=full", "train.epochs=-1", *wrong])
    for key in ("train.epochs", "model.precision", "model.adapter", "train.objective", "train.offload"):
        assert f"{key}: " in error.value.message
    with pytest.raises(PetoolError, match=r"model\.precision: full trains the weights themselves"):
        load_recipe("rating", ["train.method=full"])
    load_recipe("demo", wrong[:3])  # each of them goes with an adapter, as far as a recipe can tell
    with pytest.raises(PetoolError, match=r"train\.offload: goes with train\.checkpointing = true"):
        load_recipe("demo", ["train.offload=true"])
    with pytest.raises(PetoolError, match=r"train\.offload_heads: goes with train\.offload = true"):
        load_recipe("rating", ["train.offload_heads=true"])


def demo(*settings: str) -> Any:
    return load_recipe("demo", ["data.train=demo:train:4", *settings])[1]


def test_a_quantized_base_is_refused(tiny, tmp_path) -> None:
    shutil.copytree(tiny, tmp_path / "base")
    config = json.loads((tiny / "config.json").read_text()) | {"quantization_config": {"quant_method": "bitsandbytes"}}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(PetoolError, match="is quantized"):
        dry_run(demo("train.method=full", f"model.base={tmp_path / 'base'}"))


def test_a_run_leaves_a_model_that_transformers_loads(trained_full, tiny) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    manifest = json.loads((trained_full / "manifest.json").read_text())
    assert (manifest["method"], manifest["model_step"], manifest["predicted"]) == ("full", 10, None)
    left = {"recipe.toml", "resume.json", "manifest.json", "metrics.jsonl", "loss.png", "train.log", "checkpoints"}
    assert {path.name for path in trained_full.iterdir()} == left | {"model"}
    losses = [row["loss"] for row in rows_of(trained_full)]
    assert losses[-1] < losses[0] - 0.5
    assert "all weights learn" in (trained_full / "train.log").read_text()
    found, before = (load_file(folder / "model.safetensors") for folder in (trained_full / "model", tiny))
    assert found.keys() == before.keys()
    assert {weight.dtype for weight in found.values()} == {torch.bfloat16}
    assert not any(torch.equal(found[name], before[name]) for name in found), "every tensor learned, embeddings too"
    masters = load_file(trained_full / "checkpoints" / "checkpoint-10" / "model.safetensors")
    assert {weight.dtype for weight in masters.values()} == {torch.float32}
    assert all(torch.equal(masters[name].bfloat16(), found[name]) for name in found)
    folder = trained_full / "model"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (tiny / name).read_bytes()
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert (
        AutoTokenizer.from_pretrained(folder)("a b").input_ids == AutoTokenizer.from_pretrained(tiny)("a b").input_ids
    )


def test_the_gpu_engine_reads_the_folder(trained_full, tiny) -> None:
    """What tuned-bf16-gpu and tuned-nf4-gpu do with it, on the CPU: tokenizer, template, end tokens and weights."""
    from petool_lite.inference.gpu import load_causal_model, stop_ids
    from petool_lite.prompt.render import chat_from_directory

    folder = trained_full / "model"
    mine, theirs = chat_from_directory(folder), chat_from_directory(tiny)
    assert (mine.template_sha256, mine.eos_id) == (theirs.template_sha256, theirs.eos_id)
    assert stop_ids(folder, mine) == stop_ids(tiny, theirs)
    for precision in ("bf16", "nf4"):
        model = load_causal_model(folder, None, precision, "cpu")
        assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_it_is_loaded_to_learn_in_float32_with_checkpointing_where_asked(tiny) -> None:
    """Before the trainer touches it, so that the proof of the largest micro-step takes what training will take."""
    for checkpointing in (False, True):
        recipe = demo("train.method=full", f"train.checkpointing={str(checkpointing).lower()}")
        model, _ = load_model(recipe, resolve_base(str(tiny)))
        assert {(weight.dtype, weight.requires_grad) for weight in model.parameters()} == {(torch.float32, True)}
        assert model.config._attn_implementation == PACKED
        assert [layer.training and layer.gradient_checkpointing for layer in model.model.layers] == [checkpointing] * 2


def rows_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_killed_and_continued_it_ends_with_the_very_same_model(trained_full, tiny, command, tmp_path) -> None:
    """With evaluations on the way, which change nothing, and the best model kept."""
    from safetensors.torch import load_file

    evaluated = ["train.eval_every=6", "train.eval_data=demo:test:2", "bench.max_reply_tokens=3"]
    settings = [*full_settings(tiny), *(part for pair in evaluated for part in ("--set", pair))]
    with held_after(7, tmp_path, "demo", *settings) as process:
        process.send_signal(signal.SIGKILL)
    (run,) = tmp_path.glob("runs/*")
    result = command("train", "--resume", run, cwd=tmp_path, env=own_runs(tmp_path))
    assert result.returncode == 0, result.stderr
    for key in ("step", "loss", "grad_norm", "learning_rate", "tokens"):
        assert [row[key] for row in rows_of(run)] == [row[key] for row in rows_of(trained_full)], key
    whole, resumed = (load_file(path / "model" / "model.safetensors") for path in (trained_full, run))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["model_step"] == manifest["evaluation"]["best"]["step"] == 10
    assert not (run / "best").exists()
    assert {path.name for path in (run / "model").iterdir()} == {
        path.name for path in (trained_full / "model").iterdir()
    }


def test_a_second_stage_starts_from_the_model_as_its_base(trained_full) -> None:
    with pytest.raises(PetoolError, match="has no adapter: all its weights learned") as error:
        dry_run(demo(f"model.adapter={trained_full}"))
    taken = error.value.hint.partition("model.base=")[2]
    assert taken == str(trained_full / "model")
    assert dry_run(demo(f"model.base={taken}"))["kept"] == 4


def test_the_dry_run_never_shows_an_adapters_memory(smollm2) -> None:
    lora, full = (dry_run(demo(f"train.method={method}"))["choices"] for method in ("lora", "full"))
    assert min(way["peak_gb"] for way in full) > 134.5e6 * 18 / GIB
    assert min(way["peak_gb"] for way in lora) < 1
    assert all(way["tokens_per_s"] is None for way in full)
