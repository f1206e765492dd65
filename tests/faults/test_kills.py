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
from support_faults import children
from support import tiny_settings, wait_until
from support_faults import KILLS, begin, finish, incomplete, kill_at_random

from petool_lite.inference.states import StateStore

SEED = int(os.environ.get("PETOOL_LITE_SEED", "1"))
STEPS = ["--set", "data.train=demo:train:8", "--set", "train.save_every=1"]
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


@pytest.mark.faults
def test_training(tiny, tmp_path) -> None:
    chance, killed, finished = random.Random(SEED), 0, 0
    started = time.monotonic()
    command = ["train", "demo", *tiny_settings(tiny), *STEPS]
    code, said = finish(tmp_path, *command)
    assert code == 0, said
    whole = time.monotonic() - started
    while killed < KILLS:
        open_runs = [
            path.parent for path in tmp_path.glob("runs/*/recipe.toml") if not (path.parent / "manifest.json").exists()
        ]
        line = ["train", "--resume", open_runs[0]] if open_runs else command
        survived = run_or_kill(tmp_path, line, whole, chance)
        killed, finished = killed + (not survived), finished + survived
    for path in list(tmp_path.glob("runs/*/recipe.toml")):
        if not (path.parent / "manifest.json").exists():
            code, said = finish(tmp_path, "train", "--resume", path.parent)
            assert code == 0, said
            finished += 1
    assert incomplete(tmp_path, running=False) == []
    for run in {path.parent for path in tmp_path.glob("runs/*/recipe.toml")}:  # one killed before has nothing to keep
        assert not list(run.glob("**/.*"))
    runs = len(list(tmp_path.glob("runs/*/manifest.json")))
    told("train", kills=killed, finished_afterwards=finished, complete_runs=runs, seconds_whole=round(whole, 1))


@pytest.mark.faults
def test_export(exported, tmp_path) -> None:
    chance, killed, finished = random.Random(SEED), 0, 0
    shutil.copytree(exported / "runs", tmp_path / "runs", ignore=shutil.ignore_patterns("bench"))
    shutil.rmtree(tmp_path / "runs" / "one" / "export")
    command = ["export", "--run", "one", "--gguf", "q8_0,q4_k_m", "--lora-gguf", "--verify", "quick"]
    started = time.monotonic()
    assert finish(tmp_path, *command)[0] == 0
    whole = time.monotonic() - started
    while killed < KILLS:
        survived = run_or_kill(tmp_path, command, whole, chance)
        killed, finished = killed + (not survived), finished + survived
    code, said = finish(tmp_path, *command)
    assert code == 0, said
    assert incomplete(tmp_path, running=False) == []
    assert not list((tmp_path / "runs" / "one" / "export").glob(".*"))
    told("export", kills=killed, finished_afterwards=finished + 1, seconds_whole=round(whole, 1))


def bench_kills(exported, root: Path, kills: int) -> None:
    chance, killed, finished = random.Random(SEED), 0, 0
    shutil.copytree(exported / "runs", root / "runs", ignore=shutil.ignore_patterns("bench"))
    command = ["bench", "--run", "one", "--variants", "tuned", *DATA]
    started = time.monotonic()
    code, said = finish(root, *command)
    assert code == 0, said
    whole = time.monotonic() - started
    while killed < kills:
        shutil.rmtree(root / "runs" / "one" / "bench")
        attempts = chance.randint(1, 3)
        for _ in range(attempts):
            killed += not run_or_kill(root, command, whole, chance)
        code, said = finish(root, *command)
        assert code == 0, said
        finished += 1
        assert incomplete(root, running=False) == []
        rows = next((root / "runs" / "one" / "bench").glob("results-tuned*.jsonl")).read_text().splitlines()
        assert len({json.loads(row)["entry_id"] for row in rows}) == len(rows) == 6
    told("bench", kills=killed, finished_afterwards=finished, seconds_whole=round(whole, 1))


def test_a_killed_bench_is_finished_by_the_next(exported, tmp_path) -> None:
    bench_kills(exported, tmp_path, 1)


@pytest.mark.faults
def test_bench(exported, tmp_path) -> None:
    bench_kills(exported, tmp_path, KILLS)


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


def serve_kills(exported, root: Path, kills: int) -> None:
    chance, answered = random.Random(SEED), 0
    model = next((exported / "runs" / "one" / "export").glob("model.*.gguf"))
    port = 0  # a free one for the first, and its for those that follow
    users = StateStore(root / "cache" / "users")
    for number in range(kills + 1):
        process = begin(root, "serve", "--model", model, "--port", port, "--context", "1024")
        port = ready(process, root / "said")
        if number == kills:
            break
        results: list[int] = []
        callers = [
            threading.Thread(target=lambda n=n, port=port, results=results: results.append(ask(port, f"user{n}")))
            for n in range(4)
        ]
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
        assert incomplete(root) == []
        assert all(path.stat().st_mode & 0o777 == 0o600 for path in users.root.glob("*.state"))
    assert ask(port, "user0") == 200
    said = (root / "said").read_text()
    assert re.search("Traceback", said) is None, said
    process.send_signal(signal.SIGINT)
    assert process.wait(100) == 0
    told("serve", kills=kills, starts_afterwards=kills, answers_before_a_kill=answered)


def test_a_killed_server_leaves_no_worker_and_starts_again(exported, tmp_path) -> None:
    serve_kills(exported, tmp_path, 1)


@pytest.mark.faults
def test_serve(exported, tmp_path) -> None:
    serve_kills(exported, tmp_path, KILLS)
