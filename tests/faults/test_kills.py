"""kill -9 at random moments: what has a final name is whole, and the next command finishes the work."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from serve_load import children
from support import tiny_settings, wait_until
from support_faults import KILLS, begin, finish, incomplete, kill_at_random, unfinished

from petool_lite.inference.states import StateStore

SEED = int(os.environ.get("PETOOL_LITE_SEED", "1"))
STEPS = ["--set", "data.train=demo:train:8", "--set", "train.save_every=1"]
EACH = [1, pytest.param(KILLS, marks=pytest.mark.faults)]
DATA = ["--data", "demo:test:6", "--decoding", "free", "--limit", "6"]


def told(what: str, **figures: object) -> None:
    print(f"FAULTS {what}: " + ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in figures.items()))


def run_or_kill(root: Path, command: list[object], longest: float, chance: random.Random) -> bool:
    """Start a command and kill it at random; whether it came to its end before. No half file is left either way."""
    process = begin(root, *command)
    survived = not kill_at_random(process, root, longest, chance)
    assert not survived or process.returncode == 0, (root / "said").read_text()
    assert incomplete(root) == []
    return survived


def whole_in(root: Path, command: list[object]) -> float:
    """Seconds that the command takes, which ends well and leaves nothing half-written."""
    started = time.monotonic()
    code, said = finish(root, *command)
    assert code == 0, said
    assert incomplete(root, running=False) == []
    return time.monotonic() - started


@pytest.mark.faults
def test_training(tiny, tmp_path) -> None:
    chance, killed = random.Random(SEED), 0
    command = ["train", "demo", *tiny_settings(tiny), *STEPS]
    whole = whole_in(tmp_path, command)
    while killed < KILLS:
        left = unfinished(tmp_path)
        killed += not run_or_kill(tmp_path, ["train", "--resume", left[0]] if left else command, whole, chance)
    for run in unfinished(tmp_path):
        whole_in(tmp_path, ["train", "--resume", run])
    runs = [path.parent for path in tmp_path.glob("runs/*/recipe.toml")]  # one killed before has nothing to keep
    assert not [path for run in runs for path in run.glob("**/.*")]
    told("train", kills=killed, complete_runs=len(runs), seconds_whole=round(whole, 1))


@pytest.mark.faults
def test_export(exported, tmp_path) -> None:
    chance, killed = random.Random(SEED), 0
    shutil.copytree(exported / "runs", tmp_path / "runs", ignore=shutil.ignore_patterns("bench", "export"))
    command = ["export", "--run", "one", "--gguf", "q8_0,q4_k_m", "--lora-gguf", "--verify", "quick"]
    whole = whole_in(tmp_path, command)
    while killed < KILLS:
        killed += not run_or_kill(tmp_path, command, whole, chance)
    whole_in(tmp_path, command)
    assert not list((tmp_path / "runs" / "one" / "export").glob(".*"))
    told("export", kills=killed, seconds_whole=round(whole, 1))


@pytest.mark.parametrize("kills", EACH)
def test_a_killed_bench_is_finished_by_the_next(exported, tmp_path, kills) -> None:
    chance, killed = random.Random(SEED), 0
    shutil.copytree(exported / "runs", tmp_path / "runs", ignore=shutil.ignore_patterns("bench"))
    command = ["bench", "--run", "one", "--variants", "tuned", *DATA]
    whole = whole_in(tmp_path, command)
    while killed < kills:
        shutil.rmtree(tmp_path / "runs" / "one" / "bench")
        for _ in range(chance.randint(1, 3)):
            killed += not run_or_kill(tmp_path, command, whole, chance)
        whole_in(tmp_path, command)
        rows = next((tmp_path / "runs" / "one" / "bench").glob("results-tuned*.jsonl")).read_text().splitlines()
        assert len({json.loads(row)["entry_id"] for row in rows}) == len(rows) == 6
    told("bench", kills=killed, seconds_whole=round(whole, 1))


TOOLS = [{"type": "function", "function": {"name": "get", "parameters": {"properties": {"a": {"type": "string"}}}}}]


def ask(port: int, user: str) -> int:
    body = {"messages": [{"role": "user", "content": "x"}], "tools": TOOLS, "user": user, "max_tokens": 60}
    address = f"http://127.0.0.1:{port}/v1/chat/completions"
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=250) as answer:
            return answer.status
    except OSError:
        return 0


def ready(process: subprocess.Popen, said: Path) -> int:
    """The port of a server that has started."""
    wait_until(lambda: "(Ctrl-C ends)" in said.read_text() or process.poll() is not None, "the server is ready")
    found = re.search(r"http://127\.0\.0\.1:(\d+)", said.read_text())
    assert found, said.read_text()
    return int(found[1])


@pytest.mark.parametrize("kills", EACH)
def test_a_killed_server_leaves_no_worker_and_starts_again(exported, tmp_path, kills) -> None:
    chance, answered = random.Random(SEED), 0
    model = next((exported / "runs" / "one" / "export").glob("model.*.gguf"))
    port = 0  # a free one for the first, and its for those that follow
    users = StateStore(tmp_path / "cache" / "users")
    for number in range(kills + 1):
        process = begin(tmp_path, "serve", "--model", model, "--port", port, "--context", "1024")
        port = ready(process, tmp_path / "said")
        if number == kills:
            break
        results: list[int] = []

        def call(number: int, port: int = port, results: list[int] = results) -> None:
            results.append(ask(port, f"user{number}"))

        callers = [threading.Thread(target=call, args=(number,)) for number in range(4)]
        for caller in callers:
            caller.start()
        time.sleep(chance.uniform(0.0, 1.5))
        workers = children(process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for caller in callers:
            caller.join()
        answered += results.count(200)
        wait_until(lambda: not any(Path(f"/proc/{worker}/cmdline").exists() for worker in workers), "no orphan")  # noqa: B023
        assert incomplete(tmp_path) == []
        assert all(path.stat().st_mode & 0o777 == 0o600 for path in users.root.glob("*.state"))
    assert ask(port, "user0") == 200
    said = (tmp_path / "said").read_text()
    assert re.search("Traceback", said) is None, said
    process.send_signal(signal.SIGINT)
    assert process.wait(100) == 0
    told("serve", kills=kills, starts_afterwards=kills, answers_before_a_kill=answered)
