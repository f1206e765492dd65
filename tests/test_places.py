"""A place that cannot be written costs speed, never the answer: the cache falls back to a folder of this user's."""

import json
import os
import stat
import tempfile
from pathlib import Path

import pytest

from petool_lite import places
from petool_lite.models import embedded_gguf
from petool_lite.places import cache_place, cache_root


@pytest.fixture
def temporary(monkeypatch, tmp_path) -> Path:
    """A temporary directory of this test's own, and no memory of what was said before."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    places._substitute.cache_clear()
    yield folder
    places._substitute.cache_clear()


def test_without_a_home_that_can_be_written(monkeypatch, temporary, tmp_path, capfd) -> None:
    kept = tmp_path / "kept"
    (kept / "bases" / "there").mkdir(parents=True)
    monkeypatch.setenv("PETOOL_LITE_CACHE", str(kept))
    monkeypatch.setattr(os, "access", lambda path, mode: str(path).startswith(str(temporary)))
    found = cache_root()
    assert found == temporary / f"petool-lite-{os.getuid()}" == cache_root()
    assert stat.S_IMODE(found.stat().st_mode) == 0o700
    assert capfd.readouterr().err.count("is the cache instead") == 1
    assert cache_place("bases", "new") == found / "bases" / "new"
    assert cache_place("bases", "there") == kept / "bases" / "there", "what is there is read"


def test_somebody_elses_folder_is_not_taken(monkeypatch, temporary) -> None:
    (temporary / f"petool-lite-{os.getuid()}").symlink_to("/etc")
    monkeypatch.setenv("PETOOL_LITE_CACHE", "/dev/null/cache")
    found = cache_root()
    assert found.parent == temporary
    assert found.name != f"petool-lite-{os.getuid()}"


def test_a_call_is_answered_where_nothing_can_be_kept(command, tmp_path) -> None:
    """A user without a home, and places that not even root can write to."""
    tools = [{"name": "loaves", "parameters": {"properties": {"a": {"type": "string"}}}}]
    (tmp_path / "tools.json").write_text(json.dumps(tools))
    variables = {"PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1", "TMPDIR": str(tmp_path), "HOME": "/"}
    variables |= {"PETOOL_LITE_CACHE": "/dev/null/cache", "XDG_DATA_HOME": "/dev/null/data"}
    line = ["call", "Which loaves?", "--tools", "tools.json", "--model", embedded_gguf(), "--user", "ann"]
    done = command(*line, cwd=tmp_path, env=variables)
    assert (done.returncode, '"name": "loaves"' in done.stdout) == (0, True), done.stderr
    assert ("Traceback" in done.stderr, done.stderr.count("nothing is remembered")) == (False, 1)
