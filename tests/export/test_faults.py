"""What can go wrong in an export is one clear line and leaves no file, not even a half one."""

import errno
import os
import shutil

import pytest
from petool_lite.export import load_source, write_targets
from petool_lite.export.merge import load_adapter

from petool_lite.errors import PetoolError
from petool_lite.models import resolve_base


@pytest.fixture(scope="module")
def adapter(tuned):
    return tuned[1]


def refused(directory, adapter, tmp_path) -> PetoolError:
    """The error of exporting to tmp_path/out, which must stay empty."""
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    with pytest.raises(PetoolError) as error:
        source = load_source(resolve_base(str(directory)), load_adapter(adapter) if adapter else None)
        write_targets(source, {"q4_k_m": out / "model.q4_k_m.gguf"}, {})
    assert list(out.iterdir()) == []
    assert error.value.exit_code == 1
    assert error.value.hint
    return error.value


def test_an_adapter_of_another_base_is_refused(tiny_model, llama3_tokenizer, small, make_adapter, tmp_path) -> None:
    make_adapter(tiny_model(llama3_tokenizer, intermediate_size=768), tmp_path / "wide")
    make_adapter(tiny_model(llama3_tokenizer, num_hidden_layers=3), tmp_path / "deep")
    for name in ("wide", "deep"):
        assert "another base" in refused(small, tmp_path / name, tmp_path).hint


def test_an_adapter_that_changes_nothing_is_refused(small, make_adapter, tmp_path) -> None:
    make_adapter(small, tmp_path / "idle", scale=0.0)
    assert "untrained" in refused(small, tmp_path / "idle", tmp_path).hint
    make_adapter(small, tmp_path / "faint", scale=1e-30)
    assert "0 tensors changed, but the adapter has 14" in refused(small, tmp_path / "faint", tmp_path).message


def test_an_adapter_with_trained_embeddings_is_refused(small, make_adapter, adapter, tmp_path) -> None:
    make_adapter(small, tmp_path / "saved", modules_to_save=["embed_tokens"])
    assert "uses modules_to_save" in refused(small, tmp_path / "saved", tmp_path).message
    make_adapter(small, tmp_path / "lora", target_modules=["q_proj", "embed_tokens"])
    assert "embed_tokens" in refused(small, tmp_path / "lora", tmp_path).message
    shutil.copytree(tmp_path / "saved", tmp_path / "hidden")  # the settings do not say so, the weights do
    shutil.copy(adapter / "adapter_config.json", tmp_path / "hidden")
    assert "embed_tokens" in refused(small, tmp_path / "hidden", tmp_path).message


def test_a_damaged_base_is_refused(small, adapter, tmp_path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    file = shutil.copytree(small, tmp_path / "base") / "model.safetensors"
    raw, weights, name = file.read_bytes(), load_file(file), "model.layers.1.mlp.up_proj.weight"
    for damaged in (raw[:-1000], b"\xff" * 64 + raw[64:]):
        file.write_bytes(damaged)
        assert "damaged weights" in refused(file.parent, adapter, tmp_path).message
    save_file({key: value for key, value in weights.items() if key != name}, file)
    assert f"{name} is missing" in refused(file.parent, adapter, tmp_path).message
    weights[name][3, 5] = torch.nan
    save_file(weights, file)
    assert f"{name} holds values that are not finite" in refused(file.parent, adapter, tmp_path).message


def test_a_full_disk_is_said_before_anything_is_written(small, tmp_path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "GiB free, the export needs" in refused(small, None, tmp_path).message


def test_a_disk_that_fills_up_is_cleaned_up(small, tmp_path, monkeypatch) -> None:
    real, calls = os.pwrite, []

    def full(*arguments):
        calls.append(1)
        if len(calls) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(os, "pwrite", full)
    assert "the disk is full" in refused(small, None, tmp_path).message


def test_what_a_killed_export_left_goes_with_the_next(small, tmp_path) -> None:
    target = tmp_path / "model.q4_k_m.gguf"
    (tmp_path / ".model.q4_k_m.gguf.0123abcd.draft").write_text("half")
    write_targets(load_source(resolve_base(str(small))), {"q4_k_m": target}, {})
    assert list(tmp_path.iterdir()) == [target]
