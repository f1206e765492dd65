"""The mean of runs is a run like any other, and nothing half-made stays where it cannot be."""

import json
import shutil

import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from petool_lite.cli import main
from petool_lite.runs import find_run, list_runs


def test_the_mean_of_two_runs_is_a_run_and_runs_that_differ_are_refused(trained_full, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PETOOL_LITE_RUNS", str(tmp_path))
    one, two = (tmp_path / name for name in ("one", "two"))
    for run in (one, two):
        shutil.copytree(trained_full, run, ignore=shutil.ignore_patterns("checkpoints"))
    weights = load_file(one / "model/model.safetensors")
    noise = {name: (weight.float() + torch.randn(weight.shape)).bfloat16() for name, weight in weights.items()}
    save_file(noise, two / "model/model.safetensors", {"format": "pt"})
    shutil.copytree(one, tmp_path / ".mean.0.draft")  # what a killed command leaves
    said = CliRunner().invoke(main, ["runs", "average", "one", "two", "--json"])
    made = find_run(None)
    assert json.loads(said.stdout.splitlines()[-1]) == {"run": str(made)}
    found = load_file(made / "model/model.safetensors")
    assert found.keys() == weights.keys()
    assert all(found[name].equal(((weights[name].float() + noise[name].float()) / 2).bfloat16()) for name in found)
    assert json.loads((made / "manifest.json").read_text())["averaged"] == [str(one), str(two)]
    weights.popitem()
    save_file(weights, two / "model/model.safetensors", {"format": "pt"})
    manifest = json.loads((two / "manifest.json").read_text())
    for given, change, words in (("two", {}, "other names or shapes"), ("one", {}, "each once"),
                                 ("two", {"setting": "preferred"}, "setting is rating in")):  # fmt: skip
        (two / "manifest.json").write_text(json.dumps(manifest | change))
        refused = CliRunner().invoke(main, ["runs", "average", given, "one"])
        assert (refused.exit_code, len(list_runs()), len([*tmp_path.iterdir()])) == (1, 3, 4)
        assert words in refused.stderr
