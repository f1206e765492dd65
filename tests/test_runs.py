"""Run directories: whole files only, clear words for what is not there, and one writer at a time."""

import os
import signal
import subprocess
import sys

import pytest

from petool_lite.errors import PetoolError
from petool_lite.models import embedded_gguf
from petool_lite.runs import create_run, draft, find_run, list_runs, locked, state, write_json, write_text

HOLD = """
import sys
from pathlib import Path
from petool_lite.runs import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_failed_write_leaves_the_old_file_and_no_draft_and_a_folder_is_replaced_whole(tmp_path) -> None:
    for content in ("one", "two"):
        with draft(tmp_path / "adapter") as folder:
            folder.mkdir()
            (folder / content).write_text(content)
    with pytest.raises(RuntimeError, match="stop"), draft(tmp_path / "adapter") as folder:
        folder.mkdir()
        raise RuntimeError("stop")
    assert [path.name for path in (tmp_path / "adapter").iterdir()] == ["two"]
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_the_newest_complete_run_is_found_and_what_is_not_there_is_said(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PETOOL_LITE_RUNS", str(tmp_path / "runs"))
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


@pytest.fixture
def holder(tmp_path):
    line, pipe = [sys.executable, "-c", HOLD, tmp_path / "run"], subprocess.PIPE
    with subprocess.Popen(line, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_other_process_is_named_and_a_killed_one_does_not_block(holder, tmp_path, monkeypatch) -> None:
    with pytest.raises(PetoolError) as error, locked(tmp_path / "run"):
        pass
    assert error.value.message.startswith(f"process {holder.pid} (")
    assert state(tmp_path / "run") == "running"
    with pytest.raises(PetoolError, match="is training the run"):
        find_run(str(tmp_path / "run"))
    with monkeypatch.context() as patch:  # of several processes of one training, only the first holds the lock
        patch.setenv("RANK", "1")
        with locked(tmp_path / "run"):
            pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / ".lock").exists(), "what a kill leaves"
    (tmp_path / "run" / ".rows.json.1234.draft").write_text("half")
    assert state(tmp_path / "run") == "unfinished"
    with locked(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").read_text().startswith(f"{os.getpid()} ")
    assert list((tmp_path / "run").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(PetoolError, match="cannot write to"), locked(tmp_path / "file" / "run"):
        pass


@pytest.mark.parametrize("verb", ["train", "export", "bench"])
def test_each_verb_refuses_a_run_that_another_process_writes_to(holder, tmp_path, command, verb) -> None:
    """The holder stands for another command in the run's folder; links put its lock where each verb looks."""
    run, other = tmp_path / "run", tmp_path / "other"
    for folder in (run, other):
        write_text(folder / "recipe.toml", '[data]\ntrain = "demo:train:4"\n')
    write_json(other / "manifest.json", {})
    (run / "model.q8_0.gguf").symlink_to(embedded_gguf())
    for name in ("export", "bench"):
        (other / name).symlink_to(run)
    bench = ["--run", other, "--variants", "tuned", "--data", "demo:test:2"]
    line = {"train": ["--resume", run], "export": ["--run", other], "bench": bench}[verb]
    result = command(verb, *line, cwd=tmp_path, inline=True)
    assert (result.returncode, f"process {holder.pid} (" in result.stderr) == (1, True), result.stderr
