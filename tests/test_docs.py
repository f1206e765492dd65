"""The documentation keeps up with the program: reference pages, quoted commands and quoted messages."""

import importlib.util
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import click
import pytest

REPOSITORY = Path(__file__).parent.parent
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", REPOSITORY / "docs" / "make_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_reference_pages_are_those_of_the_program(generate) -> None:
    for name, text in generate.pages().items():
        assert (REPOSITORY / "docs" / "reference" / name).read_text() == text, f"{name} is stale: make reference"


def test_the_check_names_a_stale_page(generate, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(generate, "TARGET", tmp_path)
    monkeypatch.setattr(sys, "argv", ["make_reference.py"])
    assert generate.main() == 0
    monkeypatch.setattr(sys, "argv", ["make_reference.py", "--check"])
    assert generate.main() == 0
    page = tmp_path / "recipe.md"
    page.write_text(page.read_text().replace("rank of the adapter", "its rank"))
    assert generate.main() == 1
    assert "recipe.md is stale" in capsys.readouterr().err


def quoted_commands() -> list[tuple[str, str]]:
    """(where, command line) of every petool-lite command in a code block, a recipe's head or inline code."""
    found = []
    for page in PAGES:
        if "reference" in page.parts:
            continue
        text = page.read_text()
        lines = [
            line
            for language, block in BLOCK.findall(text)
            if language != "text"
            for line in block.replace("\\\n", " ").splitlines()
        ]
        lines += re.findall(r"(?<!`)`(petool-lite [^`]+)`", BLOCK.sub("", text)) + re.findall(
            r"^ {4}(petool-lite .+)$", text, re.MULTILINE
        )
        found += [(page.name, line) for line in lines if line.startswith("petool-lite ")]
    for recipe in sorted((REPOSITORY / "recipes").glob("*.toml")):
        head = re.sub(r"\\\n#\s*", " ", recipe.read_text())
        found += [(recipe.name, line) for line in re.findall(r"^#\s+(petool-lite .+)$", head, re.MULTILINE)]
    return found


def fault(line: str) -> str:
    """What the program would not understand in a quoted command line, or nothing."""
    from petool_lite.cli import main

    words = shlex.split(re.sub(r"\[.*?\]|\.\.\.$", "", line), comments=True)[1:]
    command: click.Command = main
    while isinstance(command, click.Group) and words and words[0] in command.commands:
        command = command.commands[words.pop(0)]
    if isinstance(command, click.Group) and words and not words[0].startswith("-"):
        return f"no command {words[0]}"
    known = {name for parameter in command.params for name in [*parameter.opts, *parameter.secondary_opts]}
    unknown = [
        word for word in words if re.match("--?[a-z]", word) and word.split("=")[0] not in known | {"--help", "-h"}
    ]
    return f"no option {', '.join(unknown)}" if unknown else ""


def test_every_quoted_command_is_one_of_the_program() -> None:
    commands = quoted_commands()
    assert len(commands) > 50
    wrong = [f"{where}: {line}: {fault(line)}" for where, line in commands if fault(line)]
    assert not wrong, "\n".join(wrong)
    assert fault("petool-lite bench --fastest") == "no option --fastest"
    assert fault("petool-lite fly now") == "no command fly"


def test_every_quoted_setting_exists() -> None:
    from petool_lite.recipe import settings

    keys = {name for name, *_ in settings()}
    sections = "|".join(sorted({name.split(".")[0] for name in keys}))
    used = [(w, key) for w, line in quoted_commands() for key in re.findall(rf"--set '?((?:{sections})\.\w+)=", line)]
    assert len(used) > 15
    assert not [pair for pair in used if pair[1] not in keys]


def test_every_message_in_troubleshooting_is_in_the_source(generate) -> None:
    import ast

    known = set()
    for folder in generate.CODE:
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            nodes = ast.walk(ast.parse(path.read_text()))
            known |= {generate._template(n) for n in nodes if isinstance(n, ast.Constant | ast.JoinedStr | ast.BinOp)}
    installer = (REPOSITORY / "requirements" / "install.sh").read_text()
    titles = re.findall(r"^### `([^`]+)`$", (REPOSITORY / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(titles) > 30
    assert not [title for title in titles if title not in known and title not in installer]


def test_every_relative_link_leads_somewhere() -> None:
    links = [(page, target) for page in PAGES for target in LINK.findall(BLOCK.sub("", page.read_text()))]
    local = [(page, target) for page, target in links if "://" not in target]
    assert len(local) > 30
    for page, target in local:
        path, _, anchor = target.partition("#")
        aim = (page.parent / path) if path else page
        assert aim.exists(), f"{page.name}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.+)$", aim.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}
            assert anchor in slugs, f"{page.name}: {target}"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_completes_commands_and_options(shell) -> None:
    import os
    import subprocess

    script = Path(sys.executable).parent / "petool-lite"
    line = f"_PETOOL_LITE_COMPLETE={shell}_source petool-lite"
    assert line in (REPOSITORY / "docs" / "index.md").read_text()
    found = subprocess.run(
        [script], env=os.environ | {"_PETOOL_LITE_COMPLETE": f"{shell}_source"}, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert "_PETOOL_LITE_COMPLETE" in found.stdout


def test_completion_offers_the_rest_of_a_word() -> None:
    import os
    import subprocess

    script = Path(sys.executable).parent / "petool-lite"
    asked = {"_PETOOL_LITE_COMPLETE": "bash_complete", "COMP_WORDS": "petool-lite exp", "COMP_CWORD": "1"}
    found = subprocess.run([script], env=os.environ | asked, capture_output=True, text=True)
    assert found.stdout == "plain,export\n"
