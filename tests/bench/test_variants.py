"""Names of variants, what is left out where a machine or a run lacks it, and the rules."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from petool_lite.bench.baselines import RULES, rule_call
from petool_lite.bench.variants import check_names, run_variants, with_decodings

from petool_lite.console import silent
from petool_lite.data.files import load_dataset
from petool_lite.errors import PetoolError
from petool_lite.recipe import load_recipe, to_toml


@pytest.fixture
def run(tmp_path, tiny_files) -> tuple[Path, object]:
    """A run that has exported q8_0 and f16 (the files' content does not matter here)."""
    folder = tmp_path / "run-1"
    (folder / "export").mkdir(parents=True)
    for kind, size in (("q8_0", 10), ("f16", 20)):
        (folder / "export" / f"model.{kind}.gguf").write_bytes(b"GGUF" + b"x" * size)
    return folder, load_recipe("demo", [f"model.base={tiny_files['folder']}"])[1]


@pytest.fixture
def no_gpu(monkeypatch) -> None:
    monkeypatch.setattr("petool_lite.inference.gpu.gpu_available", lambda: False)


def test_all_is_what_this_run_and_machine_have_and_the_rest_is_told(run, no_gpu) -> None:
    said: list[str] = []

    def report(stage: str, done: int, total: int, note: str) -> None:
        said.append(stage)

    found = run_variants(*run, ["all"], report)
    assert [item.name for item in found] == [*RULES, "base-f16", "base-q8_0", "base-q4_k_m", "tuned-f16", "tuned-q8_0"]
    told = "\n".join(said)
    assert "need a GPU and torch finds none: base-nf4-gpu, base-bf16-gpu, base-bf16-gpu-single, tuned-nf4-gpu" in told
    assert "left out tuned-q4_k_m: the run run-1 has no q4_k_m file; petool-lite export --run" in told
    assert found[len(RULES)].model.is_file()


def test_the_smallest_file_is_tuned_and_base_goes_with_it(run) -> None:
    found = with_decodings(run_variants(*run, ["base", "tuned", "rule-liked"], silent), "both")
    names = ["base-q8_0", "base-q8_0-constrained", "tuned-q8_0", "tuned-q8_0-constrained", "rule-liked"]
    assert [item.name for item in found] == names


@pytest.mark.parametrize(("more", "scored"), [((), "rating"), (("--setting", "preferred"), "preferred")])
def test_a_run_that_learned_all_settings_is_scored_on_one(run, command, tmp_path, more, scored) -> None:
    folder, _ = run
    (folder / "recipe.toml").write_text(to_toml(load_recipe("demo", ["data.setting=all"])[1]))
    (folder / "manifest.json").write_text("{}")
    options = ("--variants", "rule-likely", "--limit", "2", "--json")
    result = command("bench", "--run", str(folder), *options, *more, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert [item["setting"] for item in json.loads(result.stdout.splitlines()[-1])["variants"]] == [scored]
    assert result.stderr.count("the run learned every setting; this scores rating") == (not more)


def test_what_is_asked_by_name_must_be_there(run, no_gpu) -> None:
    with pytest.raises(PetoolError, match="has no q4_k_m file") as caught:
        run_variants(*run, ["tuned-q4_k_m"], silent)
    assert "petool-lite export --run" in caught.value.hint
    with pytest.raises(PetoolError, match="need a GPU") as caught:
        run_variants(*run, ["tuned-nf4-gpu", "rules"], silent)
    assert caught.value.exit_code == 3
    for name in ("fast", "tuned-q9", "base-fp8-gpu"):
        with pytest.raises(PetoolError, match=f"unknown variant in base,{name}: {name}"):
            check_names(["base", name])


def test_gpu_variants_are_the_base_with_the_adapter_in_both_precisions(run, monkeypatch) -> None:
    monkeypatch.setattr("petool_lite.inference.gpu.gpu_available", lambda: True)
    found = {item.name: item for item in run_variants(*run, ["gpu", "tuned-gpu"], silent)}
    assert len(found) == 6
    tuned = found["tuned-nf4-gpu"]
    assert (tuned.precision, tuned.adapter, tuned.style) == ("nf4", run[0] / "adapter", "compact")
    assert found["base-bf16-gpu"].adapter is None
    assert (found["tuned-bf16-gpu-single"].batch, found["tuned-bf16-gpu"].batch) == (1, 64)


def test_gpu_variants_of_a_fully_tuned_run_are_its_own_model(run, monkeypatch) -> None:
    monkeypatch.setattr("petool_lite.inference.gpu.gpu_available", lambda: True)
    folder, recipe = run
    recipe = replace(recipe, train=replace(recipe.train, method="full"))
    found = {item.name: item for item in run_variants(folder, recipe, ["gpu"], silent)}
    for name in ("tuned-bf16-gpu", "tuned-nf4-gpu"):
        assert (found[name].model, found[name].adapter) == (folder / "model", None)
    assert found["base-bf16-gpu"].model == Path(recipe.model.base)


def test_rules_answer_valid_calls_and_random_is_the_same_every_time() -> None:
    entries = load_dataset("demo:test:40", "rating").entries
    right = {}
    for name in RULES:
        calls = [rule_call(name, entry, "rating") for entry in entries]
        assert calls == [rule_call(name, entry, "rating") for entry in entries]
        for entry, call in zip(entries, calls, strict=True):
            tool = next(tool for tool in entry.prompt("rating").tools if tool.name == call.tool_name)
            assert set(call.parameters) == {item.name for item in tool.required}
        right[name] = sum(call.tool_name == entry.gold.tool_name for entry, call in zip(entries, calls, strict=True))
    assert right["rule-likely"] >= right["rule-history"] > right["rule-liked"] > right["rule-random"]


def test_what_rules_score_on_the_published_entries(open_entries) -> None:
    """What docs/results.md says of them."""
    entries = load_dataset(str(open_entries), "rating").entries
    shares = {
        name: 100 * sum(rule_call(name, entry, "rating").tool_name == entry.gold.tool_name for entry in entries) / 753
        for name in RULES
    }
    assert shares == pytest.approx(
        {"rule-random": 11.2, "rule-first": 13.1, "rule-liked": 41.0, "rule-history": 80.2, "rule-likely": 91.8},
        abs=1.5,
    )


def test_a_default_is_written_in_its_own_type() -> None:
    from petool_lite.bench.baselines import _default

    from petool_lite.data.entries import Parameter

    cases = [("NUMBER", "5", 5), ("BOOLEAN", "True", True), ("NUMBER", "", ""), ("STRING", "5", "5"), ("NUMBER", 2, 2)]
    for kind, default, wanted in cases:
        found = _default(Parameter("p", kind, "", default))
        assert json.dumps(found) == json.dumps(wanted)
