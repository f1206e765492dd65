"""The wheel works in an empty environment, imports point one way, and files stay short."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
import urllib.request
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from petool_lite.models import embedded_gguf

REPOSITORY = Path(__file__).parent.parent
MAPPED = {"petool_lite": "petool_lite", **{f"petool_lite/{name}": name for name in ("export", "bench", "recipes")}}
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
TOOL = {"tool_name": "<a>.<b>.<c>", "tool_description": "", "required_parameters": [], "optional_parameters": []}
ROWS = """
__main__
cli __init__
train bench serve doctor
export
inference scorer
prompt.prepare data.inspect
recipe
prompt
data memory
models gguf_base families adapters average base
runs places console gguf_header text
errors recipes
"""  # a part imports itself and the rows below its own; single files their own row, too
RANK = {name: -row for row, names in enumerate(ROWS.splitlines()) for name in names.split()}
SOURCES = {  # full name -> file
    ".".join([*target.split("/"), *path.relative_to(REPOSITORY / folder).with_suffix("").parts]): path
    for target, folder in MAPPED.items()
    for path in sorted((REPOSITORY / folder).rglob("*.py"))
}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the wheel of what is committed, and a virtual environment that holds it and nothing else."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(["git", "clone", "-q", REPOSITORY, folder / "source"], check=True)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, folder / "source"]
    subprocess.run(build, check=True, capture_output=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", folder / "venv" / "bin" / "python"]
    subprocess.run([*pip, "install", "-q", "--no-deps", next(folder.glob("*.whl"))], check=True)
    return folder


def needs(lines: list[str]) -> set[str]:
    wanted = [need for need in map(Requirement, lines) if not need.marker or need.marker.evaluate({"extra": ""})]
    return {canonicalize_name(need.name) for need in wanted}


@pytest.fixture(scope="module")
def plain(built, tmp_path_factory):
    """Run the installed program in another folder, beside what a plain install brings: its dependencies and theirs."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "tools.json").write_text(json.dumps([TOOL]))
    (folder / "site").mkdir()
    waiting, seen = needs(PROJECT["dependencies"]), set()
    assert not waiting & needs(PROJECT["optional-dependencies"]["train"])
    while waiting - seen:
        seen.add(name := min(waiting - seen))
        own = metadata.distribution(name)
        waiting |= needs(own.requires or [])
        for part in {file.parts[0] for file in own.files or []} - {"..", "__pycache__"}:
            (folder / "site" / part).symlink_to(own.locate_file(part))
    variables = {"PATH": os.environ["PATH"], "PYTHONPATH": str(folder / "site"), "PETOOL_LITE_CACHE": str(folder)}
    variables["XDG_DATA_HOME"] = str(folder)

    def run(*words: str) -> subprocess.Popen:
        line, quiet = [built / "venv" / "bin" / "petool-lite", *map(str, words)], subprocess.DEVNULL
        return subprocess.Popen(line, cwd=folder, env=variables, text=True, stderr=subprocess.PIPE, stdout=quiet)

    return run


def test_the_wheel_holds_every_committed_file_of_the_package_and_no_other(built) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
    committed = set()
    for target, folder in MAPPED.items():
        names = subprocess.check_output(["git", "ls-files"], cwd=built / "source" / folder, text=True).splitlines()
        committed |= {f"{target}/{name}" for name in names}
    assert inside == committed


def test_a_plain_install_calls_scores_and_serves_and_says_what_training_needs(plain) -> None:
    """A user's state on disk, too: what it needs came with the extra `train` alone, once."""
    model = ["--model", embedded_gguf()]
    for code, *line in (
        (0, "call", "Hello.", "--tools", "tools.json", "--user", "ann", *model),
        (0, "bench", *model, "--data", "demo:test:1", "--decoding", "constrained", "--out", "out"),
        (0, "bench", "score", "out"),
        (0, "recipes", "show", "rating"),
        (3, "train", "demo"),
    ):
        with plain(*line) as process:
            said = process.stderr.read()
        assert (process.returncode, "Traceback" in said) == (code, False), said
    assert "petool-lite[train]" in said
    with plain("serve", *model, "--port", "0") as server:
        try:
            address = re.search(r"http://\S+/v1", server.stderr.readline()).group() + "/chat/completions"
            body = {"messages": [{"role": "user", "content": "Hello."}], "tools": [TOOL], "user": "ann"}
            asked = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
            with urllib.request.urlopen(asked, timeout=250) as reply:
                assert json.load(reply)["choices"][0]["message"]["tool_calls"]
        finally:
            server.terminate()


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.module, f"{path} imports without a full name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def wrong_imports(module: str, names: set[str]) -> list[str]:
    def place(name: str) -> tuple[str, int]:  # a KeyError: give the new part a row
        part, two = name.split(".")[1], ".".join(name.split(".")[1:3])
        return part, RANK[two] if two in RANK else RANK[part]

    own, rank = place(module)
    aims = [(name, *place(name)) for name in sorted(names) if re.match(r"petool_lite\.[a-z]", name)]
    return [name for name, part, row in aims if row > rank or (row == rank == RANK["train"] and part != own)]


def test_imports_point_one_way() -> None:
    assert not {module: wrong for module, path in SOURCES.items() if (wrong := wrong_imports(module, imported(path)))}
    for module, name in (("bench.run", "train.load"), ("prompt.render", "inference.llama"), ("data.files", "recipe.x")):
        assert wrong_imports(f"petool_lite.{module}", {f"petool_lite.{name}"}) == [f"petool_lite.{name}"]


def test_each_model_library_has_one_owner_and_scoring_has_none() -> None:
    def owners(library: str) -> list[str]:
        return sorted(name.split(".")[1] for name, path in SOURCES.items()
                      if any(aim.split(".")[0] == library for aim in imported(path)))  # fmt: skip

    assert owners("unsloth") == ["train"]
    assert owners("llama_cpp") == ["export"]
    asked = [name for name, path in SOURCES.items() if 'bare("llama_cpp"' in path.read_text()]
    assert asked == ["petool_lite.inference.llama_open"]
    assert set(owners("trl")) == {"train"}
    heavy = ("torch", "transformers", "unsloth", "llama_cpp", "llguidance", "numpy", "datasets", "gguf")
    modules = "petool_lite.cli, petool_lite.bench.score, petool_lite.bench.report, petool_lite.bench.compare"
    code = f"import sys, {modules}; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


def test_the_libraries_of_training_report_to_nobody() -> None:
    """TRL's report looks a name up in a thread; beside a changing environment that ended one training with SIGSEGV."""
    start = "from petool_lite.places import library_places as first; first(); import huggingface_hub.constants as hub"
    line = [sys.executable, "-c", f"{start}; print(hub.HF_HUB_DISABLE_TELEMETRY)"]
    assert subprocess.check_output(line, text=True, env={"HOME": "/"}) == "True\n"


def own_lines(function: ast.AST) -> int:
    """Lines of a function without those of the functions and classes inside it, at any depth."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    inner = [node for node in ast.walk(function) if node is not function and isinstance(node, kinds)]
    numbers = set(range(function.lineno, function.end_lineno + 1))
    return len(numbers.difference(*(range(node.lineno, node.end_lineno + 1) for node in inner)))


def test_files_and_functions_stay_short_and_every_module_says_what_belongs_in_it() -> None:
    others = [path for folder in ("tests", "docs", "dev") for path in (REPOSITORY / folder).rglob("*.py")]
    assert not [path for path in [*SOURCES.values(), *others] if len(path.read_text().splitlines()) > 400]
    for path in SOURCES.values():
        tree = ast.parse(path.read_text())
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        assert not [node.name for node in functions if own_lines(node) > 60], path
        assert len((ast.get_docstring(tree) or "").split()) >= 3 or path.name == "__main__.py", path


def test_every_declared_dependency_has_a_tested_version() -> None:
    pins = "\n".join(path.read_text() for path in sorted((REPOSITORY / "requirements").glob("*.txt")))
    pinned = {canonicalize_name(name) for name in re.findall(r"^([\w-]+)==", pins, re.MULTILINE)}
    extras = PROJECT["optional-dependencies"].values()
    assert not {name for lines in (PROJECT["dependencies"], *extras) for name in needs(lines)} - pinned
