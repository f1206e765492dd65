"""Shared fixtures: an isolated cache and run folder, the embedded base, and a tiny random model of its shape."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from support import LIGHT, own_runs, run_inline, tiny_settings, train_demo
from support_families import family_model

from petool_lite.inference.llama_open import quiet_threads

REPOSITORY = Path(__file__).parent.parent
OPEN_ENTRIES = REPOSITORY.parent / "shared" / "petoolbench" / "user_entries_open.json.zip"

os.environ["HF_HUB_OFFLINE"] = "1"
quiet_threads()  # before torch loads OpenMP: threads that spin make llama.cpp's tests five times slower


@pytest.fixture(scope="session", autouse=True)
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setenv("PETOOL_LITE_CACHE", str(tmp_path_factory.mktemp("cache")))
    patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data")))
    patch.setenv("PETOOL_LITE_RUNS", str(tmp_path_factory.mktemp("runs")))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """A folder that one of the suite's processes makes and the others find; nobody may change it afterwards."""
    mine = tmp_path_factory.getbasetemp()
    shared = mine.parent if "PYTEST_XDIST_WORKER" in os.environ else mine

    def make(name: str, fill: Callable[[Path], None]) -> Path:
        folder = shared / f"shared-{name}"
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                work = shared / f"unfinished-{name}-{os.getpid()}"
                work.mkdir()
                fill(work)
                work.rename(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def open_entries() -> Path:
    if not OPEN_ENTRIES.is_file():
        pytest.skip("the published entries are not on this machine")
    return OPEN_ENTRIES


@pytest.fixture(scope="session")
def smollm2(made_once):
    from petool_lite.models import resolve_base
    from petool_lite.places import cache_root

    def unpack(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PETOOL_LITE_CACHE", str(folder))
            resolve_base("smollm2-135m")

    shutil.copytree(made_once("base", unpack), cache_root(), dirs_exist_ok=True)
    return resolve_base("smollm2-135m")


@pytest.fixture(scope="session")
def constrainer(smollm2):
    """Holds replies of the embedded base to calls of the tools that are offered."""
    from petool_lite.inference.constrain import Constrainer

    return Constrainer.from_directory(smollm2.directory, 2)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a tiny random Llama with the tokenizer of `tokenizer_from`; keyword arguments change its config."""

    def make(tokenizer_from: Path, target: Path | None = None, **changes) -> Path:
        plain = {"drawn": False, "pad_token_id": None} | changes
        return family_model("Llama", tokenizer_from, target or tmp_path_factory.mktemp("tiny"), **plain)

    return make


@pytest.fixture(scope="session")
def llama3_tokenizer() -> Path:
    """A small tokenizer built like Llama 3's: same splitting rule, same kind of special tokens, own vocabulary."""
    return Path(__file__).parent / "golden" / "llama3"


@pytest.fixture(scope="session")
def command() -> Callable[..., subprocess.CompletedProcess]:
    """Run `petool-lite ARGS` as a user would: in a process of its own, but for what loads no model."""

    def run(*arguments: str, inline: bool | None = None, **options) -> subprocess.CompletedProcess:
        if inline or (inline is None and arguments and arguments[0] in LIGHT):
            return run_inline([*map(str, arguments)], **options)
        line = [sys.executable, "-m", "petool_lite", *map(str, arguments)]
        return subprocess.run(line, capture_output=True, text=True, **{"timeout": 600, **options})

    return run


@pytest.fixture(scope="session")
def found(command) -> Callable[..., Any]:
    """What `petool-lite ARGS --json`, which has to succeed, puts on stdout's last line."""

    def run(*arguments: str, **options) -> Any:
        result = command(*arguments, "--json", **options)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout.splitlines()[-1])

    return run


@pytest.fixture(scope="session")
def tiny(tiny_model, smollm2, made_once) -> Path:
    return made_once("tiny", lambda folder: tiny_model(smollm2.directory, folder))


@pytest.fixture(scope="session")
def complete_run(made_once, command, tmp_path_factory) -> Callable[[str, list[str]], Path]:
    """This process's own copy of a run that is trained once; the arguments are its name and those of `train`."""

    def make(name: str, arguments: list[str]) -> Path:
        def train(root: Path) -> None:
            run, _ = train_demo(command, root, *arguments)  # stdout is data: nothing but the JSON document
            assert run.parent.name == "runs"

        copy = shutil.copytree(made_once(name, train), tmp_path_factory.mktemp(name), dirs_exist_ok=True)
        (run,) = (copy / "runs").iterdir()
        return run

    return make


@pytest.fixture(scope="session")
def trained(tiny, complete_run) -> Path:
    """A complete run of 10 steps on the tiny model, trained through Unsloth without interruption or evaluation."""
    return complete_run("road", [*tiny_settings(tiny), "--set", "train.report_to=tensorboard"])


@pytest.fixture(scope="session")
def exported(made_once, trained, command, tmp_path_factory) -> Path:
    """This process's own copy of a folder whose runs/one is a complete run with an export to q8_0."""

    def export(root: Path) -> None:
        shutil.copytree(trained, root / "runs" / "one")
        line = ("export", "--run", "one", "--gguf", "Q8_0", "--verify", "quick")
        result = command(*line, cwd=root, env=own_runs(root))
        assert (result.returncode, result.stdout.strip().rpartition("/")[2]) == (0, "model.q8_0.gguf"), result.stderr
        assert "50 prompts with equal ids" in result.stderr
        assert not [said for said in ("Failed to load", "Unknown separator", "Warning") if said in result.stderr]

    return shutil.copytree(made_once("exported", export), tmp_path_factory.mktemp("exported"), dirs_exist_ok=True)


@pytest.fixture
def float32(monkeypatch) -> None:
    """Training computes in float32, whatever the machine has: tests against a formula need it."""
    from petool_lite.train import step

    monkeypatch.setattr(step, "computing", lambda model: nullcontext())


@pytest.fixture(scope="session")
def trained_full(tiny, complete_run) -> Path:
    """A complete run of 10 steps of full fine-tuning on the tiny model, without interruption or evaluation."""
    return complete_run("full", tiny_settings(tiny, "train.method=full"))


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium."""
    api = pytest.importorskip("playwright.sync_api")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium on this machine")
    with api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def opened(browser):
    """Opens pages; errors, and requests to anywhere else, fail the test."""
    trouble, contexts = [], []

    def message(said) -> None:
        if said.type == "error" and not {"status", "net::ERR_FAILED"} & set(said.text.split()):
            trouble.append(said.text)

    def open_page(url: str, width: int = 1280, scheme: str = "light"):
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme))
        page, home = contexts[-1].new_page(), "file:" if url.startswith("file:") else "http://127.0.0.1:"
        page.set_default_timeout(100_000)
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("console", message)
        page.on("request", lambda sent: sent.url.startswith(home) or trouble.append(sent.url))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert trouble == []
