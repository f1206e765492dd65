"""Ctrl-C at random moments: over after two seconds of work at the most, in words, and nothing half-written is left."""

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from support import wait_until
from support_faults import KILLS, begin, finish, incomplete

SEED = int(os.environ.get("PETOOL_LITE_SEED", "1"))
TOOLS = '[{"name": "get", "parameters": {"properties": {"a": {"type": "string"}}}}]'
LINES = {
    "call": ["call", "Rain?", "--tools", "tools.json", "--user", "ann"],
    "simulate": ["data", "simulate", "demo:train:200", "--count", "1000", "--out", "new/made.jsonl"],
    "split": ["data", "split", "demo:train:1000", "--folds", "3", "--to", "new/folds"],
    "export": ["export", "--run", "one", "--gguf", "q8_0,q4_k_m", "--lora-gguf", "--verify", "quick"],
    "bench": ["bench", "--run", "one", "--variants", "tuned", "--data", "demo:test:6", "--decoding", "free"],
    "serve": ["serve", "--port", "0", "--context", "1024"],
}


def seconds(process: int) -> float:
    """CPU seconds of a process so far: other programs on the machine do not count."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def begun(root: Path, verb: str) -> subprocess.Popen:
    """The command, which hears Ctrl-C even where the tests run in a shell's background, which ignores it."""
    return begin(root, *LINES[verb], preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def whole_seconds(root: Path, verb: str) -> float:
    started = time.monotonic()
    if verb != "serve":
        code, said = finish(root, *LINES[verb])
        assert code == 0, said
        return time.monotonic() - started
    process = begun(root, verb)
    wait_until(lambda: "(Ctrl-C ends)" in (root / "said").read_text() or process.poll() is not None, "it serves")
    took = time.monotonic() - started
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    return 2 * took


@pytest.mark.faults
@pytest.mark.parametrize("verb", LINES)
def test_ctrl_c_at_any_moment(exported, tmp_path, verb) -> None:
    chance = random.Random(SEED)
    shutil.copytree(exported / "runs", tmp_path / "runs", ignore=shutil.ignore_patterns("bench"))
    (tmp_path / "tools.json").write_text(TOOLS)
    longest, worst = whole_seconds(tmp_path, verb), 0.0
    for _ in range(KILLS):
        for made in (tmp_path / "new", tmp_path / "runs" / "one" / "bench"):
            shutil.rmtree(made, ignore_errors=True)
        process = begun(tmp_path, verb)
        time.sleep(chance.uniform(0.3, longest))
        before = seconds(process.pid)
        os.kill(process.pid, signal.SIGINT)  # not send_signal, which would take the result of one that has ended
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = code = os.waitstatus_to_exitcode(status)
        said = (tmp_path / "said").read_text()
        # the last is how Python itself ends, before and after the command
        assert (code in (0, 130, -signal.SIGINT), "Traceback" in said) == (True, False), said
        worst = max(worst, used.ru_utime + used.ru_stime - before)
        assert incomplete(tmp_path) == []
        assert not [*tmp_path.rglob("*.draft")]
    assert worst < 2, f"{worst:.1f} s of work after Ctrl-C"
    print(f"FAULTS Ctrl-C in {verb}: {KILLS} times, at most {worst:.2f} s of work afterwards")
