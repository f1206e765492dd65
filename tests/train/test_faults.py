"""A run survives signals and kills, goes on as if nothing had been, and stops at numbers that are not."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import ended, held_after, options, own_runs, rows_of, start, tiny_settings, wait_until

from petool_lite.data.demo import generate
from petool_lite.data.files import write_lines
from petool_lite.errors import PetoolError
from petool_lite.models import Base
from petool_lite.prompt.prepare import Prepared
from petool_lite.recipe import load_recipe
from petool_lite.train.records import check_resume, start_facts

STUBBORN = """
import time
from petool_lite.train.devices import stop_signals
with stop_signals() as stop:
    with stop.between_steps():
        print("ready", flush=True)
        time.sleep(100)
"""


@pytest.fixture(scope="module")
def interrupted(tiny, command, tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """Stopped by SIGTERM, killed after step 5, continued to the end, evaluated on the way; and what each said."""
    root = tmp_path_factory.mktemp("interrupted")
    called = [row for row in generate("test", 20) if "tool_calls" in row["messages"][-1]]
    write_lines(root / "held.jsonl", called[:2])
    overrides = options("train.eval_every=6", "bench.max_reply_tokens=3", "train.early_stop=9")
    overrides += options(f"train.eval_data={root / 'held.jsonl'}")
    said = {"stopped": ""}
    process = held_after(1, root, "demo", *tiny_settings(tiny), *overrides)
    process.send_signal(signal.SIGTERM)
    while "finishing this step" not in said["stopped"]:
        line = process.stderr.readline()
        assert line, said["stopped"]
        said["stopped"] += line
    print(file=process.stdin, flush=True)
    said["stopped"] += ended(process)
    run = next(root.glob("runs/*"))

    process = held_after(6, root, "--resume", run)
    process.send_signal(signal.SIGKILL)
    ended(process)
    assert ((run / "checkpoints" / "checkpoint-5").is_dir(), len(rows_of(run))) == (True, 6)
    half = run / "checkpoints" / ".checkpoint-10.draft" / "checkpoint-10"  # as a kill in the middle of a save leaves it
    shutil.copytree(run / "checkpoints" / "checkpoint-5", half)
    (half / "optimizer.pt").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    exported = command("export", "--run", run, cwd=root, inline=True)
    said["unfinished"] = f"{exported.stderr}exit {exported.returncode}"

    last = command("train", "--resume", run, cwd=root, env=own_runs(root))
    said["last"] = f"{last.stderr}exit {last.returncode}"
    return run, said


def test_it_ends_with_the_very_numbers_of_an_uninterrupted_run(trained, interrupted) -> None:
    from safetensors.torch import load_file

    run, said = interrupted
    assert said["last"].endswith("exit 0"), said["last"]
    for key in ("step", "loss", "grad_norm", "learning_rate", "tokens"):
        assert [row[key] for row in rows_of(run)] == [row[key] for row in rows_of(trained)], key
    whole, resumed = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (trained, run))
    assert whole.keys() == resumed.keys()
    assert all((whole[name] == resumed[name]).all() for name in whole)


def test_every_ending_says_what_to_do(interrupted) -> None:
    run, said = interrupted
    assert "SIGTERM: finishing this step" in said["stopped"]
    assert "stopped by SIGTERM after step 1 of 10" in said["stopped"]
    assert f"petool-lite train --resume {run}" in said["stopped"].replace("\n", "")
    assert said["stopped"].endswith("exit 143")
    assert "not finished" in said["unfinished"]
    assert "removing the half-written checkpoint-10" in said["last"]
    assert "lines after step 5 cut" in said["last"]
    assert not any("Traceback" in text for text in said.values())
    assert {path.name for path in (run / "checkpoints").glob("*-*")} == {"checkpoint-5", "checkpoint-10"}
    scores, manifest = rows_of(run, "eval.jsonl"), json.loads((run / "manifest.json").read_text())
    assert [(score["step"], score["n"]) for score in scores] == [(6, 2), (10, 2)], "recorded once"
    assert manifest["adapter_step"] == manifest["evaluation"]["best"]["step"] == 10  # of equals the last


def test_ctrl_c_before_the_first_step_leaves_nothing(tiny, tmp_path) -> None:
    process = start(tmp_path, "-m", "petool_lite", "train", "demo", *tiny_settings(tiny))
    wait_until(lambda: any(tmp_path.glob("runs/*/resume.json")) or process.poll() is not None, "the run begins")
    process.send_signal(signal.SIGINT)  # while the libraries are imported, which takes seconds
    said = ended(process)
    assert (process.returncode, "before the first step" in said) == (130, True), said
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_run_goes_on_with_what_it_was_started_with_alone(tiny, tmp_path, monkeypatch) -> None:
    """Any other base, configuration, data, version or number of processes is named."""
    base = Base("tiny", Path(shutil.copytree(tiny, tmp_path / "base")), None)
    weights, config = (base.directory / name for name in ("model.safetensors", "config.json"))
    held_out, run, cached = (tmp_path / name for name in ("held-out.jsonl", "run", "rows"))
    held_out.write_text("one\n")
    cached.write_text("")
    run.mkdir()
    rows = Prepared(SimpleNamespace(cache_files=[{"filename": cached}]), {}, (), "a" * 64)

    def refusal(*settings: str, **versions: str) -> str:
        asked = ["train.eval_every=5", f"train.eval_data={held_out}", *settings]
        now = json.loads(json.dumps(start_facts(load_recipe("demo", asked)[1], base, rows)))
        now["versions"] |= versions
        try:
            check_resume(run, now)
        except PetoolError as error:
            return error.message
        return ""

    assert refusal() == "", "killed before its first checkpoint: nothing to contradict"
    assert refusal("train.save_every=3", "bench.data=demo:test:9") == ""
    assert refusal("lora.dropout=0.2").endswith("started with something else: recipe lora.dropout was 0.0, is 0.2")
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        assert refusal().endswith("something else: run processes was 1, is 2")
    assert "versions other was absent, is 1.15.0" in refusal(other="1.15.0")
    held_out.write_text("two\n")
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    for told in ("xxh3 of model.safetensors was", "sha256 of config.json was", "sha256 of train.eval_data was"):
        assert told in refusal()


def test_only_the_rows_of_the_bad_micro_batch_are_named() -> None:
    import torch
    from transformers import Trainer

    from petool_lite.train.records import Guarded

    assert hasattr(Trainer, "_get_grad_norm"), "what it calls between the losses and the update"
    base = {"state": SimpleNamespace(global_step=4), "_get_grad_norm": lambda *_, **more: torch.tensor(torch.nan)}
    trainer, rows = type("Trainer", (Guarded, type("Base", (), base)), {})(), (("a", "b"), ("c", "d"), ("e",))
    for losses, reached, named in (
        ((1.0, 1.0, 1.0), (1.0, torch.inf, torch.inf), "c, d"),  # a finite loss, its gradient not
        ((1.0, 1.0, 1.0), (1.0, 2.0, 3.0), "a, b, c, d, e"),  # only the clipped norm overflowed
    ):
        trainer.update = tuple(zip(rows, map(torch.tensor, losses), map(torch.tensor, reached), strict=True))
        with pytest.raises(PetoolError, match=f"step 5.*entries {named}$"):
            trainer._get_grad_norm(None)


def test_the_first_signal_waits_and_the_second_ends_at_once() -> None:
    number, line = signal.SIGINT, [sys.executable, "-c", STUBBORN]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        said = process.stderr.readline() + process.stderr.readline()  # until then a second one would be lost in it
        assert "once more leaves at once" in said
        assert process.poll() is None
        process.send_signal(number)
        assert process.wait(100) == -number
