"""The command line as a user meets it: quick help, exit codes, one clear line for what is wrong, texts as given."""

import subprocess
import sys

import pytest
from support import own_runs

from petool_lite.console import print_table, progress, say

ENDPOINT = ("--data", "demo:test:60", "--variants", "rule-first", "--out", "out", "--endpoint")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom petool_lite.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'unsloth', 'llama_cpp', 'numpy', 'rich', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
    assert "petool-lite train demo" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["train", "nowhere.toml"], 1, "no such recipe: nowhere.toml"),
        (["train", "demo", "--set", "data.train=gone.json"], 1, "no such data file: gone.json"),
        (["data", "check", "demo:train:0"], 1, "demo:train:0"),
        (["train", "demo", "--set", "data.train=data.json"], 1, "data.json, entry 0, instruction_ratings"),
        (["train", "demo", "--set", "model.base=gone/"], 1, "base model not found"),
        (["train"], 2, "give a RECIPE"),
        (["train", "rating"], 3, "petool-lite train demo"),
        (["train", "demo", "--set", "train.report_to=tensorboard,clearml"], 1, "clearml is not installed"),
        (["train", "demo", "--set", "train.report_to=tensorbord"], 1, "unknown tracker"),
        (["export", "--run", "gone"], 1, "no such run: gone"),
        (["export", "--push", "name", "--run", "gone"], 1, "no such run: gone"),
        (["bench", "--model", "notes.gguf"], 1, "not a GGUF file"),
        (["bench", "--model", "."], 1, "error: . is a folder, not a GGUF file\nhint: give the file in it: notes.gguf"),
        (["bench", "--model", ""], 1, "error: . is a folder, not a GGUF file"),
        (["bench", "--model", "owner/name"], 3, "owner/name needs a GPU"),
        (["data", "check", ""], 1, "is a folder, not a data file"),
        (["bench", "--variants", "fast"], 2, "unknown variant"),
        (["bench", "--shard", "3/3"], 2, "is no shard"),
        (["bench", "score", "gone.jsonl"], 1, "no such results file"),
        (["bench", *ENDPOINT, "http://127.0.0.1:9/v1", "--model", "m"], 1, "nobody is there"),
        (["bench", *ENDPOINT, "127.0.0.1", "--model", "m"], 2, "not an address: 127.0.0.1"),
        (["bench", *ENDPOINT, "https://me:pw@a/v1", "--model", "m"], 2, "holds more"),  # pragma: allowlist secret
        (["bench", *ENDPOINT, "http://127.0.0.1:9/v1"], 2, "--endpoint needs the name of a model"),
        (["call", "q", "--tools", "-", "--model", "gone.gguf"], 1, "--tools: stdin is empty"),
        (["call"], 2, "give a QUERY and --tools FILE"),
        (["call", "q", "--tools", "gone.json"], 1, "cannot read gone.json"),
        (["call", "q", "--tools", "-", "--history", "-"], 2, "only one of the files can be stdin"),
        (["call", "q", "--tools", "notes.gguf"], 1, "is not JSON"),
        (["serve"], 1, "petool-lite train demo; or give --model FILE.gguf"),
        (["nonsense"], 2, "No such command"),
    ],
)
def test_bad_input_is_one_clear_line_and_leaves_nothing(command, tmp_path, arguments, code, said) -> None:
    (tmp_path / "notes.gguf").write_text("hello")
    (tmp_path / "data.json").write_text('[{"query": "q"}]')
    result = command(*arguments, cwd=tmp_path, env=own_runs(tmp_path), inline=True)
    assert result.returncode == code, result.stderr
    assert said in result.stderr
    assert ("Traceback" in result.stderr, "me:pw" in result.stderr, result.stdout) == (False, False, "")
    assert not (tmp_path / "runs").exists()


def test_without_arguments_it_says_what_to_do_next(command, tmp_path) -> None:
    run = tmp_path / "runs" / "demo-1"
    for made, wanted in (
        (None, "petool-lite train demo"),
        (run / "recipe.toml", f"petool-lite train --resume {run}"),
        (run / "manifest.json", "trained, not exported"),
        (run / "export" / "model.q4_k_m.gguf", "petool-lite call"),
    ):
        assert made or not run.parent.exists()
        if made:
            made.parent.mkdir(parents=True, exist_ok=True)
            made.touch()
        result = command(env=own_runs(tmp_path), cwd=tmp_path, inline=True)
        assert (result.returncode, len(result.stdout.splitlines())) == (0, 5), result.stderr
        assert not [text for text in (wanted, "petool-lite --help") if text not in result.stdout]


def test_a_file_of_python_that_a_full_disk_cut_is_no_bare_aborted(command, monkeypatch) -> None:
    def cut(_: str) -> None:
        raise EOFError("EOF read where object expected")

    monkeypatch.setattr("petool_lite.cli.import_module", cut)
    done = command("runs", "list")
    assert (done.returncode, "ends too early" in done.stderr, "Aborted" in done.stderr) == (1, True, False)


def test_recipes_can_be_listed_shown_and_copied(command, found, tmp_path) -> None:
    assert {"demo", "rating"} <= set(found("recipes", "list"))
    assert command("recipes", "copy", "demo", "mine.toml", cwd=tmp_path).returncode == 0
    assert (tmp_path / "mine.toml").read_text() == command("recipes", "show", "demo").stdout
    again = command("recipes", "copy", "demo", "mine.toml", cwd=tmp_path)
    assert (again.returncode, "exists already" in again.stderr) == (1, True)
    assert found("recipes", "keys")["data.train"]["default"] == "demo:train:320"


def test_doctor_decodes_for_real_where_it_has_a_file(found, monkeypatch) -> None:
    monkeypatch.setattr("petool_lite.doctor.kernels_work", lambda model: True)  # which is tried in another process
    facts = found("doctor", inline=True)["llama_cpp"]
    assert (facts["works"], facts["prefill_tokens_per_s"] > 0) == (True, True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # a plain install brings no base to try
    assert "is not installed" in found("doctor", inline=True)["llama_cpp"]["not tried"]


def test_a_dry_run_counts_and_loads_no_model(found) -> None:
    plan = found("train", "demo", "--dry-run", "--set", "data.train=demo:train:12", inline=True)
    assert (plan["rows"], plan["kept"], plan["steps"]) == (12, 12, 6)
    assert 0 < plan["loss_tokens"] < plan["tokens"] / 5


def test_texts_are_shown_as_they_are(capsys) -> None:
    odd = "demo:train:3 [red]x[/red] :cat:"
    print_table(odd, [odd, ""], [[odd, "1"]], odd)
    say(odd)
    with progress() as report:
        for done, total, note in ((0, 1, ""), (1, 1, odd), (0, 0, "")):
            report(odd, done, total, note)
    shown = capsys.readouterr()
    assert (shown.out.count(odd), shown.err.count(odd)) == (4, 5)
