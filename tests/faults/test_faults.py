"""kill -9 and Ctrl-C at random moments, full disks: what has a final name is whole, what fails says so in a line, and
the next command finishes the work."""

import json
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
from support import tiny_settings, wait_until
from support_faults import KILLS, begin, finish, incomplete, kill_at_random, unfinished
from support_serve import ASK, TOOLS, Server, asking

from petool_lite.inference.states import StateStore

SEED = int(os.environ.get("PETOOL_LITE_SEED", "1"))
LINES = {
    "train": ["train", "demo", "--set", "data.train=demo:train:8", "--set", "train.save_every=1"],
    "call": ["call", "Rain?", "--tools", "tools.json", "--user", "ann"],
    "simulate": ["data", "simulate", "demo:train:200", "--count", "1000", "--out", "new/made.jsonl"],
    "split": ["data", "split", "demo:train:1000", "--folds", "3", "--to", "new/folds"],
    "export": ["export", "--run", "one", "--gguf", "q8_0,q4_k_m", "--lora-gguf", "--verify", "quick"],
    "bench": ["bench", "--run", "one", "--variants", "tuned", "--data", "demo:test:6", "--decoding", "free"],
    "serve": ["serve", "--port", "0", "--context", "1024"],
}
BODY = {"messages": ASK, "tools": TOOLS, "max_tokens": 60}
faults = pytest.mark.faults


def copied(exported: Path, root: Path, *without: str) -> Path:
    """A complete run with an export, which was made on a disk with room."""
    return shutil.copytree(exported / "runs", root / "runs", ignore=shutil.ignore_patterns(*without)) / "one"


def done(root: Path, *line: object, **options) -> float:
    """Seconds that the command takes, which ends well and leaves nothing half-written."""
    started = time.monotonic()
    code, said = finish(root, *line, **options)
    assert code == 0, said
    assert incomplete(root, running=False) == []
    return time.monotonic() - started


@pytest.mark.parametrize(
    ("verb", "kills"),
    [("bench", 1), *(pytest.param(verb, KILLS, marks=faults) for verb in ("train", "export", "bench"))],
)
def test_what_is_killed_is_finished_by_the_next_command(exported, tiny, tmp_path, verb, kills) -> None:
    chance, killed, run = random.Random(SEED), 0, copied(exported, tmp_path, "bench", "export" * (verb == "export"))
    line = [*LINES[verb], *(tiny_settings(tiny) if verb == "train" else ())]
    took = done(tmp_path, *line)
    while killed < kills:
        shutil.rmtree(run / "bench", ignore_errors=True)
        left = unfinished(tmp_path)
        process = begin(tmp_path, *(["train", "--resume", left[0]] if left else line))
        hit = kill_at_random(process, tmp_path, took, chance)
        assert hit or process.returncode == 0, (tmp_path / "said").read_text()
        assert incomplete(tmp_path) == []
        killed += hit
    for rest in [["train", "--resume", run] for run in unfinished(tmp_path)] or [line]:
        done(tmp_path, *rest)
    # one killed before it had a recipe has nothing to keep
    runs = [path.parent for path in tmp_path.glob("runs/*/recipe.toml")]
    assert not [path for run in runs for path in run.rglob(".*")]
    for file in (run / "bench").glob("results-tuned*.jsonl"):
        rows = [json.loads(text)["entry_id"] for text in file.read_text().splitlines()]
        assert len(set(rows)) == len(rows) == 6
    print(f"FAULTS kill -9 in {verb}: {kills} times, {len(runs)} whole runs, {took:.1f} s alone")


@pytest.mark.parametrize("kills", [1, pytest.param(KILLS, marks=faults)])
def test_a_killed_server_leaves_no_worker_and_starts_again(exported, tmp_path, kills) -> None:
    chance, answered, port = random.Random(SEED), 0, 0  # a free port for the first, and its for those that follow
    model, users = exported / "runs" / "one" / "export" / "model.q8_0.gguf", StateStore(tmp_path / "users")
    for _ in range(kills):
        server = Server("--port", port, "--context", 1024, model=model, PETOOL_LITE_CACHE=str(tmp_path))
        port = server.port
        with asking(server, *(BODY | {"user": f"user{number}"} for number in range(4))) as answers:
            time.sleep(chance.uniform(0.0, 1.5))
            workers = [each.pid for each in psutil.Process(server.process.pid).children()]
            with server:  # which kills it
                pass
        answered += [code for code, _ in answers].count(200)
        wait_until(lambda: not any(Path(f"/proc/{each}/cmdline").exists() for each in workers), "no orphan")  # noqa: B023
        assert incomplete(tmp_path) == []
        assert all(path.stat().st_mode & 0o777 == 0o600 for path in users.root.glob("*.state"))
    with Server("--port", port, "--context", 1024, model=model, PETOOL_LITE_CACHE=str(tmp_path)) as server:
        assert server.post(BODY | {"user": "user0"})[0] == 200
        assert server.end() == 0
        assert "Traceback" not in server.said
    print(f"FAULTS kill -9 in serve: {kills} times, {answered} answers before")


@faults
@pytest.mark.parametrize("verb", [verb for verb in LINES if verb != "train"])
def test_ctrl_c_at_any_moment(exported, tmp_path, verb) -> None:
    chance, worst, run = random.Random(SEED), 0.0, copied(exported, tmp_path, "bench")
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    longest = done(tmp_path, *LINES[verb]) if verb != "serve" else 6.0
    for _ in range(KILLS):
        for made in (tmp_path / "new", run / "bench"):
            shutil.rmtree(made, ignore_errors=True)
        # it hears Ctrl-C even where the tests run in a shell's background, which ignores it
        process = begin(tmp_path, *LINES[verb], preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        time.sleep(chance.uniform(0.3, longest))
        before = sum(psutil.Process(process.pid).cpu_times()[:2])  # of this process: others do not count
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


@pytest.mark.parametrize(
    ("verb", "size"),
    [("bench", 1000), *(pytest.param("export", size, marks=faults) for size in (100_000, 10_000_000)),
     *(pytest.param("train", size, marks=faults) for size in (2_000, 200_000, 2_000_000, 10_000_000))],
)  # fmt: skip
def test_a_full_disk(exported, tiny, tmp_path, verb, size) -> None:
    """Of a training the rows, a checkpoint and the adapter are written, in this order, until a limit is met; without
    a limit the next command does the whole work."""
    line = [*LINES[verb], *(tiny_settings(tiny) if verb == "train" else ())]
    if verb != "train":
        copied(exported, tmp_path, verb)
    code, said = finish(tmp_path, *line, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
    assert incomplete(tmp_path) == []
    assert code == 1 or verb == "train", said
    if code:
        assert "Traceback" not in said, said[-3000:]
        assert [text[:6] for text in said.splitlines()].count("error:") == 1, said[-3000:]
        left = unfinished(tmp_path)
        done(tmp_path, *(["train", "--resume", left[0]] if left else line))
