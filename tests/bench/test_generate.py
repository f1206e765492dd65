"""Results files: kept through kill -9 and Ctrl-C, continued, repaired, refused where they are of other work."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support_bench import plain, rows_of

from petool_lite.bench import variants as kinds
from petool_lite.bench.engines import Task
from petool_lite.bench.report import write_report
from petool_lite.bench.results import meta_path
from petool_lite.bench.run import bench
from petool_lite.bench.run import generate as generate_all
from petool_lite.bench.variants import GPU, Variant, default_names, rule_variant, run_variants, with_decodings
from petool_lite.console import silent
from petool_lite.data.entries import required
from petool_lite.data.files import load_dataset
from petool_lite.errors import PetoolError
from petool_lite.recipe import load_recipe

DATA = "demo:test:10"


def task_of(count: int = 4, reply: int = 24, **changes) -> Task:
    return Task(load_dataset(DATA), reply, count, **changes)


def generate(variant: Variant, task: Task, folder: Path, report=silent) -> Path:
    """Generate one variant's results into `folder`; its file."""
    generate_all([variant], task, folder, report)
    return folder / f"results-{variant.name}.jsonl"


@pytest.fixture(scope="module")
def tiny_files(tiny_model, smollm2) -> dict[str, Path]:
    """The directory of a tiny model with SmolLM2's tokenizer, and its GGUF files by type."""
    from petool_lite.export import export_base

    folder = tiny_model(smollm2.directory, max_position_embeddings=1024)
    return {"folder": folder} | {kind: export_base(str(folder), kind) for kind in ("f16", "q4_k_m")}


@pytest.fixture(scope="module")
def whole(tiny_files, tmp_path_factory) -> Path:
    """The results of an undisturbed bench of 10 entries."""
    return generate(Variant("tiny", tiny_files["f16"], "petool"), task_of(10), tmp_path_factory.mktemp("whole"))


def breaking(monkeypatch, call: int, error: BaseException) -> None:
    """The engine raises at its `call`-th reply."""
    from petool_lite.inference.llama import LlamaModel

    right, calls = LlamaModel.generate, []

    def generate(self, *arguments, **options):
        calls.append(1)
        if len(calls) == call:
            raise error
        return right(self, *arguments, **options)

    monkeypatch.setattr(LlamaModel, "generate", generate)


def test_after_ctrl_c_a_cut_line_and_a_broken_engine_it_goes_on(whole, tiny_files, tmp_path, monkeypatch) -> None:
    variant, path, said = Variant("tiny", tiny_files["f16"], "petool"), tmp_path / whole.name, []
    with monkeypatch.context() as patch:
        breaking(patch, 4, KeyboardInterrupt())
        with pytest.raises(PetoolError) as caught:
            generate(variant, task_of(10), tmp_path)
    assert (caught.value.exit_code, caught.value.hint) == (130, "the same command goes on from here")
    kept, meta = rows_of(path), json.loads(meta_path(path).read_text())
    assert (len(kept), meta["complete"], meta["entries"]) == (3, False, 10)
    path.write_bytes(path.read_bytes()[:-100])
    with monkeypatch.context() as patch:
        breaking(patch, 2, PetoolError("it broke"))
        generate(variant, task_of(10), tmp_path, report=lambda stage, *rest: said.append(stage))
    (found,) = write_report(tmp_path)["variants"]
    assert (found["n"], found["engine_errors"], found["classes"]["engine_error"]) == (9, 1, 1), "no wrong answer"
    generate(variant, task_of(10), tmp_path, report=lambda stage, *rest: said.append(stage))
    for told in ("its last line was cut off", "2 of 10 entries are there", "1 failures of the engine are tried again"):
        assert any(told in line for line in said)
    assert all(row in rows_of(path) for row in kept[:2]), "no row was made again"
    assert plain(rows_of(path)) == plain(rows_of(whole))
    assert json.loads(meta_path(path).read_text())["complete"]


def test_from_the_command_line_to_the_report(tiny_files, tmp_path, found) -> None:
    line = ["bench", "--model", tiny_files["f16"], "--out", tmp_path, "--style", "petool", "--decoding", "both"]
    report = found(*line, "--data", DATA, "--limit", "2")
    stem = tiny_files["f16"].stem
    names = [stem, f"{stem}-free", "rule-random", "rule-first", "rule-liked", "rule-words"]
    assert [item["name"] for item in report["variants"]] == names
    assert {item["n"] for item in report["variants"]} == {2}
    assert all(item["about"] for item in report["variants"])
    rows = rows_of(tmp_path / f"results-{stem}.jsonl")
    assert {row["failure"] for row in rows} <= {None, "cut_off"}, "constrained"
    assert "</html>" in (tmp_path / "report.html").read_text()


def test_a_finished_bench_loads_nothing_and_a_smaller_limit_uses_what_is_there(tmp_path) -> None:
    rule, said = rule_variant("rule-first"), []
    target = generate(rule, task_of(), tmp_path)
    first = target.read_bytes()
    for limit, told in ((4, "all 4 entries are there already"), (6, ""), (4, "entries are there already (and 2 more)")):
        generate(rule, task_of(limit), tmp_path, report=lambda stage, *rest: said.append(stage))
        assert told in said[-1]
        assert target.read_bytes().startswith(first), "what is there stays, and is enough"
    meta = json.loads(meta_path(target).read_text())
    assert (meta["entries"], meta["limit"], meta["complete"], len(rows_of(target))) == (6, 6, True, 6)
    generate(rule, task_of(fresh=True), tmp_path)
    assert len(rows_of(target)) == 4


def test_results_of_other_work_are_refused_by_name_before_any_reply(tiny_files, tmp_path) -> None:
    variant = Variant("x", tiny_files["f16"], "petool")
    target = generate(variant, task_of(2, 2), tmp_path)
    before = target.read_bytes()
    other = Task(load_dataset("demo:test:13"), 2, 2)
    cases = [
        (variant, other, "another data set: demo:test:10, not demo:test:13"),
        (replace(variant, style="published"), task_of(2, 2), "another prompt style: petool, not published"),
        (replace(variant, model=tiny_files["q4_k_m"]), task_of(2, 2), "another model: .*f16.gguf, not .*q4_k_m.gguf"),
        (variant, task_of(2, 3), "another reply limit: 2, not 3"),
        (replace(variant, decoding="free"), task_of(2, 2), "another decoding: constrained, not free"),
        (variant, task_of(2, 2, shard=(0, 2)), "another shard"),
    ]
    for changed, task, words in cases:
        with pytest.raises(PetoolError, match=words) as caught:
            generate_all([rule_variant("rule-first"), changed], task, tmp_path, silent)
        assert "--fresh" in caught.value.hint
    assert target.read_bytes() == before
    assert not (tmp_path / "results-rule-first.jsonl").exists()
    held = tmp_path / "results-x.meta.json"
    held.write_text(json.dumps(json.loads(held.read_text()) | {"schema": 2}))
    with pytest.raises(PetoolError, match="made by another version"):
        generate(variant, task_of(2, 2), tmp_path)
    held.unlink()
    with pytest.raises(PetoolError, match="says what it was made from"):
        generate(variant, task_of(2, 2), tmp_path)
    rules = [rule_variant("rule-first"), rule_variant("rule-liked")]
    bench(rules[:1], task_of(2), tmp_path / "rules")
    with pytest.raises(PetoolError, match=r"made from demo:test:10, .* from demo:test:13: other data"):
        bench(rules[1:], other, tmp_path / "rules")
    assert not (tmp_path / "rules" / "results-rule-liked.jsonl").exists()


def test_both_engines_read_the_same_tokens_and_stop_at_the_same_ones(tiny_files, tmp_path) -> None:
    """The CPU stands in for the GPU: same code, prompts, end tokens, limit; one beyond the context keeps its row."""
    from petool_lite.inference.gpu import GpuModel
    from petool_lite.inference.llama import LlamaModel

    folder = tiny_files["folder"]
    with LlamaModel(tiny_files["f16"], vocab_only=True) as vocabulary:
        ends = {token for token in range(len(vocabulary.token_bytes())) if vocabulary.ends(token)}
        assert ends == GpuModel(folder, None, device="cpu").stops
    cpu = Variant("a", tiny_files["f16"], "petool", decoding="free")
    gpu = Variant("b", folder, "petool", GPU, decoding="free", batch=2, device="cpu")
    dataset = load_dataset(DATA)
    long = replace(dataset.entries[0], query="word " * 2000)
    task = Task(replace(dataset, entries=(long, *dataset.entries[1:4])), 6)
    found = [plain(rows_of(generate(variant, task, tmp_path))) for variant in (cpu, gpu)]
    assert [row["status"] for row in found[0]] == ["too_long", "ok", "ok", "ok"]
    for mine, other in zip(*found, strict=True):
        for key in ("index", "prompt_sha256", "prompt_tokens", "gold", "facts", "history_dropped", "finish", "status"):
            assert mine.get(key) == other.get(key)
        whole = 6 * (mine["status"] == "ok")
        assert mine["reply_tokens"] == other["reply_tokens"] == whole, "random weights never stop"
    meta = json.loads((tmp_path / "results-b.meta.json").read_text())
    assert meta["gpu"]["batch"] == 2
    assert meta["model_sha256"]


@pytest.fixture
def run(tmp_path, tiny, monkeypatch) -> tuple[Path, object]:
    """A run that has exported q8_0 and f16 (the files' content does not matter here)."""
    folder = tmp_path / "run-1"
    (folder / "export").mkdir(parents=True)
    for kind, size in (("q8_0", 10), ("f16", 20)):
        (folder / "export" / f"model.{kind}.gguf").write_bytes(b"GGUF" + b"x" * size)
    (folder / "manifest.json").write_text("{}")
    monkeypatch.setattr("petool_lite.export.export_base", lambda base, kind, report: Path(f"{base}.{kind}.gguf"))
    return folder, load_recipe("demo", [f"model.base={tiny}"])[1]


def test_the_variants_of_a_run_are_what_it_and_this_machine_have(run, monkeypatch) -> None:
    folder, recipe = run
    monkeypatch.setattr(kinds, "gpu_available", lambda: True)
    on_cpu = ["base-f16", "tuned-f16", "base-q8_0", "tuned-q8_0"]
    on_gpu = ["base-nf4-gpu", "base-bf16-gpu", "tuned-nf4-gpu", "tuned-bf16-gpu"]
    whole = {item.name: item for item in run_variants(folder, recipe, ["all"], silent)}
    assert [*whole] == [*(rules := [*kinds.RULES][:4]), *on_cpu, *on_gpu]
    tuned = whole["tuned-nf4-gpu"]
    assert (tuned.precision, tuned.adapter, tuned.batch) == ("nf4", folder / "adapter", 64)
    assert whole["base-bf16-gpu"].adapter is None
    full = replace(recipe, train=replace(recipe.train, method="full"))
    models = {item.name: (item.model, item.adapter) for item in run_variants(folder, full, ["gpu"], silent)}
    assert [models[name] for name in on_gpu] == [(Path(recipe.model.base), None)] * 2 + [(folder / "model", None)] * 2
    monkeypatch.setattr(kinds, "gpu_available", lambda: False)
    assert [item.name for item in run_variants(folder, recipe, ["all"], silent)] == [*rules, *on_cpu]
    for name, said, code in (("q4_k_m", "has no q4_k_m file", 1), ("nf4-gpu", "tuned-nf4-gpu needs a GPU", 3)):
        with pytest.raises(PetoolError, match=said) as caught:
            run_variants(folder, recipe, [f"tuned-{name}", "rules"], silent)
        assert caught.value.exit_code == code
    found = run_variants(folder, recipe, ["base", "tuned", "rule-liked"], silent)  # of the smallest file
    assert [item.name for item in with_decodings(found, "constrained")] == ["base-q8_0", "tuned-q8_0", "rule-liked"]
    both = {item.name: item.about for item in with_decodings(found, "both")}
    assert [*both] == ["base-q8_0", "base-q8_0-free", "tuned-q8_0", "tuned-q8_0-free", "rule-liked"]
    assert both["base-q8_0-free"] == "the base before training, as a q8_0 GGUF file on the CPU, writing anything"


def test_a_model_is_scored_where_it_was_trained_and_the_rest_is_said(run, monkeypatch) -> None:
    said: list[str] = []
    for trained_on, here, on in (("CPU, 2 threads", True, ""), ("NVIDIA", False, ""), ("NVIDIA", True, "-gpu")):
        monkeypatch.setattr(kinds, "gpu_available", lambda here=here: here)
        (run[0] / "manifest.json").write_text(json.dumps({"device": trained_on}))
        assert said == []
        assert default_names(run[0], lambda stage, *rest: said.append(stage)) == [f"base{on}", f"tuned{on}", "rules"]
    assert "also here, on the CPU: tuned-f16, tuned-q8_0" in said[0]


def test_what_baselines_score_on_the_published_entries(open_entries) -> None:
    """What docs/results.md says of them."""
    entries = load_dataset(str(open_entries)).entries
    wanted = {"rule-random": 11.2, "rule-first": 13.1, "rule-liked": 41.0, "rule-words": 39.8}
    wanted |= {"rule-job": 46.1, "rule-told": 90.8}
    for name in kinds.RULES:
        calls = [kinds.rule_call(name, entry) for entry in entries]
        right = sum(call.name == entry.answer.name for call, entry in zip(calls, entries, strict=True))
        assert 100 * right / 753 == pytest.approx(wanted[name], abs=1.5)
        for entry, call in zip(entries, calls, strict=True):
            (tool,) = (tool for tool in entry.tools if tool.name == call.name)
            assert set(call.arguments) == set(required(tool)), "a valid call"
