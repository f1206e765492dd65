"""The wheel works in an empty environment, and imports point one way."""

import ast
import os
import subprocess
import sys
import sysconfig
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


def test_the_wheel_holds_its_parts_and_no_stray_name(empty_environment) -> None:
    import zipfile

    with zipfile.ZipFile(next(empty_environment.glob("*.whl"))) as wheel:
        names = wheel.namelist()
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {"petool_lite"}
    for part in ("py.typed", "recipes/demo.toml", "export/gguf.py", "bench/score.py"):
        assert f"petool_lite/{part}" in names


LAYERS = [  # a module may import from its own row and the rows below
    ["cli", "cli_data", "cli_call", "__main__", "__init__"],
    ["bench", "train", "doctor", "serve"],
    ["export"],
    ["inference"],
    ["prepare", "inspect_data"],
    ["recipe"],
    ["prompt"],
    ["compact"],
    ["jobs"],
    ["data", "base", "runs", "console", "llama_log", "scorer"],
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
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            if node.module == "petool_lite":
                names |= {f"petool_lite.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def test_imports_point_one_way() -> None:
    assert len(sources()) > 20
    for module, path in sources():
        for name in imported(path):
            parts = name.split(".")
            if parts[0] == "petool_lite" and len(parts) > 1:
                assert RANK[parts[1]] <= RANK[module], f"{path} imports {name}"
                assert (module, parts[1]) not in {("bench", "train"), ("doctor", "train")}, f"{path} imports {name}"


def test_each_model_library_has_one_owner() -> None:
    owners = {
        "unsloth": {"model.py"},
        "trl": {"microstep.py", "preference.py", "loop.py"},
        "llama_cpp": {"llama.py", "quantize.py", "evaluate.py", "cpu_speed.py"},
    }
    for library, allowed in owners.items():
        users = {path.name for _, path in sources() if any(name.split(".")[0] == library for name in imported(path))}
        assert users == allowed
    scoring = imported(REPOSITORY / "bench" / "score.py") | imported(REPOSITORY / "bench" / "stats.py")
    assert scoring <= {
        "json",
        "re",
        "math",
        "collections.abc",
        "dataclasses",
        "typing",
        "petool_lite.bench.stats",
        "petool_lite.scorer",
    }


def test_files_stay_short() -> None:
    for _, path in sources():
        assert len(path.read_text().splitlines()) <= 400, path
