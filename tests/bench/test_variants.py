"""Names of variants, what is benched where nothing is asked for, and the baselines."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from petool_lite.bench.baselines import RULES, rule_call
from petool_lite.bench.variants import check_names, default_names, run_variants, with_decodings

from petool_lite.console import silent
from petool_lite.data.entries import required
from petool_lite.data.files import load_dataset
from petool_lite.errors import PetoolError
from petool_lite.recipe import load_recipe


@pytest.fixture
def run(tmp_path, tiny, monkeypatch) -> tuple[Path, object]:
    """A run that has exported q8_0 and f16 (the files' content does not matter here)."""
    folder = tmp_path / "run-1"
    (folder / "export").mkdir(parents=True)
    for kind, size in (("q8_0", 10), ("f16", 20)):
        (folder / "export" / f"model.{kind}.gguf").write_bytes(b"GGUF" + b"x" * size)
    (folder / "manifest.json").write_text("{}")
    monkeypatch.setattr("petool_lite.export.export_base", lambda base, kind, report: Path(f"{base}.{kind}.gguf"))
    return folder, load_recipe("demo", [f"model.base={tiny}"])[1]


@pytest.fixture
def gpu(monkeypatch):
    """A switch for whether torch finds a GPU."""
    here = [True]
    monkeypatch.setattr("petool_lite.bench.variants.gpu_available", lambda: here[0])
    return lambda there: here.__setitem__(0, there)


def test_all_is_what_this_run_and_machine_have(run, gpu) -> None:
    on_cpu = ["base-f16", "tuned-f16", "base-q8_0", "tuned-q8_0"]
    on_gpu = ["base-nf4-gpu", "base-bf16-gpu", "tuned-nf4-gpu", "tuned-bf16-gpu"]
    assert [item.name for item in run_variants(*run, ["all"], silent)] == [*RULES, *on_cpu, *on_gpu]
    gpu(False)
    assert [item.name for item in run_variants(*run, ["all"], silent)] == [*RULES, *on_cpu]


def test_the_smallest_file_is_tuned_and_base_goes_with_it_in_the_same_decoding(run) -> None:
    found = run_variants(*run, ["base", "tuned", "rule-liked"], silent)
    assert [item.name for item in with_decodings(found, "constrained")] == ["base-q8_0", "tuned-q8_0", "rule-liked"]
    names = ["base-q8_0", "base-q8_0-free", "tuned-q8_0", "tuned-q8_0-free", "rule-liked"]
    both = with_decodings(found, "both")
    assert [item.name for item in both] == names
    assert both[1].about == "the base before training, as a q8_0 GGUF file on the CPU, writing anything"


def test_a_model_is_scored_where_it_was_trained_and_the_rest_is_said(run, gpu) -> None:
    said: list[str] = []
    for trained_on, here, on in (
        ("CPU, 2 threads", True, ""),
        ("NVIDIA H200", False, ""),
        ("NVIDIA H200", True, "-gpu"),
    ):
        gpu(here)
        (run[0] / "manifest.json").write_text(json.dumps({"device": trained_on}))
        assert said == []
        assert default_names(run[0], lambda stage, *rest: said.append(stage)) == [f"base{on}", f"tuned{on}", "rules"]
    assert "also here, on the CPU: tuned-f16, tuned-q8_0" in said[0]


def test_what_is_asked_by_name_must_be_there(run, gpu) -> None:
    gpu(False)
    with pytest.raises(PetoolError, match="has no q4_k_m file") as caught:
        run_variants(*run, ["tuned-q4_k_m"], silent)
    assert "petool-lite export --run" in caught.value.hint
    with pytest.raises(PetoolError, match="tuned-nf4-gpu needs a GPU") as caught:
        run_variants(*run, ["tuned-nf4-gpu", "rules"], silent)
    assert caught.value.exit_code == 3
    for name in ("fast", "tuned-q9", "base-fp8-gpu"):
        with pytest.raises(PetoolError, match=f"unknown variant in base,{name}: {name}"):
            check_names(["base", name])


def test_gpu_variants_are_the_base_with_what_was_trained(run, gpu) -> None:
    folder, recipe = run
    found = {item.name: item for item in run_variants(folder, recipe, ["gpu", "tuned-gpu"], silent)}
    assert len(found) == 4
    tuned = found["tuned-nf4-gpu"]
    assert (tuned.precision, tuned.adapter, tuned.batch) == ("nf4", folder / "adapter", 64)
    assert found["base-bf16-gpu"].adapter is None
    recipe = replace(recipe, train=replace(recipe.train, method="full"))
    found = {item.name: item for item in run_variants(folder, recipe, ["gpu"], silent)}
    for name in ("tuned-bf16-gpu", "tuned-nf4-gpu"):
        assert (found[name].model, found[name].adapter) == (folder / "model", None)
    assert found["base-bf16-gpu"].model == Path(recipe.model.base)


def test_baselines_answer_valid_calls_the_same_every_time() -> None:
    entries = load_dataset("demo:test:40").entries
    for name in RULES:
        calls = [rule_call(name, entry) for entry in entries]
        assert calls == [rule_call(name, entry) for entry in entries]
        for entry, call in zip(entries, calls, strict=True):
            tool = next(tool for tool in entry.tools if tool.name == call.name)
            assert set(call.arguments) == set(required(tool))


def test_what_baselines_score_on_the_published_entries(open_entries) -> None:
    """What docs/results.md says of them."""
    entries = load_dataset(str(open_entries)).entries
    shares = {
        name: 100 * sum(rule_call(name, entry).name == entry.answer.name for entry in entries) / 753 for name in RULES
    }
    assert shares == pytest.approx(
        {"rule-random": 11.2, "rule-first": 13.1, "rule-liked": 41.0, "rule-words": 39.8}, abs=1.5
    )
