"""Bases that cannot be trained are refused before anything of theirs is loaded."""

import json
import shutil
from pathlib import Path

import pytest

from petool_lite.base import resolve_base
from petool_lite.errors import PetoolError


@pytest.fixture
def model(tiny, tmp_path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def change(file: Path, **keys) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def refused(model: Path) -> str:
    with pytest.raises(PetoolError) as error:
        resolve_base(str(model))
    return f"{error.value.message} | {error.value.hint}"


@pytest.mark.parametrize("kinds", [["MllamaForConditionalGeneration"], ["LlamaForSequenceClassification"], []])
def test_another_kind_of_model(model, kinds) -> None:
    change(model / "config.json", architectures=kinds)
    assert f"not a text model of the Llama family: {kinds[0] if kinds else 'no architecture'}" in refused(model)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_remote_code(model, file) -> None:
    change(model / file, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    (model / "modeling_evil.py").write_text("raise SystemExit('this ran')")
    assert f"code of its own (auto_map in {file})" in refused(model)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights(model, name) -> None:
    (model / "model.safetensors").rename(model / name)
    text = refused(model)
    assert f"only the pickled {name}" in text
    assert "not read" in text


def test_a_folder_that_is_no_model(model) -> None:
    (model / "config.json").unlink()
    assert "config.json is missing" in refused(model)
    (model / "config.json").write_text("{")
    assert "config.json is not JSON" in refused(model)


def test_a_recipe_for_a_gpu_says_what_runs_here(command, tmp_path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    result = command("train", "rating", cwd=tmp_path)
    assert result.returncode == 3
    assert "needs a GPU" in result.stderr
    assert "petool-lite train demo" in result.stderr
    assert not (tmp_path / "runs").exists()
