"""Checks of an export: figures that a wrong file fails, the LoRA file, the importance matrix, the 4-bit base."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from support_gguf import write_gguf

from petool_lite.console import silent
from petool_lite.errors import PetoolError
from petool_lite.export import Options, export_run, load_source, load_whole, write_targets
from petool_lite.export import run as run_module
from petool_lite.export.gguf import write_lora
from petool_lite.export.source import load_adapter
from petool_lite.export.verify import Evaluator, OtherServer, Reference, agreement, check_ids, shortfalls
from petool_lite.families import chat_template
from petool_lite.gguf_base import gguf_fields, open_gguf
from petool_lite.inference.gpu import four_bits
from petool_lite.models import resolve_base
from petool_lite.prompt.render import Example, chat_from_directory, exported_template, render_messages


def rows(count=3, length=40):
    rng = np.random.default_rng(0)
    return [Example("", rng.integers(0, 500, length + 3 * i).tolist(), 30, 0) for i in range(count)]


@pytest.fixture(scope="module")
def source(tuned):
    return load_source(resolve_base(str(tuned[0])), load_adapter(tuned[1]))


def decisive(source, count=6):
    """Rows on which the model is nowhere in two minds: a random one often is, and there rounding decides."""
    drawn = [replace(row, ids=row.ids[:38]) for row in rows(160)]
    found = Reference(source).answer_logits(drawn, silent)
    gaps = [float(np.diff(np.sort(logits)[:, -2:]).min()) for logits in found]
    chosen = [index for index, gap in enumerate(gaps) if gap > 0.04][:count]
    assert len(chosen) == count
    return [drawn[index] for index in chosen], [found[index] for index in chosen]


def test_files_agree_with_transformers_and_a_wrong_one_does_not(tuned, source, tmp_path) -> None:
    """The figures, by hand, of one token: half of its probability moved to another."""
    kl = 0.5 * np.log(0.5 / 0.25) + 0.25 * np.log(0.25 / 0.5)
    one, other = [np.log([[0.5, 0.25, 0.25]])], [np.log([[0.25, 0.5, 0.25]])]
    assert agreement(one, other) == {"tokens": 1, "top1": 0.0, "kl": pytest.approx(kl, rel=1e-2)}
    import llama_cpp

    drawn, wanted = decisive(source)
    write_targets(source, {"bf16": tmp_path / "tuned.gguf", "q8_0": tmp_path / "q8.gguf"})
    write_targets(load_source(source.base), {"bf16": tmp_path / "plain.gguf"})
    write_lora(tmp_path / "lora.gguf", source, source.adapter)

    def faults(kind, found):
        figures = {"against_transformers": agreement(wanted, found), "replies": 6, "replies_stopped": 6}
        return " ".join(shortfalls(kind, figures))

    def logits(name):
        with Evaluator(tmp_path / name, 128) as model:
            return [model.run(row.ids[: row.answer_start], row.ids[row.answer_start :], 2)[0] for row in drawn]

    plain, lora = (str(tmp_path / name) for name in ("plain.gguf", "lora.gguf"))
    model, adapted = llama_cpp.Llama(plain, lora_path=lora, logits_all=True, verbose=False), []
    for row in drawn:
        model.reset()
        model.eval(row.ids[:-1])
        adapted.append(model.scores[row.answer_start - 1 : len(row.ids) - 1].copy())
    assert faults("bf16", logits("tuned.gguf")) == faults("q8_0", logits("q8.gguf")) == faults("bf16", adapted) == ""
    wrong = faults("bf16", logits("plain.gguf"))
    assert ("top-1 agreement" in wrong, "KL divergence" in wrong) == (True, True)


def test_other_token_ids_are_refused(tuned, source, smollm2, tmp_path) -> None:
    write_targets(source, {"q8_0": tmp_path / "a.gguf"})
    texts = ["12345 café's\n\n  x", "<|start_header_id|>user<|end_header_id|>\n\nhi", "日本 👋 {}}"]
    check_ids(tmp_path / "a.gguf", source, [({}, text) for text in texts])
    with pytest.raises(PetoolError, match="chat template or end token"):
        check_ids(tmp_path / "a.gguf", replace(source, base=smollm2), [({}, "one")])
    with pytest.raises(PetoolError, match="chat template or end token"):
        check_ids(tmp_path / "a.gguf", replace(source, template="another"), [({}, "one")])
    base = shutil.copytree(source.base.directory, tmp_path / "base")
    text = json.loads((base / "tokenizer.json").read_text())
    text["model"]["merges"] = text["model"]["merges"][:5]
    (base / "tokenizer.json").write_text(json.dumps(text))
    with pytest.raises(PetoolError, match=r"llama.cpp and training disagree on a prompt: token \d+ of"):
        check_ids(tmp_path / "a.gguf", replace(source, base=replace(source.base, directory=base)), [({}, "one two")])


def test_a_template_that_llama_cpp_reads_otherwise_is_refused_with_the_first_token(smollm2) -> None:
    pytest.importorskip("xllamacpp")
    source, server = load_source(smollm2), OtherServer(smollm2.gguf)
    request = {"messages": [{"role": "user", "content": "How is the weather in Oslo?"}]}
    text = render_messages(chat_from_directory(smollm2.directory), **request)
    check_ids(smollm2.gguf, source, [(request, text)], server)
    wrong = r"llama.cpp's server disagree on a prompt: token \d+ of \d+ and \d+ is \d+ ' Rome' and \d+ ' Oslo'"
    with pytest.raises(PetoolError, match=wrong):
        check_ids(smollm2.gguf, source, [(request, text.replace("Oslo", "Rome"))], server)


def test_a_template_replaces_all_of_a_gguf_bases(tmp_path) -> None:
    more = {"tokenizer__chat_template__tool_use": "tools", "tokenizer__chat_templates": ["tool_use"]}
    source = load_source(resolve_base(str(write_gguf(tmp_path / "base.gguf", **more))))
    for template, wanted in ((None, 3), ("mine", 1)):
        write_targets(replace(source, template=template), {"f16": tmp_path / "out.gguf"})
        fields = gguf_fields(open_gguf(tmp_path / "out.gguf"))
        assert len([key for key in fields if key.startswith("tokenizer.chat_template")]) == wanted
        assert template in (None, fields["tokenizer.chat_template"])


def test_importance_is_the_mean_square_of_each_input(tuned, source) -> None:
    import torch

    ids, seen = [row.ids for row in rows()], []
    found = Reference(source).mean_squares(ids, silent)
    assert len(found) == 2 * 7
    layer = tuned[2].model.layers[1]
    handle = layer.mlp.down_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0]))
    with torch.no_grad():
        for row in ids:
            tuned[2](torch.tensor([row]))
    handle.remove()
    wanted = torch.cat(seen).double().square().mean(0).numpy()
    assert found["blk.1.ffn_down.weight"] == pytest.approx(wanted, rel=1e-4)
    assert (found["blk.1.attn_q.weight"] == found["blk.1.attn_v.weight"]).all()


def test_with_importance_as_the_quantizer(tiny_model, llama3_tokenizer, llama_quantize, tmp_path) -> None:
    source = load_source(resolve_base(str(tiny_model(llama3_tokenizer, num_hidden_layers=8))))
    matrix = Reference(source).mean_squares([row.ids for row in rows()], silent)
    ours = {kind: tmp_path / f"{kind}.gguf" for kind in ("q4_k_m", "q4_0", "iq4_xs")}
    write_targets(source, {"bf16": tmp_path / "bf16.gguf"})
    write_targets(replace(source, importance=matrix), ours)
    for kind, path in ours.items():
        wanted = llama_quantize(tmp_path / "bf16.gguf", tmp_path / "wanted.gguf", kind, matrix).read_bytes()
        assert path.read_bytes() == wanted
        assert llama_quantize(tmp_path / "bf16.gguf", tmp_path / "plain.gguf", kind).read_bytes() != wanted


def test_the_4_bit_base_is_what_training_multiplies_with(tuned, tmp_path) -> None:
    """transformers loads the base in 4 bits; its dequantized weights plus the delta are the exported ones."""
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from gguf.quants import dequantize
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tuned[0], quantization_config=four_bits(), dtype=torch.bfloat16)
    weight = model.model.layers[1].mlp.up_proj.weight
    trained = dequantize_4bit(weight.data, weight.quant_state).float()
    adapter = load_adapter(tuned[1])
    low, high = adapter.modules["model.layers.1.mlp.up_proj.weight"]
    write_targets(load_source(resolve_base(str(tuned[0])), adapter, nf4=True), {"bf16": tmp_path / "nf4.gguf"})
    tensors = {tensor.name: tensor for tensor in open_gguf(tmp_path / "nf4.gguf").tensors}
    found = dequantize(tensors["blk.1.ffn_up.weight"].data, tensors["blk.1.ffn_up.weight"].tensor_type)
    assert (found == (trained + high @ low * adapter.config.scaling).bfloat16().float().numpy()).all()


@pytest.fixture(scope="module")
def run(tuned, make_run):
    """A run directory around the random adapter."""
    return make_run(tuned[1], tuned[0])


def test_a_run_becomes_files_that_explain_themselves(run, tuned) -> None:
    document = export_run(run, Options(("q4_k_m", "f16"), imatrix=True, lora=True, level="quick"))
    folder = run / "export"
    files = ["Modelfile", "README.md", "export.json", "lora.gguf", "model.f16.gguf", "model.q4_k_m.gguf"]
    assert sorted(path.name for path in folder.iterdir()) == files
    assert json.loads((folder / "export.json").read_text()) == document
    assert (document["tensors"], document["changed_tensors"], document["merge_base"]) == (14, 14, "bf16")
    assert 0 < document["relative_change"] < 10
    assert document["checks"]["q4_k_m"] == {"prompts_with_equal_ids": 50, "prompts_llama_cpp_renders_alike": 50}
    card = (folder / "README.md").read_text()
    for item in document["files"]:
        assert item["sha256"] in card
    assert "Not scored yet" in card
    fields = gguf_fields(open_gguf(folder / "model.q4_k_m.gguf"))
    assert (fields["petool_lite.prompt_style"], fields["petool_lite.merge_base"]) == ("petool", "bf16")
    assert fields["tokenizer.chat_template"] == exported_template(chat_template(tuned[0]), "petool")
    assert fields["petool_lite.version"]
    assert (folder / "Modelfile").read_text().startswith("FROM ./model.q4_k_m.gguf\n")

    again = export_run(run, Options(("q4_k_m",), imatrix=True, level="quick"))
    assert again["files"][0]["sha256"] == document["files"][0]["sha256"]


def test_the_base_is_found_and_merged_as_training_had_it(tuned, make_run, tmp_path, monkeypatch) -> None:
    """Under its name, a path beside the training's folder; a published prompt and its wording go with the file."""
    wording = {"rating": ["Earlier: ", " Tools: ", " Answer."]}
    settings = ("model.precision=nf4", "data.style=published")
    run = make_run(tuned[1], tuned[0], *settings, name=tuned[0].name, wording=wording)
    monkeypatch.chdir(tmp_path)
    document = export_run(run, Options(("q8_0",), level="quick"))
    assert (document["base"], document["merge_base"]) == (tuned[0].name, "nf4")
    fields = gguf_fields(open_gguf(run / "export" / "model.q8_0.gguf"))
    assert json.loads(fields["petool_lite.wording"]) == wording
    assert fields["tokenizer.chat_template"] == exported_template(chat_template(tuned[0]), "published")
    other = export_run(run, Options(("q8_0",), merge_base="bf16", level="quick"))
    assert other["files"][0]["sha256"] != document["files"][0]["sha256"]
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["base"]["directory"] = str(tmp_path / "gone")
    (run / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(PetoolError, match=f"base model not found.*; the run's base lay in {tmp_path}/gone"):
        export_run(run, Options(("q8_0",), level="quick"))
    manifest["base"]["name"] = str(tuned[0])
    (run / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(PetoolError, match=f"the adapter was trained on {tuned[0].name}, the run names"):
        export_run(run, Options(("q8_0",)))


@pytest.mark.parametrize("fault", [pytest.param("card", marks=pytest.mark.slow), "write_lora", "modelfile"])
def test_no_file_gets_its_name_before_the_last_check(run, monkeypatch, fault) -> None:
    shutil.rmtree(run / "export", ignore_errors=True)

    def fail(*_, **__) -> None:
        raise PetoolError(f"{fault} failed")

    options, told = Options(("q8_0",), lora=True, level="quick"), f"{fault} failed"
    if fault == "card":  # before it come all replies, and a random model's do not end
        options, told = Options(("q8_0",)), r"the export is not right: q8_0: \d+ of 20 greedy replies stop"
    monkeypatch.setattr(run_module, fault, fail)
    with pytest.raises(PetoolError, match=told):
        export_run(run, options)
    assert list((run / "export").iterdir()) == []


def test_a_whole_models_gguf_is_that_of_its_folder_and_an_untrained_or_foreign_one_is_refused(
    tiny, trained_full, tiny_model, llama3_tokenizer, tmp_path
) -> None:
    """Byte for byte, the folder taken as a base under the name of its own."""
    base, other = (resolve_base(str(each)) for each in (tiny, tiny_model(llama3_tokenizer, head_dim=32)))
    with pytest.raises(PetoolError, match="changed no weight"):
        write_targets(load_whole(base, tiny), {"f16": tmp_path / "f16.gguf"})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(PetoolError, match="is not of the base"):
        load_whole(other, trained_full / "model")
    copy = shutil.copytree(trained_full / "model", tmp_path / tiny.name)
    for kind in ("q4_k_m", "bf16"):
        changes = write_targets(load_whole(base, trained_full / "model"), {kind: tmp_path / "a"})
        write_targets(load_source(resolve_base(str(copy))), {kind: tmp_path / "b"})
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert len(changes) == 2 * 9 + 2
    assert all(change.changed and change.delta > 0 for change in changes.values())


def test_a_run_of_it_becomes_files_that_say_so(tiny, trained_full, make_run) -> None:
    run = make_run(trained_full / "model", tiny, "train.method=full")
    document = export_run(run, Options(("q8_0", "q4_k_m"), level="quick"))
    assert (document["method"], document["tensors"], document["changed_tensors"]) == ("full", 20, 20)
    assert 0 < document["relative_change"] < 1
    assert len(document["model_sha256"]) == 64
    assert not {"merge_base", "adapter_sha256"} & set(document)
    fields = gguf_fields(open_gguf(run / "export" / "model.q8_0.gguf"))
    assert (fields["petool_lite.prompt_style"], "petool_lite.merge_base" in fields) == ("petool", False)
    card = (run / "export" / "README.md").read_text()
    assert f"all weights learned, SHA-256 `{document['model_sha256']}`" in card
    assert "20 of 20 trained tensors changed" in card
    for options, name in ((Options(("f16",), lora=True), "--lora-gguf"), (Options(("f16",), "bf16"), "--merge-base")):
        with pytest.raises(PetoolError, match=f"{name} needs an adapter") as error:
            export_run(run, options)
        assert f"leave {name} out" in error.value.hint
