"""`petool-lite recipes`: the shipped recipes and what can be set in one."""

from pathlib import Path

import click

from petool_lite.cli.data import as_json
from petool_lite.errors import USAGE, PetoolError


@click.group()
def recipes() -> None:
    """Shipped recipes."""


@recipes.command("list")
@as_json
def recipes_list(as_json: bool) -> None:
    """Names and first lines."""
    from petool_lite.console import print_json, print_table
    from petool_lite.recipe import builtin_recipes

    found = {name: text.splitlines()[0].lstrip("# ") for name, text in builtin_recipes().items()}
    print_json(found) if as_json else print_table(
        "recipes", ["name", "what it is"], [[*pair] for pair in found.items()]
    )


@recipes.command("show")
@click.argument("name")
def recipes_show(name: str) -> None:
    """Print a shipped recipe."""
    click.echo(_shipped(name), nl=False)


@recipes.command("copy")
@click.argument("name")
@click.argument("target", required=False)
def recipes_copy(name: str, target: str | None) -> None:
    """Copy a shipped recipe to TARGET (NAME.toml if not given), to change it."""
    from petool_lite.runs import write_text

    path = Path(target or f"{name}.toml")
    if path.exists():
        raise PetoolError(f"{path} exists already", "give another TARGET")
    write_text(path, _shipped(name))
    click.echo(path)


@recipes.command("keys")
@as_json
def recipes_keys(as_json: bool) -> None:
    """Every setting of a recipe: default and meaning."""
    from petool_lite.console import print_json, print_table
    from petool_lite.recipe import settings

    if as_json:
        print_json({key: {"default": default, "doc": about["doc"]} for key, _, about, default in settings()})
        return
    rows = [[key, str(default), about["doc"]] for key, _, about, default in settings()]
    print_table("settings", ["key", "default", "meaning"], rows)


def _shipped(name: str) -> str:
    from petool_lite.recipe import builtin_recipes

    found = builtin_recipes()
    if name not in found:
        raise PetoolError(f"no such recipe: {name}", f"one of: {', '.join(found)}", USAGE)
    return found[name]
