"""The command line: parses, calls one function a verb, prints. Nothing heavy is imported before a verb is chosen."""

import errno
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from petool_lite.cli.bench import bench, show
from petool_lite.cli.call import call
from petool_lite.cli.data import as_json, data
from petool_lite.cli.doctor import doctor
from petool_lite.cli.export import export
from petool_lite.cli.serve import serve
from petool_lite.errors import FAILED, USAGE, PetoolError

# What a disk answers that is full, over its quota, read-only or not ours; EFBIG is a limit on the size of files.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


class Main(click.Group):
    """Turns an expected failure into one red line, a hint and an exit code."""

    def invoke(self, context: click.Context) -> Any:
        """Run the chosen command."""
        try:
            return super().invoke(context)
        except PetoolError as error:
            from petool_lite.console import fail

            fail(error)
            sys.exit(error.exit_code)
        except ModuleNotFoundError as error:
            from petool_lite.console import fail
            from petool_lite.errors import missing_package

            failure = missing_package(error)
            fail(failure)
            sys.exit(failure.exit_code)
        except BrokenPipeError:
            sys.exit(1)
        except OSError as error:
            if error.errno not in _DISK:
                raise
            from petool_lite.console import fail

            where = f"cannot write {error.filename or 'a file'}: {error.strerror}"
            fail(PetoolError(where, "make room, or give a place that can be written; what was complete is kept"))
            sys.exit(FAILED)


@click.group(cls=Main, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="petool-lite")
@click.pass_context
def main(context: click.Context) -> None:
    """Fine-tune a small model to call the tool its user prefers, export it to GGUF, score it on a CPU.

    \b
    petool-lite train demo                   a 135M model on this machine, about five minutes
    petool-lite export --gguf q4_k_m         one GGUF file
    petool-lite bench                        base against tuned
    petool-lite call "..." --tools T.json    one tool call
    petool-lite serve                        an OpenAI-compatible server
    """
    if context.invoked_subcommand is None:
        from petool_lite.welcome import first_steps

        click.echo("\n".join(first_steps()))


@main.group()
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


@main.command()
@click.argument("recipe", required=False)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one setting; can be repeated.")
@click.option("--resume", default=None, metavar="RUN", help="Continue an unfinished run from its last checkpoint.")
@click.option("--dry-run", is_flag=True, help="Check and count everything, load no model.")
@as_json
def train(recipe: str | None, overrides: tuple[str, ...], resume: str | None, dry_run: bool, as_json: bool) -> None:
    """Train RECIPE (a file or a shipped name) into a new run directory."""
    from petool_lite import train as verb
    from petool_lite.console import print_json, progress, say, silent
    from petool_lite.recipe import load_recipe
    from petool_lite.runs import read_manifest

    name, settings, folder = _recipe_or_resume(load_recipe, recipe, overrides, resume)
    with progress() as report:
        if dry_run:
            found = verb.dry_run(settings, report if as_json else silent)
            print_json(found) if as_json else _show_plan(found, settings.train.memory)
            return
        run = verb.train(name, settings, report, folder)
    if not verb.is_first():
        return
    manifest = read_manifest(run)
    if not as_json:
        say(f"trained in {manifest['seconds']['train']:.0f} s, {manifest['tokens_per_s']:.0f} tokens/s")
        click.echo(run)
        return
    show("", {"run": str(run), **{key: manifest[key] for key in ("seconds", "tokens_per_s", "peak_memory_gb")}}, True)


def _recipe_or_resume(
    load: Callable[..., tuple[str, Any]], recipe: str | None, overrides: tuple[str, ...], resume: str | None
) -> tuple[str, Any, Path | None]:
    if (recipe is None) == (resume is None):
        raise PetoolError("give a RECIPE, or --resume RUN", "such as: petool-lite train demo", USAGE)
    if resume is None:
        return (*load(recipe, overrides), None)
    from petool_lite.runs import is_complete, runs_root

    folder = next((path for path in (Path(resume), runs_root() / resume) if (path / "recipe.toml").is_file()), None)
    if folder is None:
        raise PetoolError(f"no such run: {resume}", "`petool-lite runs list` shows them")
    if is_complete(folder):
        raise PetoolError(f"the run {folder} is complete", "start a new one: petool-lite train RECIPE")
    return folder.name, load(str(folder / "recipe.toml"), overrides)[1], folder


def _show_plan(found: dict[str, Any], memory: str) -> None:
    """The rows, and the ways to train with what each would take on this GPU."""
    from petool_lite.console import print_table, say

    plain = {key: value for key, value in found.items() if not isinstance(value, dict | list) and value is not None}
    trains_here = plain.pop("trains_here")
    show("the rows", plain, False)
    gpu = found["gpu"]
    here = "training here: on the CPU, as the recipe says" if trains_here else "this recipe needs a GPU: not here"
    note = f'this recipe takes train.memory = "{memory}"' if gpu else here
    if not found["ways"]:
        say(note)
        return
    rows = [
        [
            way["memory"],
            way["precision"] or "does not fit",
            *(str(way[key] or "-") for key in ("kept", "token_budget", "peak_gb")),
        ]
        for way in found["ways"]
    ]
    where = f"{gpu['name']}, {gpu['free_gb']} of {gpu['memory_gb']} GiB free"
    columns = ["train.memory", "base", "kept for the backward pass", "tokens a micro-batch", "peak GiB"]
    print_table(f"predicted: {where}", columns, rows, note)


main.add_command(export)
main.add_command(data)
main.add_command(bench)
main.add_command(call)
main.add_command(serve)
main.add_command(doctor)


@main.group()
def runs() -> None:
    """Training runs on this machine."""


@runs.command("list")
@as_json
def runs_list(as_json: bool) -> None:
    """All runs, the newest last."""
    from petool_lite.console import print_json, print_table
    from petool_lite.runs import is_complete, list_runs

    found = [{"run": str(run), "complete": is_complete(run)} for run in list_runs()]
    if as_json:
        print_json(found)
        return
    rows = [[str(item["run"]), "complete" if item["complete"] else "unfinished"] for item in found]
    print_table("runs", ["run", "state"], rows)


@runs.command("show")
@click.argument("run", required=False)
@as_json
def runs_show(run: str | None, as_json: bool) -> None:
    """The manifest of a complete run."""
    from petool_lite.console import print_json
    from petool_lite.runs import find_run, read_manifest

    manifest = read_manifest(find_run(run))
    print_json(manifest) if as_json else click.echo(json.dumps(manifest, indent=2))


@runs.command("path")
@click.argument("run", required=False)
def runs_path(run: str | None) -> None:
    """The folder of a run, the newest complete one if not named."""
    from petool_lite.runs import find_run

    click.echo(find_run(run))
