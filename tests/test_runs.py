"""Run directories: whole files only, and clear words for what is not there."""

import pytest

from petool_lite.errors import PetoolError
from petool_lite.runs import create_run, draft, find_run, list_runs, write_json, write_text


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("PETOOL_LITE_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def test_a_failed_write_leaves_the_old_file_and_no_draft(tmp_path) -> None:
    target = tmp_path / "file.txt"
    write_text(target, "old")
    with pytest.raises(RuntimeError, match="stop"), draft(target) as path:
        path.write_text("half")
        raise RuntimeError("stop")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_is_replaced_whole(tmp_path) -> None:
    target = tmp_path / "adapter"
    for content in ("one", "two"):
        with draft(target) as folder:
            folder.mkdir()
            (folder / content).write_text(content)
    assert [path.name for path in target.iterdir()] == ["two"]


def test_the_newest_complete_run_is_found_and_what_is_not_there_is_said(root) -> None:
    with pytest.raises(PetoolError) as error:
        find_run(None)
    assert "petool-lite train" in error.value.hint
    runs = [create_run("demo") for _ in range(3)]
    assert len(set(runs)) == 3
    for run in runs:
        write_text(run / "recipe.toml", "")
    for run in runs[:2]:
        write_json(run / "manifest.json", {})
    assert find_run(None) == runs[1]
    assert set(list_runs()) == set(runs)
    with pytest.raises(PetoolError, match="not finished"):
        find_run(runs[2].name)
    with pytest.raises(PetoolError, match="no such run: gone"):
        find_run("gone")
