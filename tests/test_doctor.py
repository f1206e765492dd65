"""Tuning measures for real, and what it remembers is used and belongs to one file on one machine."""

import json
import shutil

import pytest

from petool_lite import ToolCaller
from petool_lite.inference.settings import EngineSettings, model_sha256, remember_settings, tuned_settings
from petool_lite.models import embedded_gguf


def test_what_was_remembered_is_used_and_a_changed_file_is_not_mistaken(tmp_path, monkeypatch) -> None:
    file = tmp_path / "m.gguf"
    shutil.copy(embedded_gguf(), file)
    assert tuned_settings(file) == EngineSettings()
    chosen = EngineSettings(threads_decode=1, ubatch=256, flash_attention=True, kv_type="q8_0")
    remember_settings(file, chosen)
    with ToolCaller(file, n_ctx=512) as caller:
        assert caller._model.settings == chosen
        assert caller._model.generate(caller._model.encode("The capital of France is"), 4).text
    before = model_sha256(file)
    with file.open("ab") as open_file:
        open_file.write(b"x")
    assert model_sha256(file) != before
    assert tuned_settings(file) == EngineSettings()


@pytest.mark.slow
def test_doctor_tunes_and_says_what_it_measured(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("petool_lite.doctor._PROMPT", 64)
    monkeypatch.setattr("petool_lite.doctor._REPLY", 4)
    from petool_lite.doctor import tune

    file = tmp_path / "m.gguf"
    shutil.copy(embedded_gguf(), file)
    stages = []
    found = tune(file, lambda stage, done, total, note: stages.append(done))
    assert stages == [0, 1, 2, 3, 4, 5, 6]
    assert all(trial["prefill_tokens_per_s"] > 0 < trial["decode_tokens_per_s"] for trial in found["trials"])
    assert {trial["flash_attention"] for trial in found["trials"]} == {True, False}
    assert tuned_settings(file) == EngineSettings(**found["settings"])
    assert json.dumps(found)
