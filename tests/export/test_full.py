"""Exporting a run of full fine-tuning: its own weights, the base's everything else."""

import json
import shutil

import pytest
from petool_lite.export import load_source, load_whole, write_targets

from petool_lite.errors import PetoolError
from petool_lite.gguf_base import gguf_fields, open_gguf
from petool_lite.models import resolve_base


def test_its_gguf_is_that_of_the_folder_itself(trained_full, tiny, tmp_path) -> None:
    """Byte for byte, the folder taken as a base under the name of its own."""
    copy = tmp_path / tiny.name
    shutil.copytree(trained_full / "model", copy)
    for kind in ("q4_k_m", "bf16"):
        changes = write_targets(load_whole(resolve_base(str(tiny)), trained_full / "model"), {kind: tmp_path / "a"}, {})
        write_targets(load_source(resolve_base(str(copy))), {kind: tmp_path / "b"}, {})
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert len(changes) == 2 * 9 + 2
    assert all(change.changed and change.delta > 0 for change in changes.values())


@pytest.mark.slow
def test_export_then_bench_through_the_command_line(trained_full, command) -> None:
    root = trained_full.parent.parent
    line = ["export", "--run", trained_full, "--verify", "quick", "--json"]
    result = command(*line, "--gguf", "q8_0,q4_k_m", "--imatrix", cwd=root)
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout.splitlines()[-1])
    assert (document["method"], document["tensors"], document["changed_tensors"]) == ("full", 20, 20)
    assert 0 < document["relative_change"] < 1
    assert len(document["model_sha256"]) == 64
    assert not {"merge_base", "adapter_sha256", "merged_tensors"} & set(document)
    fields = gguf_fields(open_gguf(trained_full / "export" / "model.q8_0.gguf"))
    assert (fields["petool_lite.prompt_style"], "petool_lite.merge_base" in fields) == ("compact", False)
    card = (trained_full / "export" / "README.md").read_text()
    assert f"all weights learned, SHA-256 `{document['model_sha256']}`" in card
    assert "20 of 20 tensors changed" in card
    benched = command("bench", "--run", trained_full, "--variants", "tuned", "--limit", "1", "--json", cwd=root)
    assert benched.returncode == 0, benched.stderr
    again = command(*line, "--gguf", "q8_0", "--imatrix", cwd=root)
    assert "using imatrix.gguf again" in again.stderr


@pytest.mark.parametrize("options", [["--lora-gguf"], ["--merge-base", "nf4"], ["--merge-base", "bf16"]])
def test_what_needs_an_adapter_is_refused(trained_full, command, options) -> None:
    result = command("export", "--run", trained_full, *options)
    assert result.returncode == 1
    assert f"{options[0]} needs an adapter" in result.stderr
    assert f"leave {options[0]} out" in result.stderr


def test_the_reference_is_the_trained_model(trained_full, tiny) -> None:
    """What files are compared with: not the base, and not a merge."""
    import torch
    from petool_lite.export.reference import Reference, Row
    from petool_lite.export.weights import open_weights
    from transformers import AutoModelForCausalLM

    source = load_whole(resolve_base(str(tiny)), trained_full / "model")
    ids = list(range(40, 60))
    with open_weights(source.tensors) as reader:
        (found,) = Reference(source, reader).answer_logits([Row(ids, 10)], lambda *_: None)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(trained_full / "model", dtype=torch.float32)
        wanted = model(torch.tensor([ids])).logits[0, 9:-1]
    assert torch.allclose(torch.from_numpy(found), wanted, atol=1e-4)


def test_an_untrained_damaged_or_foreign_model_is_refused(trained_full, tiny, tiny_model, smollm2, tmp_path) -> None:
    base = resolve_base(str(tiny))
    with pytest.raises(PetoolError, match="changed no weight"):
        write_targets(load_whole(base, tiny), {"f16": tmp_path / "f16.gguf"}, {})
    assert list(tmp_path.iterdir()) == []
    other = tiny_model(smollm2.directory, intermediate_size=768)
    with pytest.raises(PetoolError, match="is not of the base"):
        load_whole(resolve_base(str(other)), trained_full / "model")
    cut = tmp_path / "model"
    shutil.copytree(trained_full / "model", cut)
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:999])
    with pytest.raises(PetoolError, match="damaged weights") as error:
        load_whole(base, cut)
    assert "train the run again" in error.value.hint
    (cut / "config.json").unlink()
    with pytest.raises(PetoolError, match="not a model directory"):
        load_whole(base, cut)
