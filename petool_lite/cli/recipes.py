"""`petool-lite recipes`: the shipped recipes and what can be set in one."""

import click

from petool_lite.cli.options import as_json, new_file
from petool_lite.console import emit
from petool_lite.recipe import builtin_recipes, settings
from petool_lite.runs import write_text

recipes = click.Group("recipes", help="Shipped recipes.")
name_argument = click.argument("name", type=click.Choice(list(builtin_recipes())), metavar="NAME")


@recipes.command("list")
@as_json
def recipes_list(as_json: bool) -> None:
    """Names and first lines."""
    emit({name: text.splitlines()[0].lstrip("# ") for name, text in builtin_recipes().items()}, as_json, "recipes")


@recipes.command("show")
@name_argument
def recipes_show(name: str) -> None:
    """Print a shipped recipe."""
    click.echo(builtin_recipes()[name], nl=False)


@recipes.command("copy")
@name_argument
@click.argument("target", required=False)
def recipes_copy(name: str, target: str | None) -> None:
    """Copy a shipped recipe to TARGET (NAME.toml if not given), to change it."""
    path = new_file(target or f"{name}.toml", "TARGET")
    write_text(path, builtin_recipes()[name])
    click.echo(path)


@recipes.command("keys")
@as_json
def recipes_keys(as_json: bool) -> None:
    """Every setting of a recipe: default and meaning."""
    found = {key: {"default": default, "doc": about["doc"]} for key, _, about, default in settings()}
    rows = [{"key": key, "default": str(item["default"]), "meaning": item["doc"]} for key, item in found.items()]
    emit(found if as_json else rows, as_json, "settings")
