"""The documentation keeps up with the program: reference pages, quoted commands, settings, messages, paths, links."""

import importlib.util
import re
import shlex
from pathlib import Path

import click

from petool_lite.cli import main
from petool_lite.recipe import settings

REPOSITORY = Path(__file__).parent.parent
DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
KEYS = {name for name, *_ in settings()}
SECTIONS = "|".join(sorted({name.split(".")[0] for name in KEYS}))
FILES = "jsonl?|md|log|gguf|safetensors"
SETTING = re.compile(rf"\b(?:{SECTIONS})\.(?!(?:{FILES})\b)[a-z_]+\b(?!\.)")


def test_reference_pages_are_those_of_the_program() -> None:
    spec = importlib.util.spec_from_file_location("make_reference", DOCS / "make_reference.py")
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    for name, text in reference.pages().items():
        assert (DOCS / "reference" / name).read_text() == text, f"{name} is stale: make reference"


def quoted_commands() -> list[tuple[str, str]]:
    """(where, command line) of every petool-lite command in a code block, a recipe's head or inline code."""
    found = []
    for page in PAGES:
        text = page.read_text()
        blocks = "\n".join(block for language, block in BLOCK.findall(text) if language != "text")
        inline = re.findall(r"(?<!`)`(petool-lite [^`]+)`", BLOCK.sub("", text).replace("\n", " "))
        indented = re.findall(r"^ {4}(petool-lite .+)$", text, re.MULTILINE)
        lines = [*blocks.replace("\\\n", " ").splitlines(), *inline, *indented]
        found += [(page.name, line) for line in lines if line.startswith("petool-lite ")]
    for recipe in sorted((REPOSITORY / "recipes").glob("*.toml")):
        head = re.sub(r"\\\n#\s*", " ", recipe.read_text())
        found += [(recipe.name, line) for line in re.findall(r"^#\s+(petool-lite .+)$", head, re.MULTILINE)]
    return found


def fault(line: str) -> str:
    """What the program would not understand in a quoted command line, or nothing."""
    words = shlex.split(re.sub(r"\[.*?\]|\.\.\.$", "", line), comments=True)[1:]
    command: click.Command = main
    here = click.Context(main)
    while isinstance(command, click.Group) and words and (child := command.get_command(here, words[0])):
        command, words = child, words[1:]
    if isinstance(command, click.Group) and words and not words[0].startswith("-"):
        return f"no command {words[0]}"
    known = {name for parameter in command.params for name in [*parameter.opts, *parameter.secondary_opts]}
    options = [word.split("=")[0] for word in words if re.match("--?[a-z]", word)]
    unknown = [name for name in options if name not in known | {"--help", "-h"}]
    return f"no option {', '.join(unknown)}" if unknown else ""


def test_every_quoted_command_and_setting_is_one_of_the_program() -> None:
    commands = quoted_commands()
    assert len(commands) > 50
    assert not [f"{where}: {line}: {fault(line)}" for where, line in commands if fault(line)]
    assert fault("petool-lite bench --fastest") == "no option --fastest"
    assert fault("petool-lite fly now") == "no command fly"
    inline = [(page.name, text) for page in PAGES for text in re.findall(r"`([^`\n]+)`", page.read_text())]
    named = [(where, key) for where, text in [*commands, *inline] for key in SETTING.findall(text)]
    assert len(named) > 40
    assert not [(where, key) for where, key in named if key not in KEYS]


def test_every_message_in_troubleshooting_is_in_the_source() -> None:
    files = [path for folder in ("petool_lite", "export", "bench") for path in (REPOSITORY / folder).rglob("*.py")]
    source = "".join(path.read_text() for path in [*files, REPOSITORY / "requirements" / "install.sh"])
    source = re.sub(r"\"\s*f?\"", "", source)  # a text over several lines in one piece
    titles = re.findall(r"^### `([^`]+)`$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(titles) > 15
    assert not [(title, part) for title in titles for part in title.split("…") if part not in source]


def test_every_relative_link_leads_somewhere() -> None:
    found = [(page, link) for page in PAGES for link in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", page.read_text()))]
    local = [(page, *link.partition("#")[::2]) for page, link in found if "://" not in link]
    assert len(local) > 20
    for page, path, anchor in local:
        aim = (page.parent / path) if path else page
        assert aim.exists(), f"{page.name}: {path}"
        if anchor:
            titles = [re.sub(r"[^\w\s-]", "", line) for line in re.findall(r"^#+ (.+)$", aim.read_text(), re.MULTILINE)]
            assert anchor in [re.sub(r"\s+", "-", title.strip().lower()) for title in titles], f"{page.name}: {anchor}"


def test_the_tree_names_paths_that_are_there_and_every_room_and_figures_fill_a_page_each() -> None:
    assert all(len((DOCS / name).read_text().splitlines()) <= 80 for name in ("results.md", "performance.md"))
    tree = (DOCS / "index.md").read_text().partition("<!-- tree")[2].partition("```text\n")[2].partition("```")[0]
    folder, paths = "", set()
    for line in tree.splitlines():
        name = line.split()[0]
        folder = folder if line.startswith(" ") else name
        paths.add(folder + name if line.startswith(" ") else name)
    assert not [path for path in paths if not (REPOSITORY / path).exists()]
    inits = [*REPOSITORY.glob("*/__init__.py"), *REPOSITORY.glob("petool_lite/*/__init__.py")]
    assert {f"{path.parent.relative_to(REPOSITORY)}/" for path in inits} <= paths
