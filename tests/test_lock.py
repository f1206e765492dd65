"""Two commands on one folder: one line that names the other; a killed one holds nothing."""

import os
import signal
import subprocess
import sys

import pytest

from petool_lite.errors import PetoolError
from petool_lite.models import embedded_gguf
from petool_lite.runs import locked

HOLD = """
import sys
from pathlib import Path
from petool_lite.runs import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


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
    assert str(tmp_path / "run") in error.value.message
    with monkeypatch.context() as patch:  # of several processes of one training, only the first holds the lock
        patch.setenv("RANK", "1")
        with locked(tmp_path / "run"):
            pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / ".lock").exists(), "what a kill leaves"
    with locked(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").read_text().startswith(f"{os.getpid()} ")
    assert list((tmp_path / "run").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_said(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PetoolError, match="cannot write to"), locked(tmp_path / "file" / "run"):
        pass


@pytest.mark.parametrize("verb", ["train", "export", "bench"])
def test_each_verb_refuses_a_run_that_another_process_writes_to(holder, tmp_path, command, verb) -> None:
    """The holder stands for another command in the run's folder; links put its lock where each verb looks."""
    run, other = tmp_path / "run", tmp_path / "other"
    other.mkdir()
    for folder in (run, other):
        (folder / "recipe.toml").write_text('[data]\ntrain = "demo:train:4"\n')
    (other / "manifest.json").write_text("{}")
    (run / "model.q8_0.gguf").symlink_to(embedded_gguf())
    for name in ("export", "bench"):
        (other / name).symlink_to(run)
    bench = ["--run", other, "--variants", "tuned", "--data", "demo:test:2"]
    line = {"train": ["--resume", run], "export": ["--run", other], "bench": bench}[verb]
    result = command(verb, *line, cwd=tmp_path)
    assert (result.returncode, f"process {holder.pid} (" in result.stderr) == (1, True), result.stderr
