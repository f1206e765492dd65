"""Results files: kept through kill -9 and Ctrl-C, continued, repaired, refused where they are of other work."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from petool_lite.bench.engines import GpuEngine
from petool_lite.bench.run import Task, generate_results
from petool_lite.bench.store import new_meta, open_store
from petool_lite.bench.variants import GPU, Variant, rule_variants

from petool_lite.console import silent
from petool_lite.data.files import load_dataset
from petool_lite.errors import PetoolError

TIMES = ("prefill_s", "decode_s", "seconds", "cold", "cached_tokens")
DATA = "demo:test:10"


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def plain(rows: list[dict]) -> list[dict]:
    """Rows in the order of the data, without what no two runs share."""
    return sorted(({key: row[key] for key in row if key not in TIMES} for row in rows), key=lambda row: row["index"])


def task_of(count: int = 4, reply: int = 24, **changes) -> Task:
    return Task(load_dataset(DATA, "rating", count), "rating", reply, count, **changes)


def bench_line(model: Path, out: Path, *more: str) -> list[str]:
    line = [sys.executable, "-m", "petool_lite", "bench", "--model", str(model), "--out", str(out)]
    return [*line, "--variants", "base", "--style", "compact", "--decoding", "free", *more]


@pytest.fixture(scope="module")
def whole(tiny_files, tmp_path_factory) -> Path:
    """The results of an undisturbed command over 10 entries."""
    out = tmp_path_factory.mktemp("whole")
    result = subprocess.run(bench_line(tiny_files["f16"], out, "--data", DATA), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return out / f"results-{tiny_files['f16'].stem}.jsonl"


# petool-lite, waiting while its fourth entry is generated
HELD = """
import sys
from petool_lite.cli import main
from petool_lite.inference.llama import LlamaModel
generate, calls = LlamaModel.generate, []
def held(*arguments, **options):
    calls.append(1)
    if len(calls) == 4:
        print("in flight", flush=True)
        sys.stdin.read()
    return generate(*arguments, **options)
LlamaModel.generate = held
main(sys.argv[1:])
"""


def listens_to_ctrl_c() -> None:
    """Shells start background jobs with Ctrl-C ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_bench_loses_the_entry_in_flight_and_goes_on(whole, tiny_files, tmp_path, stop) -> None:
    line, path = bench_line(tiny_files["f16"], tmp_path, "--data", DATA), tmp_path / whole.name
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    held = [line[0], "-c", HELD, *line[line.index("bench") :]]
    process = subprocess.Popen(held, text=True, preexec_fn=listens_to_ctrl_c, **pipes)
    assert process.stdout.readline() == "in flight\n", process.stderr.read()
    process.send_signal(stop)
    _, told = process.communicate(timeout=250)
    kept = rows_of(path)
    assert len(kept) == 3
    if stop == signal.SIGINT:
        assert (process.returncode, "the same command goes on from here" in told) == (130, True), told
    meta = json.loads(path.with_name(path.name.replace(".jsonl", ".meta.json")).read_text())
    assert (meta["complete"], meta["entries"]) == (False, 10)

    again = subprocess.run(line, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert f"{len(kept)} of 10 entries are there already" in again.stderr
    rows = rows_of(path)
    assert rows[: len(kept)] == kept, "no row was made again"
    assert plain(rows) == plain(rows_of(whole))
    meta = json.loads(path.with_name(path.name.replace(".jsonl", ".meta.json")).read_text())
    assert meta["complete"]
    assert meta["peak_memory_gb"] > 0


def test_a_cut_last_line_is_repaired_and_told_and_engine_failures_are_tried_again(whole, tiny_files, tmp_path) -> None:
    path = tmp_path / whole.name
    meta = whole.with_name(whole.name.replace(".jsonl", ".meta.json"))
    lines = whole.read_text().split("\n")[:-1]
    broken = json.loads(lines[2]) | {"status": "engine_error", "error": "it broke", "reply": "", "reply_tokens": 0}
    path.write_text("\n".join([*lines[:2], json.dumps(broken), *lines[3:8], lines[8][:200]]))
    (tmp_path / meta.name).write_text(meta.read_text())
    result = subprocess.run(bench_line(tiny_files["f16"], tmp_path, "--data", DATA), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "its last line was cut off" in result.stderr
    assert "1 failures of the engine are tried again" in result.stderr
    assert plain(rows_of(path)) == plain(rows_of(whole))


def test_a_finished_bench_loads_nothing_and_fresh_starts_over(tmp_path) -> None:
    rule = rule_variants(["rule-first"])[0]
    target = tmp_path / "results-rule-first.jsonl"
    said: list[str] = []

    def report(stage: str, done: int, total: int, note: str) -> None:
        said.append(stage)

    generate_results(rule, task_of(), target, GpuEngine(), report)
    first = target.read_bytes()
    generate_results(rule, task_of(), target, GpuEngine(), report)
    assert (target.read_bytes(), said[-1]) == (first, "results-rule-first.jsonl: all 4 entries are there already")
    generate_results(rule, task_of(6), target, GpuEngine(), report)
    assert target.read_bytes().startswith(first)
    assert len(rows_of(target)) == 6
    with pytest.raises(PetoolError, match="has 2 rows that this command does not ask for, such as entry 4"):
        generate_results(rule, task_of(), target, GpuEngine(), report)
    generate_results(rule, task_of(fresh=True), target, GpuEngine(), report)
    assert len(rows_of(target)) == 4


def test_results_of_other_work_are_refused_by_name(tiny_files, tmp_path) -> None:
    engine, target = GpuEngine(), tmp_path / "results-x.jsonl"
    variant = Variant("x", tiny_files["f16"], "compact")
    generate_results(variant, task_of(2, 2), target, engine, silent)
    before = target.read_bytes()
    other = Task(load_dataset("demo:test:13", "rating", 2), "rating", 2, 2)
    cases = [
        (variant, other, "another data set: demo:test:10, not demo:test:13"),
        (replace(variant, style="published"), task_of(2, 2), "another prompt style: compact, not published"),
        (replace(variant, model=tiny_files["q4_k_m"]), task_of(2, 2), "another model: .*f16.gguf, not .*q4_k_m.gguf"),
        (variant, task_of(2, 3), "another reply limit: 2, not 3"),
        (replace(variant, decoding="constrained"), task_of(2, 2), "another decoding: free, not constrained"),
        (variant, task_of(2, 2, shard=(0, 2)), "another shard"),
    ]
    for changed, task, words in cases:
        with pytest.raises(PetoolError, match=words) as caught:
            generate_results(changed, task, target, engine, silent)
        assert "--fresh" in caught.value.hint
    assert target.read_bytes() == before
    (tmp_path / "results-x.meta.json").unlink()
    with pytest.raises(PetoolError, match="says what it was made from"):
        generate_results(variant, task_of(2, 2), target, engine, silent)


def test_a_folder_of_other_data_is_refused_before_the_work(tmp_path) -> None:
    from petool_lite.bench import bench

    first, second = rule_variants(["rule-first", "rule-liked"])
    bench([first], task_of(2), tmp_path)
    other = Task(load_dataset("demo:test:13", "rating", 2), "rating", 2, 2)
    with pytest.raises(PetoolError, match="was made from other data: demo:test:10, not demo:test:13"):
        bench([second], other, tmp_path)
    assert not (tmp_path / "results-rule-liked.jsonl").exists()


def test_two_commands_do_not_write_one_file(tmp_path) -> None:
    rule, target = rule_variants(["rule-first"])[0], tmp_path / "results-rule-first.jsonl"
    meta = new_meta({"variant": "rule-first"})
    words = rf"process {os.getpid()} \(.*\) is writing to .*/results-rule-first\.jsonl"
    with open_store(target, meta, set(), False, silent), pytest.raises(PetoolError, match=words):
        generate_results(rule, task_of(), target, GpuEngine(), silent)
    assert {path.name for path in tmp_path.iterdir()} == {target.name, "results-rule-first.meta.json"}, "no lock stays"


def test_data_that_cannot_be_scored_is_refused_before_anything_is_written(tmp_path, command) -> None:
    from petool_lite.data.files import raw_rows

    entries = raw_rows(DATA)[:3]
    (tmp_path / "twice.json").write_text(json.dumps([entries[0], entries[1], entries[0]]))
    bare = {key: value for key, value in entries[1].items() if key != "api_call_ground_truth"}
    (tmp_path / "bare.json").write_text(json.dumps([entries[0], bare]))
    from petool_lite.models import embedded_gguf

    for name, words in (("twice", "occurs more than once"), ("bare", "has no right answer")):
        result = command(
            "bench", "--model", embedded_gguf(), "--variants", "rules", "--data", f"{name}.json", "--out", "out",
            cwd=tmp_path, env=os.environ,
        )  # fmt: skip
        assert result.returncode == 1
        assert words in result.stderr
        assert f"{entries[0 if name == 'twice' else 1]['entry_id']}" in result.stderr
        assert not (tmp_path / "out").exists()


def test_both_engines_read_the_same_tokens_and_stop_at_the_same_ones(tiny_files, tmp_path) -> None:
    """The CPU stands in for the GPU: same code, same prompts, same end tokens, same limit."""
    from petool_lite.inference.gpu import stop_ids
    from petool_lite.inference.llama import LlamaModel
    from petool_lite.prompt.render import chat_from_directory

    folder = tiny_files["folder"]
    with LlamaModel(tiny_files["f16"], vocab_only=True) as vocabulary:
        assert vocabulary.stop_ids() == stop_ids(folder, chat_from_directory(folder))
    engine, task = GpuEngine("cpu"), task_of(3, 6)
    variants = [Variant("a", tiny_files["f16"], "compact"), Variant("b", folder, "compact", GPU, batch=2)]
    found = []
    for variant in variants:
        generate_results(variant, task, tmp_path / f"results-{variant.name}.jsonl", engine, silent)
        found.append(plain(rows_of(tmp_path / f"results-{variant.name}.jsonl")))
    for mine, other in zip(*found, strict=True):
        for key in ("index", "prompt_sha256", "prompt_tokens", "gold", "facts", "history_dropped", "finish"):
            assert mine[key] == other[key]
        assert mine["reply_tokens"] == other["reply_tokens"] == 6, "random weights never stop"
    meta = json.loads((tmp_path / "results-b.meta.json").read_text())
    assert meta["gpu"]["batch"] == 2
    assert (meta["gpu"]["flips"], meta["gpu"]["flips_checked"]) == (0, 2)
    assert meta["model_sha256"]


def test_long_prompts_lose_history_or_are_too_long_and_keep_their_rows(tiny_model, smollm2, tmp_path) -> None:
    from petool_lite.export import export_base

    folder = tiny_model(smollm2.directory, max_position_embeddings=250)
    file = export_base(str(folder), "f16")
    generate_results(Variant("x", file, "compact"), task_of(6, 20), tmp_path / "results-x.jsonl", GpuEngine(), silent)
    rows = plain(rows_of(tmp_path / "results-x.jsonl"))
    assert len(rows) == 6
    assert {row["status"] for row in rows} == {"ok", "too_long"}
    assert all(row["reply"] == "" for row in rows if row["status"] == "too_long")


def test_a_shared_beginning_is_not_read_again_and_changes_no_bit(tiny_files) -> None:
    """llama.cpp rounds products of few rows otherwise than those of many; where to read on is chosen with that."""
    import numpy as np

    from petool_lite.inference.llama import LlamaModel

    with LlamaModel(tiny_files["q4_k_m"], n_ctx=1024) as model:
        model.exact_reuse = True
        for length in (300, 530):
            ids = [(7 * place * place + 11) % 40_000 for place in range(length)]
            model.read(ids, reuse=False)
            cold = model._logits(-1).copy()
            for shared in (20, 511, length - 9, length - 2):
                if shared < length:
                    model.read(ids[:shared], reuse=False)
                    reused = model.read(ids)
                    assert shared - 512 < reused <= shared
                    assert np.array_equal(model._logits(-1), cold), (length, shared)


def test_entries_of_one_user_are_neighbours(tiny_files, tmp_path) -> None:
    """Same history, same tools, another query: most of the second prompt is in memory already."""
    dataset = load_dataset(DATA, "rating", 4)
    twins = [replace(entry, id=f"{entry.id}b", query=f"{entry.query} Please.") for entry in dataset.entries]
    dataset = replace(dataset, entries=(*dataset.entries, *twins), total=8)
    target = tmp_path / "results-x.jsonl"
    generate_results(
        Variant("x", tiny_files["f16"], "compact"), Task(dataset, "rating", 4), target, GpuEngine(), silent
    )
    rows = rows_of(target)
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert first["entry_id"].rstrip("b") == second["entry_id"].rstrip("b")
        assert second["cached_tokens"] > 0.6 * second["prompt_tokens"] - 64
    assert not rows[1]["cold"]


def test_a_batch_that_changes_replies_is_halved_until_none_changes(tiny_files, tmp_path, monkeypatch) -> None:
    """A decoder that goes wrong in batches of more than two."""
    from petool_lite.inference.decoder import Decoder

    right = Decoder.step

    def wrong(self, tokens, positions, memory):
        logits = right(self, tokens, positions, memory)
        return -logits if memory.slots > 2 else logits

    monkeypatch.setattr(Decoder, "step", wrong)
    variant = Variant("x", tiny_files["folder"], "compact", GPU, batch=4)
    generate_results(variant, task_of(4, 4), tmp_path / "results-x.jsonl", GpuEngine("cpu"), silent)
    gpu = json.loads((tmp_path / "results-x.meta.json").read_text())["gpu"]
    assert (gpu["batch"], gpu["flips"], gpu["flips_by_batch"]) == (2, 0, {"4": 4, "2": 0})
    assert {row["batch"] for row in rows_of(tmp_path / "results-x.jsonl")} == {2}
