"""`petool-lite train`: a recipe becomes a run."""

from typing import Any

import click

from petool_lite import train as verb
from petool_lite.cli.options import as_json, set_option
from petool_lite.console import emit, print_json, progress, say, silent
from petool_lite.errors import USAGE, PetoolError
from petool_lite.recipe import load_recipe
from petool_lite.runs import is_complete, named_run, read_manifest


@click.command()
@click.argument("recipe", required=False)
@set_option
@click.option("--resume", metavar="RUN", help="Continue an unfinished run from its last checkpoint.")
@click.option("--dry-run", is_flag=True, help="Check and count everything, load no model.")
@as_json
def train(recipe: str | None, overrides: tuple[str, ...], resume: str | None, dry_run: bool, as_json: bool) -> None:
    """Train RECIPE (a file or a shipped name) into a new run directory."""
    if (recipe is None) == (resume is None):
        raise PetoolError("give a RECIPE, or --resume RUN", "such as: petool-lite train demo", USAGE)
    folder = None if resume is None else named_run(resume)
    if folder and is_complete(folder):
        raise PetoolError(f"the run {folder} is complete", "start a new one: petool-lite train RECIPE")
    name, settings = load_recipe(str(folder / "recipe.toml") if folder else recipe or "", overrides)
    with progress() as report:
        if dry_run:
            found = verb.dry_run(settings, report if as_json else silent)
            print_json(found) if as_json else _show_plan(found, settings.train.memory)
            return
        run = verb.train(folder.name if folder else name, settings, report, folder)
    if not verb.is_first():
        return
    manifest = read_manifest(run)
    say(f"trained in {manifest['seconds']['train']:.0f} s, {manifest['tokens_per_s']:.0f} tokens/s")
    figures = {key: manifest[key] for key in ("seconds", "tokens_per_s", "peak_memory_gb")}
    emit({"run": str(run), **figures}, as_json, lines=[run])


def _show_plan(found: dict[str, Any], memory: str) -> None:
    """The rows, and the ways to train with what each would take on this GPU."""
    plain = {key: value for key, value in found.items() if not isinstance(value, dict | list) and value is not None}
    trains = plain.pop("trains_here")
    here = "training here: on the CPU, as the recipe says" if trains else "this recipe needs a GPU: not here"
    emit(plain, False, "the rows")
    if gpu := found["gpu"]:
        here = f'this recipe takes train.memory = "{memory}"'
    if found["ways"]:
        columns = dict.fromkeys(("memory", "precision", "checkpointing", "token_budget", "peak_gb"), "does not fit")
        where = f"{gpu['name']}, {gpu['free_gb']} of {gpu['memory_gb']} GiB free"
        emit([columns | way for way in found["ways"]], False, f"predicted: {where}")
    say(here)
