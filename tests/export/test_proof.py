"""What proves an export: figures that a wrong file fails, the LoRA file, the importance matrix, the 4-bit base."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from petool_lite.export import Options, export_run, load_source, write_targets
from petool_lite.export.card import modelfile
from petool_lite.export.gguf import write_lora
from petool_lite.export.merge import load_adapter
from petool_lite.export.reference import Reference, Row
from petool_lite.export.verify import Evaluator, agreement, check_ids, shortfalls
from petool_lite.export.weights import open_weights

from petool_lite.errors import PetoolError
from petool_lite.gguf_base import gguf_fields, open_gguf
from petool_lite.models import resolve_base


def quiet(*_) -> None:
    pass


def rows(count=3, length=40):
    rng = np.random.default_rng(0)
    return [Row([int(token) for token in rng.integers(0, 500, length + 3 * i)], 30) for i in range(count)]


@pytest.fixture(scope="module")
def tuned(tiny_model, llama3_tokenizer, make_adapter, tmp_path_factory):
    """A tiny base whose generation settings name two end tokens, an adapter for it, and its merged model."""
    base = tiny_model(llama3_tokenizer)
    folder = tmp_path_factory.mktemp("tuned")
    model = make_adapter(base, folder / "adapter").merge_and_unload()
    return base, folder / "adapter", model


@pytest.fixture(scope="module")
def source(tuned):
    return load_source(resolve_base(str(tuned[0])), load_adapter(tuned[1]))


def test_the_layered_model_is_the_merged_model(tuned, source) -> None:
    import torch

    with open_weights(source.tensors) as reader:
        found = Reference(source, reader).answer_logits(rows(), quiet)
    for row, logits in zip(rows(), found, strict=True):
        with torch.no_grad():
            wanted = tuned[2](torch.tensor([row.ids])).logits[0, 29:-1].numpy()
        assert np.abs(wanted - logits).max() < 1e-4


def decisive(source, count=6):
    """Rows on which the model is nowhere in two minds: a random one often is, and there rounding decides."""
    drawn = [Row(row.ids[:38], 30) for row in rows(160)]
    with open_weights(source.tensors) as reader:
        found = Reference(source, reader).answer_logits(drawn, quiet)
    gaps = [float(np.diff(np.sort(logits)[:, -2:]).min()) for logits in found]
    chosen = [index for index, gap in enumerate(gaps) if gap > 0.04][:count]
    assert len(chosen) == count
    return [drawn[index] for index in chosen], [found[index] for index in chosen]


def test_files_agree_with_transformers_and_a_wrong_one_does_not(tuned, source, tmp_path) -> None:
    drawn, wanted = decisive(source)
    plain = load_source(source.base)
    write_targets(source, {"bf16": tmp_path / "tuned.gguf", "q8_0": tmp_path / "q8.gguf"}, {})
    write_targets(plain, {"bf16": tmp_path / "plain.gguf"}, {})
    write_lora(tmp_path / "lora.gguf", source.adapter, source, {})

    def compare(name, lora=None):
        with Evaluator(tmp_path / name, 128, lora) as model:
            found = [model.run(row.ids[: row.answer_start], row.answer, 2).logits for row in drawn]
        return {"against_transformers": agreement(wanted, found)}

    good, lora, wrong = compare("tuned.gguf"), compare("plain.gguf", tmp_path / "lora.gguf"), compare("plain.gguf")
    assert shortfalls("bf16", good) == []
    assert shortfalls("bf16", lora) == []
    assert shortfalls("q8_0", compare("q8.gguf")) == []
    assert any("top-1 agreement" in fault for fault in shortfalls("bf16", wrong))
    assert any("KL divergence" in fault for fault in shortfalls("bf16", wrong))


def test_replies_that_do_not_end_are_a_shortfall() -> None:
    assert shortfalls("q4_k_m", {"replies": 20, "replies_stopped": 18}) == []
    assert "17 of 20" in shortfalls("q4_k_m", {"replies": 20, "replies_stopped": 17})[0]
    assert "KL" in shortfalls("bf16", {"against_transformers": {"top1": 1.0, "kl": float("nan")}})[0]


def test_agreement_is_what_its_formula_says() -> None:
    wanted, found = [np.log([[0.5, 0.25, 0.25]])], [np.log([[0.25, 0.5, 0.25]])]
    kl = 0.5 * np.log(0.5 / 0.25) + 0.25 * np.log(0.25 / 0.5)
    assert agreement(wanted, found) == {"tokens": 1, "top1": 0.0, "kl": pytest.approx(kl, rel=1e-2)}
    assert agreement(wanted, wanted) == {"tokens": 1, "top1": 1.0, "kl": 0.0}


def test_other_token_ids_are_refused(tuned, source, smollm2, tmp_path) -> None:
    write_targets(source, {"q8_0": tmp_path / "a.gguf"}, {})
    assert check_ids(tmp_path / "a.gguf", source, ["one 123", "two"]) == 2
    with pytest.raises(PetoolError, match="chat template or end token"):
        check_ids(tmp_path / "a.gguf", replace(source, base=smollm2), ["one"])


def test_importance_is_the_mean_square_of_each_input(tuned, source) -> None:
    import torch

    ids = [row.ids for row in rows()]
    with open_weights(source.tensors) as reader:
        sums = Reference(source, reader).input_squares(ids, quiet)
    assert len(sums) == 2 * 7
    seen = {}
    layer = tuned[2].model.layers[1]
    handle = layer.mlp.down_proj.register_forward_pre_hook(
        lambda module, inputs: seen.setdefault("x", []).append(inputs[0])
    )
    with torch.no_grad():
        for row in ids:
            tuned[2](torch.tensor([row]))
    handle.remove()
    wanted = torch.cat([x[0] for x in seen["x"]]).double().square().sum(0).numpy()
    values, count = sums["blk.1.ffn_down.weight"]
    assert count == sum(map(len, ids))
    assert values == pytest.approx(wanted, rel=1e-4)
    assert (sums["blk.1.attn_q.weight"][0] == sums["blk.1.attn_v.weight"][0]).all()


@pytest.mark.parametrize("file_type", ["q4_k_m", "q4_0", "iq4_xs"])
def test_with_importance_the_file_is_what_the_quantizer_writes(
    tiny_model, llama3_tokenizer, llama_quantize, tmp_path, file_type
) -> None:
    source = load_source(resolve_base(str(tiny_model(llama3_tokenizer, num_hidden_layers=8))))
    with open_weights(source.tensors) as reader:
        sums = Reference(source, reader).input_squares([row.ids for row in rows()], quiet)
    matrix = {name: values / np.float32(count) for name, (values, count) in sums.items()}
    write_targets(source, {"bf16": tmp_path / "bf16.gguf"}, {})
    write_targets(replace(source, importance=matrix), {file_type: tmp_path / "ours.gguf"}, {})
    wanted = llama_quantize(tmp_path / "bf16.gguf", tmp_path / "wanted.gguf", file_type, matrix)
    assert (tmp_path / "ours.gguf").read_bytes() == wanted.read_bytes()
    plain = llama_quantize(tmp_path / "bf16.gguf", tmp_path / "plain.gguf", file_type)
    assert plain.read_bytes() != wanted.read_bytes()


def test_the_4_bit_base_is_what_training_multiplies_with(tuned, tmp_path) -> None:
    """transformers loads the base in 4 bits; its dequantized weights plus the delta are the exported ones."""
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from gguf.quants import dequantize
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tuned[0], quantization_config=settings, dtype=torch.bfloat16)
    weight = model.model.layers[1].mlp.up_proj.weight
    trained = dequantize_4bit(weight.data, weight.quant_state).float()
    adapter = load_adapter(tuned[1])
    low, high = adapter.modules["model.layers.1.mlp.up_proj.weight"]
    write_targets(load_source(resolve_base(str(tuned[0])), adapter, nf4=True), {"bf16": tmp_path / "nf4.gguf"}, {})
    tensors = {tensor.name: tensor for tensor in open_gguf(tmp_path / "nf4.gguf").tensors}
    found = dequantize(tensors["blk.1.ffn_up.weight"].data, tensors["blk.1.ffn_up.weight"].tensor_type)
    assert (found == (trained + high @ low * adapter.scale).bfloat16().float().numpy()).all()


def test_the_modelfile_stops_at_every_end_token_and_leaves_the_template_to_the_file(tuned, tmp_path) -> None:
    base = shutil.copytree(tuned[0], tmp_path / "base")
    for named, more in ((None, []), (1, ['"\\""']), ([1, 2, "x", True, -1, 10**9, None], ['"\\""', '"#"'])):
        (base / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
        lines = modelfile("model.q8_0.gguf", base, 2048).splitlines()
        assert (lines[0], lines[-2:]) == (
            "FROM ./model.q8_0.gguf",
            ["PARAMETER temperature 0", "PARAMETER num_ctx 2048"],
        )
        stops = [line.removeprefix("PARAMETER stop ") for line in lines[1:-2]]
        assert stops[0] == '"<|eot_id|>"'
        assert stops[len(stops) - len(more) :] == more


@pytest.fixture(scope="module")
def run(tuned, tmp_path_factory):
    """A run directory around the random adapter."""
    from petool_lite.recipe import load_recipe, to_toml

    folder = tmp_path_factory.mktemp("run")
    recipe = load_recipe("demo", [f"model.base={tuned[0]}", "data.train=demo:train:8", "model.max_tokens=2048"])[1]
    (folder / "recipe.toml").write_text(to_toml(recipe))
    shutil.copytree(tuned[1], folder / "adapter")
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tuned[0])
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    manifest = {
        "base": {"name": str(tuned[0])}, "prompt_style": "compact", "setting": "rating",
        "data": {"source": "demo:train:8", "sha256": "0", "kept": 8, "tokens": 100},
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_a_run_becomes_files_that_explain_themselves(run) -> None:
    document = export_run(run, Options(("q4_k_m", "f16"), imatrix=True, lora=True, level="quick"))
    folder = run / "export"
    assert {path.name for path in folder.iterdir()} == {
        "model.q4_k_m.gguf", "model.f16.gguf", "lora.gguf", "imatrix.gguf", "Modelfile", "README.md", "export.json",
    }  # fmt: skip
    assert json.loads((folder / "export.json").read_text()) == document
    assert (document["adapted_modules"], document["merged_tensors"]) == (14, 14)
    assert 0 < document["relative_change"] < 10
    assert document["checks"]["q4_k_m"] == {"prompts_with_equal_ids": 50}
    card = (folder / "README.md").read_text()
    for item in document["files"]:
        assert item["sha256"] in card
    assert "Not scored yet" in card
    fields = gguf_fields(open_gguf(folder / "model.q4_k_m.gguf"))
    assert (fields["petool_lite.prompt_style"], fields["petool_lite.merge_base"]) == ("compact", "bf16")
    assert fields["petool_lite.version"]
    assert (folder / "Modelfile").read_text().startswith("FROM ./model.q4_k_m.gguf\n")

    said = []
    again = export_run(run, Options(("q4_k_m",), imatrix=True, level="quick"), lambda stage, *_: said.append(stage))
    assert "using imatrix.gguf again" in said
    assert "measuring importance" not in said
    assert again["files"][0]["sha256"] == document["files"][0]["sha256"]


def test_a_model_that_never_stops_fails_its_export_and_leaves_no_file(run) -> None:
    shutil.rmtree(run / "export", ignore_errors=True)
    with pytest.raises(PetoolError, match=r"the export is not right: q8_0: \d+ of 20 greedy replies stop"):
        export_run(run, Options(("q8_0",)))
    assert list((run / "export").iterdir()) == []


def test_an_adapter_that_names_another_base_is_refused(run, tmp_path) -> None:
    shutil.copytree(run, tmp_path / "run")
    file = tmp_path / "run" / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "owner/other"}))
    with pytest.raises(PetoolError, match="trained on owner/other"):
        export_run(tmp_path / "run", Options(("q8_0",)))
    with pytest.raises(PetoolError, match="unknown GGUF type: q9"):
        export_run(tmp_path / "run", Options(("q9",)))


def test_export_through_the_command_line(run, command) -> None:
    result = command("export", "--run", run, "--gguf", "Q8_0", "--lora-gguf", "--verify", "quick")
    assert result.returncode == 0, result.stderr
    assert [line.rpartition("/")[2] for line in result.stdout.splitlines()] == ["model.q8_0.gguf", "lora.gguf"]
    assert "q8_0: " in result.stderr
    assert "50 prompts with equal ids" in result.stderr
    for noise in ("Failed to load", "Unknown separator", "Warning"):
        assert noise not in result.stderr
    result = command("export", "--run", run, "--gguf", "q9", "--json")
    assert (result.returncode, result.stdout) == (1, "")
    assert "unknown GGUF type: q9" in result.stderr
    assert "Traceback" not in result.stderr
