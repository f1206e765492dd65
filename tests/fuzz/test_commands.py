"""Random command lines over good and bad files: a documented exit code, never a traceback, nothing half-written.

All lines of a batch run in one process, which is what makes thousands of them affordable. Verbs that would train or
serve for minutes get what they refuse, or little to do.
"""

import gzip
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support_fuzz import FACTOR
from support_published import published_rows

from petool_lite.data.openai import entry_line
from petool_lite.recipe import settings

COUNT, BATCH, SEED = 160 * FACTOR, 80, int(os.environ.get("PETOOL_LITE_SEED", "0"))
RUNNER = """
import contextlib, io, json, sys, time, traceback
from petool_lite.cli import main
for line in json.load(sys.stdin):
    print("START " + json.dumps(line), file=sys.__stdout__, flush=True)
    said, began = io.StringIO(), time.process_time()
    try:
        with contextlib.redirect_stdout(said):
            main(line, prog_name="petool-lite")
        code = 0
    except SystemExit as error:
        code = error.code
    except BaseException:
        code = traceback.format_exc()
    took = time.process_time() - began
    print("RESULT " + json.dumps([line, code, took]), file=sys.__stdout__, flush=True)
"""
ODD = ["", " ", "-1", "0", "nan", "1e999", "\x00", "9" * 400, "a\nb", "日本", "--", "%s", "../..", "/dev/null", "[red]"]


@pytest.fixture(scope="module")
def place(tmp_path_factory, exported) -> Path:
    """Good files and bad ones, and one complete run."""
    folder = tmp_path_factory.mktemp("lines")
    rows = published_rows("train", 6)
    from petool_lite.data.petoolbench import parse

    line = entry_line(parse(rows[0], "rating", "0"))
    files = {
        "rows.json": json.dumps(rows).encode(),
        "rows.jsonl": b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, rows)).encode(),
        "log.jsonl.gz": gzip.compress(json.dumps(line).encode()),
        "tools.json": json.dumps(line["tools"]).encode(),
        "history.json": json.dumps(line["messages"][:-2]).encode(),
        "twice.json": json.dumps(line["tools"] * 2).encode(),
        "mine.toml": b"[train]\nmax_steps = 1\n",
        "bad.toml": b"[train\n",
        "cut.json": json.dumps(rows).encode()[:-40],
        "half.json": json.dumps(rows).replace("Give", "\\ud800").encode(),
        "utf16.json": "[]".encode("utf-16"),
        "empty.json": b"",
        "deep.json": b"[" * 50_000,
        "noise.gguf": random.Random(0).randbytes(3000),
        "head.gguf": b"GGUF\x03\x00\x00\x00" + b"\xff" * 64,
        "results.jsonl": b'{"schema": 1}\n{',
        "number.json": b"3",
    }
    for name, raw in files.items():
        (folder / name).write_bytes(raw)
    (folder / "link.json").symlink_to("link.json")
    (folder / "folder").mkdir()
    (folder / "runs").symlink_to(exported / "runs")
    return folder


def random_line(rng: random.Random, place: Path) -> list[str]:
    names = sorted(path.name for path in place.iterdir() if not path.name.startswith("new-"))
    names += ["gone.json", "one", "runs/one", "demo:test:2", "hub:a/b", "hub:x", "2 * rows.json + demo:train:3"]
    names += ["simulated:3:demo:train:4", "simulated:2:log*", "simulated:2:*.json,tools.json", "0 * rows.json", " + "]
    keys = [name for name, *_ in settings()]

    def file() -> str:
        return rng.choice(names) if rng.random() < 0.85 else rng.choice(ODD)

    def new() -> str:
        return f"new-{rng.randrange(10**9)}.jsonl"

    def odd(*usual: str) -> str:
        return rng.choice(usual) if rng.random() < 0.7 else rng.choice(ODD)

    def overrides() -> list[str]:
        pairs = [f"{odd(*keys)}={rng.choice([file(), odd('1', 'true')])}" for _ in range(rng.randrange(3))]
        return [part for pair in pairs for part in ("--set", pair)]

    def model() -> list[str]:
        return ["--model", odd("noise.gguf", "head.gguf", "gone.gguf", "folder")]

    shapes: list[Callable[[], list[str]]] = [
        lambda: ["data", rng.choice(["check", "stats"]), file(), *(["--skip-bad"] if rng.random() < 0.5 else [])],
        lambda: ["data", "check", file(), file()],
        lambda: ["data", "preview", rng.choice(["demo", file()]), *overrides(), "--entry", odd("0", "3")],
        lambda: ["data", "split", file(), "--folds", odd("2", "3"), "--to", new()],
        lambda: ["data", "convert", file(), new(), "--skip-bad"],
        lambda: ["data", "simulate", file(), "--tools", file(), "--count", odd("2"), "--out", new()],
        lambda: ["data", "fetch", "--repo", odd("a/b"), "--file", odd("x.json")],
        lambda: ["train", rng.choice(["demo", "rating", "dpo", file()]), *overrides(), "--dry-run"],
        lambda: ["train", "--resume", file()],
        lambda: ["export", "--run", file(), "--gguf", odd("q8_1", "q4_0,", "f16;"), "--verify", "quick"],
        lambda: ["bench", "--model", file(), "--data", file(), "--limit", odd("0", "1")],
        lambda: ["rate", odd("last", "0123456789ab"), odd("liked", "disliked"), "--user", odd("ann", "bob")],
        lambda: ["history", odd("list", "export", "show", "forget", "import"), "--user", odd("ann"), odd("--json")],
        lambda: ["history", "import", file(), "--user", odd("ann")],
        lambda: ["train", "demo", "--dry-run", "--set", f"data.train=history:{odd('*', 'ann')}"],
        lambda: ["bench", rng.choice(["score", "report", "compare", "merge"]), file(), file()],
        lambda: ["call", odd("Rain?"), "--tools", file(), "--history", file(), *model()],
        lambda: ["call", odd("Rain?"), "--tools", file(), "--user", odd("ann"), "--reply-tokens", odd("4")],
        lambda: ["serve", *model(), "--port", odd("99999", "8080")],
        lambda: ["runs", rng.choice(["list", "show", "path"]), *([file()] if rng.random() < 0.5 else [])],
        lambda: ["recipes", rng.choice(["list", "show", "copy", "keys"]), *([file()] if rng.random() < 0.6 else [])],
        lambda: ["doctor", "--model", file(), *(["--tune"] if rng.random() < 0.3 else [])],
        lambda: [odd("call", "bench", "export", "nonsense"), rng.choice(["--help", "--nonsense", "-1", "--run"])],
    ]  # fmt: skip
    line = rng.choice(shapes)()
    return [*line, "--json"] if rng.random() < 0.3 else line


@pytest.mark.parametrize("number", range(COUNT // BATCH))
def test_no_command_line_ends_in_a_traceback(place, number) -> None:
    rng = random.Random(SEED * 1000 + number)
    lines = [random_line(rng, place) for _ in range(BATCH)]
    with (place.parent / "said").open("w+") as said:
        own = {"cwd": place, "env": os.environ | {"PETOOL_LITE_RUNS": "runs"}, "text": True}
        line = [sys.executable, "-c", RUNNER]
        process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=said, stderr=said, **own)
        try:
            process.communicate(json.dumps(lines), timeout=1200)
        finally:
            process.kill()
            told = Path(said.name).read_text(errors="replace")
    results = [json.loads(text[7:]) for text in told.splitlines() if text.startswith("RESULT ")]
    assert len(results) == BATCH, f"it ended, or hangs, at {lines[len(results)]}: {told[-2000:]}"
    for line, code, took in results:
        assert code in (0, 1, 2, 3), f"{line}: {code}"
        assert took < 60, f"{line} took {took:.0f} s of CPU time"
    assert "Traceback" not in told
    assert not [path for path in place.rglob(".*.draft")], "something half-written is left"
    refused = sum(code != 0 for _, code, _ in results)
    assert BATCH * 0.3 < refused < BATCH, "good lines and bad ones"
