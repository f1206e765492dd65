"""Exporting a run of full fine-tuning: its own weights, the base's everything else."""

import shutil

import pytest
from petool_lite.export import Options, export_run, load_source, load_whole, write_targets

from petool_lite.errors import PetoolError
from petool_lite.gguf_base import gguf_fields, open_gguf
from petool_lite.models import resolve_base


def test_its_gguf_is_that_of_the_folder_itself(tuned_full, tmp_path) -> None:
    """Byte for byte, the folder taken as a base under the name of its own."""
    base, folder = tuned_full
    copy = shutil.copytree(folder, tmp_path / base.name)
    for kind in ("q4_k_m", "bf16"):
        changes = write_targets(load_whole(resolve_base(str(base)), folder), {kind: tmp_path / "a"}, {})
        write_targets(load_source(resolve_base(str(copy))), {kind: tmp_path / "b"}, {})
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert len(changes) == 2 * 9 + 2
    assert all(change.changed and change.delta > 0 for change in changes.values())


def test_a_run_of_it_becomes_files_that_say_so(tuned_full, make_run) -> None:
    run = make_run(tuned_full[1], tuned_full[0], "train.method=full")
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


def test_an_untrained_damaged_or_foreign_model_is_refused(tuned_full, tiny_model, llama3_tokenizer, tmp_path) -> None:
    base, folder = resolve_base(str(tuned_full[0])), tuned_full[1]
    with pytest.raises(PetoolError, match="changed no weight"):
        write_targets(load_whole(base, tuned_full[0]), {"f16": tmp_path / "f16.gguf"}, {})
    assert list(tmp_path.iterdir()) == []
    other = tiny_model(llama3_tokenizer, intermediate_size=768)
    with pytest.raises(PetoolError, match="is not of the base"):
        load_whole(resolve_base(str(other)), folder)
    cut = tmp_path / "model"
    shutil.copytree(folder, cut)
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:999])
    with pytest.raises(PetoolError, match="damaged weights") as error:
        load_whole(base, cut)
    assert "train the run again" in error.value.hint
    (cut / "config.json").unlink()
    with pytest.raises(PetoolError, match="not a model directory"):
        load_whole(base, cut)
