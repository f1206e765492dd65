"""What fault tests share: processes killed at random moments, and the check that no final name holds half a file."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path

from petool_lite.gguf_header import check_gguf
from petool_lite.models import file_sha256

KILLS = int(os.environ.get("PETOOL_LITE_KILLS", "20"))


def begin(root: Path, *arguments: object, **options) -> subprocess.Popen:
    """Start `petool-lite ARGS` with runs and cache under `root`, what it says in root/said."""
    own = {"PETOOL_LITE_RUNS": str(root / "runs"), "PETOOL_LITE_CACHE": str(root / "cache"), "OMP_NUM_THREADS": "1"}
    env = os.environ | own | options.pop("extra", {})
    line = [sys.executable, "-m", "petool_lite", *map(str, arguments)]
    with (root / "said").open("w") as said:
        pipes = {"stdout": said, "stderr": said} | options
        return subprocess.Popen(line, cwd=root, env=env, text=True, **pipes)


def finish(root: Path, *arguments: object, **options) -> tuple[int, str]:
    """Run it to its end; the exit code and all it said, through a pipe, which no limit on files cuts off."""
    with begin(root, *arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options) as process:
        said = process.communicate(timeout=600)[0]
    return process.returncode, said


def kill_at_random(process: subprocess.Popen, root: Path, longest: float, chance: random.Random) -> bool:
    """SIGKILL within `longest` seconds, or, half of the times, just after a draft appears; False if it had ended."""
    moment = time.monotonic() + chance.uniform(0.0, longest)
    watch, delay = chance.random() < 0.5, chance.uniform(0.0, 0.05)
    known = set(root.rglob("*.draft"))
    while process.poll() is None and time.monotonic() < moment:
        time.sleep(0.005)
        if watch and time.monotonic() > moment - longest / 2 and set(root.rglob("*.draft")) - known:
            time.sleep(delay)
            break
    ended = process.poll() is not None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return not ended


def incomplete(root: Path, running: bool = True) -> list[str]:
    """Files under final names that are not whole; `running`: line logs may still have a cut last line."""
    faults = []
    for path in sorted(root.rglob("*")):
        inside = path.relative_to(root).parts
        if not path.is_file() or any(part.startswith(".") for part in inside) or path.name in ("said", "train.log"):
            continue
        try:
            check_whole(path, running)
        except Exception as error:  # whatever a reader raises
            faults.append(f"{path}: {type(error).__name__} {error}")
    return faults


def unfinished(root: Path) -> list[Path]:
    """Runs that have begun and are not complete."""
    return [path.parent for path in root.glob("runs/*/recipe.toml") if not (path.parent / "manifest.json").exists()]


def check_whole(path: Path, running: bool) -> None:
    """Parse, open or hash one file."""
    kind = path.suffix
    if kind == ".json":
        found = json.loads(path.read_text())
        for item in found["files"] if path.name == "export.json" else []:
            assert file_sha256(path.parent / item["file"]) == item["sha256"], item["file"]
    elif kind == ".jsonl":
        lines = path.read_text().splitlines()
        # written a line at a time: a kill may cut the last one, which the next command repairs
        log = path.name in ("metrics.jsonl", "eval.jsonl") or path.name.startswith("results-")
        for line in lines[:-1] if running and log else lines:
            json.loads(line)
    elif kind == ".gguf":
        check_gguf(path)
    elif kind == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, "np") as file:
            assert list(file.keys())
    elif kind == ".toml":
        tomllib.loads(path.read_text())
    elif kind == ".pt":
        assert zipfile.ZipFile(path).testzip() is None
    elif kind == ".arrow":
        from pyarrow import ipc

        assert ipc.open_stream(path.open("rb")).read_all().num_rows
    elif kind == ".html":
        assert "</html>" in path.read_text()
