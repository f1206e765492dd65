"""A run killed with SIGKILL and continued, beside one that nothing disturbed: are the weights equal to the last bit?

    python -m petool_lite.bench.kill_resume DATA [--methods lora,full] [--recipe smol-rating] [--set KEY=VALUE ...]

DATA is a file of entries. For each method one JSON line: whether the files of weights are equal, the largest
difference, both runs' losses, and the same of two undisturbed runs (where those differ, the arithmetic does, and the
third run cannot be equal; so train.deterministic is on). The test suite does this on a CPU; this is for a GPU.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from petool_lite.console import print_json, say
from petool_lite.runs import TRAINED

_PLAIN = ("data.counterfactual=false", "data.history_queries=0", "data.renamed_copies=0", "data.described_queries=0")
_WAYS: dict[str, tuple[str, ...]] = {"lora": (), "full": ("train.method=full", "train.learning_rate=3e-4")}
_STEPS, _SAVED, _KILLED = 10, 5, 7


def _line(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "petool_lite", "train", *arguments]


def trained(root: Path, arguments: Sequence[str]) -> Path:
    """Train to the end under `root`; the run's folder."""
    environment = os.environ | {"PETOOL_LITE_RUNS": str(root)}
    done = subprocess.run([*_line(arguments), "--json"], env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return Path(json.loads(done.stdout)["run"])


def killed(root: Path, arguments: Sequence[str], seconds: float) -> tuple[Path, int]:
    """Start a run and kill it as soon as step 7 is written; its folder and the last step that was."""
    root.mkdir()
    limit = time.monotonic() + seconds
    with (root / "log").open("w") as log:
        process = subprocess.Popen(
            _line(arguments), env=os.environ | {"PETOOL_LITE_RUNS": str(root)}, stdout=log, stderr=log
        )
        while True:
            found = next(iter(root.glob("*/metrics.jsonl")), None)
            rows = found.read_text().splitlines() if found else []
            if found and len(rows) >= _KILLED:
                process.kill()
                process.wait()
                return found.parent, len(found.read_text().splitlines())
            if process.poll() is not None or time.monotonic() > limit:
                process.kill()
                sys.exit("not killed in time:\n" + (root / "log").read_text()[-3000:])
            time.sleep(0.002)


def compared(one: Path, other: Path, name: str) -> dict[str, Any]:
    """Whether the weights of two runs are the same bytes, and the largest difference of their tensors."""
    from safetensors.torch import load_file

    files = sorted(path.name for path in (one / name).glob("*.safetensors"))
    largest = 0.0
    for file in files:
        mine, theirs = load_file(one / name / file), load_file(other / name / file)
        largest = max([largest, *(float((mine[key].float() - theirs[key].float()).abs().max()) for key in mine)])
    same = all((one / name / file).read_bytes() == (other / name / file).read_bytes() for file in files)
    return {"equal": bool(files) and same, "largest_difference": largest}


def losses(run: Path) -> list[float]:
    """The loss of each step."""
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def main() -> None:
    """Compare each method of the command line; one JSON line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--recipe", default="smol-rating")
    parser.add_argument("--methods", default="lora,full")
    parser.add_argument("--limit", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=600.0, help="for reaching the step to kill at")
    parser.add_argument("--set", action="append", default=[], dest="extra", metavar="KEY=VALUE")
    options = parser.parse_args()
    for method in options.methods.split(","):
        settings = [f"data.train={options.data}", f"data.limit={options.limit}", f"train.max_steps={_STEPS}"]
        settings += [f"train.save_every={_SAVED}", "train.deterministic=true", *_PLAIN, *_WAYS[method], *options.extra]
        arguments = [options.recipe, *(part for setting in settings for part in ("--set", setting))]
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            first, again = trained(root / "a", arguments), trained(root / "b", arguments)
            run, last = killed(root / "c", arguments, options.seconds)
            say(f"{method}: killed after step {last}")
            continued = trained(root / "c", ["--resume", str(run)])
            manifest = json.loads((first / "manifest.json").read_text())
            print_json(
                {"benchmark": "kill_resume", "method": method, "killed_after": last, "device": manifest["device"]}
                | compared(first, continued, TRAINED[method])
                | {"losses_equal": losses(first) == losses(continued), "losses": losses(continued)}
                | {"undisturbed_twice": compared(first, again, TRAINED[method])}
            )


if __name__ == "__main__":
    main()
