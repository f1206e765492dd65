"""The reference pages, made from the program: `python docs/make_reference.py` writes, `--check` fails if one is stale.

commands.md comes from the click commands, recipe.md from the settings dataclasses, models.md from the table of families
and the tests of each. Nothing about an option or a setting is written by hand a second time.
"""

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "reference"
_NOTE = "<!-- Made by docs/make_reference.py; `make reference` writes it anew. -->\n\n"


def pages() -> dict[str, str]:
    """File, from docs/reference, -> Markdown of every generated page."""
    return {"commands.md": commands_page(), "recipe.md": recipe_page(), "../models.md": models_page()}


def commands_page() -> str:
    """Every command with its usage, help and options."""
    from petool_lite.cli import main

    parts = [
        "# Commands\n",
        "Every command also takes `--help`. `--json` ends stdout with one JSON document on one line.\n",
    ]
    for path, command in walk(main, "petool-lite"):
        context = click.Context(command, info_name=path, show_default=True)
        usage = " ".join([path, *command.collect_usage_pieces(context)])
        parts += [f"## {path}\n", f"```\n{usage}\n```\n", _help(command)]
        records = [item.get_help_record(context) for item in command.params if isinstance(item, click.Option)]
        rows = [(f"`{names}`", text) for names, text in filter(None, records)]
        if rows:
            parts.append(_table(("option", "meaning"), rows))
    return _NOTE + "\n".join(parts)


def walk(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    """The command and all below it, each with the words that call it."""
    yield path, command
    context = click.Context(command)
    for name in sorted(command.list_commands(context)) if isinstance(command, click.Group) else ():
        yield from walk(command.get_command(context, name), f"{path} {name}")


# What a family can do -> the test that shows it, which runs over every family or names it.
_SHOWN = {
    "train LoRA": "train/test_step.py::test_packed_rows_are_exact",
    "train full": "train/test_step.py::test_packed_rows_are_exact",
    "NF4": "train/test_families.py::test_packed_and_unpacked_updates_agree_through_unsloth",
    "export": "export/test_families.py::test_its_file_computes_and_reads_as_transformers_does",
    "call": "export/test_families.py::test_its_file_calls_tools_from_prompts_that_training_renders",
    "serve": "export/test_families.py::test_its_file_is_served_and_scored",
    "bench": "export/test_families.py::test_its_file_is_served_and_scored",
}


def models_page() -> str:
    """Every family and what is shown to work with it."""
    from petool_lite.families import FAMILIES

    rows = []
    for family in FAMILIES:
        missing = [name for name in _SHOWN if not _is_shown(family, name)]
        if missing:
            raise SystemExit(f"no test shows of {family.name}: {', '.join(missing)}")
        cells = [f"[yes](#{name.lower().replace(' ', '-')})" for name in _SHOWN]
        rows.append((f"{family.name}: `{family.architecture}`, in llama.cpp `{family.gguf}`", *cells))
    parts = [
        "# Models\n",
        "Text models of these families, from a directory or the Hub, can be trained, exported and run; everything else",
        "is refused in one line. A GGUF file of any architecture that llama.cpp opens can be called, served, scored.\n",
        _table(("family", *_SHOWN), rows),
    ]
    for name, test in _SHOWN.items():
        parts.append(f"## {name}\n\n`tests/{test}`\n")
    return _NOTE + "\n".join(parts)


def _is_shown(family: Any, name: str) -> bool:
    """Whether the test is there and runs over this family."""
    file, _, function = _SHOWN[name].partition("::")
    text = (ROOT / "tests" / file).read_text()
    changes = (ROOT / "tests" / "support_families.py").read_text()
    listed = f'"{family.name}": {{' in changes and "CHANGES" in text
    return f"def {function}(" in text and (listed or f'"{family.architecture.removesuffix("ForCausalLM")}' in text)


def _help(command: click.Command) -> str:
    blocks = []
    for block in inspect.cleandoc(command.help or "").split("\n\n"):
        if block.startswith("\b"):  # click's mark: keep these lines as they are
            blocks.append("```\n" + block.strip("\b\n ") + "\n```")
        else:
            blocks.append(" ".join(block.split()))
    return "\n\n".join(blocks) + "\n"


def recipe_page() -> str:
    """Every setting of a recipe, by section."""
    from petool_lite.recipe import Recipe, settings

    parts = [
        "# Recipe settings\n",
        "A recipe is a TOML file with these sections; what it leaves out has the default. `--set section.key=value` on",
        "the command line comes before the recipe. An unknown key, a wrong type or a value out of range is refused,",
        "all of them together, before anything is loaded. `petool-lite recipes keys` prints the same list.\n",
    ]
    sections = {name: type(value) for name, value in vars(Recipe()).items()}
    for section, kind in sections.items():
        rows = [
            (f"`{key.partition('.')[2]}`", _kind(hint, about), f"`{_value(default)}`", about["doc"])
            for key, hint, about, default in settings()
            if key.startswith(f"{section}.")
        ]
        parts += [f"## [{section}]\n", f"{kind.__doc__}\n", _table(("key", "type", "default", "meaning"), rows)]
    return _NOTE + "\n".join(parts)


def _kind(hint: Any, about: dict[str, Any]) -> str:
    if about["choices"]:
        return ", ".join(f"`{item}`" for item in about["choices"])
    name = {str: "text", int: "integer", float: "number", bool: "true or false"}.get(hint, "list of names")
    bounds = [f"{sign} {about[key]:.10g}" for sign, key in (("≥", "least"), ("≤", "most")) if about[key] is not None]
    return f"{name} {', '.join(bounds)}" if bounds else name


def _value(default: Any) -> str:
    import json

    if isinstance(default, list):
        return ", ".join(default)
    return json.dumps(default) if isinstance(default, str | bool) else f"{default:g}"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines) + "\n"


def _cell(text: str) -> str:
    """One line; in plain text a < is escaped, between backquotes it stands for itself."""
    parts = " ".join(text.split()).replace("|", "\\|").split("`")
    return "`".join(part if index % 2 else part.replace("<", "&lt;") for index, part in enumerate(parts))


def main() -> int:
    """Write the pages, or with --check name those that are stale."""
    made = pages()
    stale = [name for name, text in made.items() if not _same(TARGET / name, text)]
    if sys.argv[1:] == ["--check"]:
        for name in stale:
            print(f"docs/reference/{name} is stale: run `make reference`", file=sys.stderr)
        return 1 if stale else 0
    TARGET.mkdir(exist_ok=True)
    for name in stale:
        (TARGET / name).write_text(made[name])
        print(f"docs/reference/{name}")
    return 0


def _same(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text() == text


if __name__ == "__main__":
    sys.exit(main())
