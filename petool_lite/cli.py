"""The command line: parses, calls one function a verb, prints. Nothing heavy is imported before a verb is chosen."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from petool_lite.cli_call import call, chosen_model, model_option, serve
from petool_lite.cli_data import as_json, data
from petool_lite.errors import USAGE, PetoolError

run_option = click.option(
    "--run", default=None, metavar="RUN", help="A run's folder or name; the newest complete one if not given."
)
SETTING = click.Choice(["rating", "preferred", "chronological"])


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
        except BrokenPipeError:
            sys.exit(1)


@click.group(cls=Main, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="petool-lite")
def main() -> None:
    """Fine-tune a small model to call the tool its user prefers, export it to GGUF, score it on a CPU.

    \b
    petool-lite train demo               a 135M model on this machine, about five minutes
    petool-lite export --gguf q4_k_m     one GGUF file
    petool-lite bench                    base against tuned
    petool-lite call "..." --tools T.json    one tool call
    petool-lite serve                    an OpenAI-compatible server
    """


@main.command()
@click.option("--tune", is_flag=True, help="Find the fastest settings for a model here, once, and remember them.")
@model_option
@as_json
def doctor(tune: bool, model: str | None, as_json: bool) -> None:
    """Show what this machine can do: GPU, llama.cpp's health, disk. With --tune, make `call` and `serve` faster."""
    from petool_lite.console import print_json, print_table, progress
    from petool_lite.doctor import examine
    from petool_lite.doctor import tune as verb

    if tune:
        with progress() as report:
            found = verb(chosen_model(model), report)
        if as_json:
            print_json(found)
            return
        columns = list(found["trials"][0])
        rows = [[_plain(value) for value in trial.values()] for trial in found["trials"]]
        print_table(f"trials with {found['model']}", [name.replace("_", " ") for name in columns], rows)
        click.echo("best: " + _plain(found["settings"]))
        return
    facts = examine()
    if as_json:
        print_json(facts)
        return
    print_table("this machine", ["fact", "value"], [[key, _plain(value)] for key, value in facts.items()])


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if value is None or isinstance(value, bool):
        return {True: "yes", False: "no", None: "none"}[value]
    return str(value)


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
    from petool_lite.console import progress, say, silent
    from petool_lite.recipe import load_recipe
    from petool_lite.runs import read_manifest

    name, settings, folder = _recipe_or_resume(load_recipe, recipe, overrides, resume)
    with progress() as report:
        if dry_run:
            summary = verb.plan(settings, report if as_json else silent)[-1].summary
            _show("the plan", summary, as_json)
            return
        run = verb.train(name, settings, report, folder)
    manifest = read_manifest(run)
    if not as_json:
        say(f"trained in {manifest['seconds']['train']:.0f} s, {manifest['tokens_per_s']:.0f} tokens/s")
        click.echo(run)
        return
    _show("", {"run": str(run), **{key: manifest[key] for key in ("seconds", "tokens_per_s", "peak_memory_gb")}}, True)


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


def _show(title: str, facts: dict[str, Any], as_json: bool) -> None:
    from petool_lite.console import print_json, print_table

    print_json(facts) if as_json else print_table(
        title, ["", ""], [[key, _plain(value)] for key, value in facts.items()]
    )


@main.command()
@run_option
@click.option("--gguf", "types", default="q4_k_m", show_default=True, metavar="TYPE[,TYPE]", help="Types to write.")
@click.option("--lora-gguf", "lora", is_flag=True, help="Also the adapter alone, for llama.cpp to apply to a base.")
@click.option(
    "--merge-base", type=click.Choice(["bf16", "nf4"]), default="bf16", show_default=True,
    help="Merge into the base as it is, or as 4-bit training saw it.",
)  # fmt: skip
@click.option("--imatrix", is_flag=True, help="Quantize by what matters on the recipe's own training rows.")
@click.option(
    "--verify", "level", type=click.Choice(["full", "quick"]), default="full", show_default=True,
    help="quick leaves out the checks that run the model.",
)  # fmt: skip
@as_json
def export(run: str | None, types: str, as_json: bool, **options: Any) -> None:
    """Merge a run's adapter into its base and write GGUF files, proven against the merged model."""
    from petool_lite.console import print_json, progress, say
    from petool_lite.export import Options, export_run
    from petool_lite.runs import find_run

    names = tuple(dict.fromkeys(name.strip().lower() for name in types.split(",") if name.strip()))
    folder = find_run(run) / "export"
    with progress() as report:
        document = export_run(folder.parent, Options(types=names, **options), report)
    if as_json:
        print_json({**document, "paths": [str(folder / item["file"]) for item in document["files"]]})
        return
    for item in document["files"]:
        say(f"{item['type']}: {item['bytes'] / 1e6:.0f} MB{_proof(document['checks'][item['type']])}")
        click.echo(folder / item["file"])


def _proof(checks: dict[str, Any]) -> str:
    found = [f"{checks['prompts_with_equal_ids']} prompts with equal ids"] if "prompts_with_equal_ids" in checks else []
    if "replies" in checks:
        found.append(f"{checks['replies_stopped']} of {checks['replies']} replies stop")
    if "against_transformers" in checks:
        against = checks["against_transformers"]
        found.append(f"top-1 agreement with the merged model {against['top1']:.1%}, KL {against['kl']:.3g}")
    return "".join(f", {text}" for text in found)


@main.group(invoke_without_command=True)
@run_option
@click.option("--model", "model", default=None, metavar="FILE", help="Bench this GGUF file instead of a run.")
@click.option("--variants", default="base,tuned", show_default=True, help="Which of a run's variants.")
@click.option("--data", default=None, metavar="SOURCE", help="Entries to score; the recipe's own if not given.")
@click.option("--setting", type=SETTING, default=None, help="Which prompt; the recipe's own, or rating.")
@click.option(
    "--style", type=click.Choice(["published", "compact"]), default=None, help="Override the file's prompt style."
)
@click.option(
    "--decoding",
    type=click.Choice(["free", "constrained", "both"]),
    default="both",
    show_default=True,
    help="Let the model write anything, or only calls of the offered tools.",
)
@click.option("--limit", type=click.IntRange(min=1), default=None, help="Score the first N entries only.")
@click.option("--out", default=None, metavar="DIR", help="Where results go; the run's bench folder if not given.")
@as_json
@click.pass_context
def bench(context: click.Context, /, **options: Any) -> None:
    """Score GGUF files on PEToolBench entries with llama.cpp on this CPU."""
    if context.invoked_subcommand is not None:
        return
    from petool_lite.bench import bench as verb
    from petool_lite.bench.report import print_report
    from petool_lite.bench.variants import with_decodings
    from petool_lite.console import print_json, progress, say

    with progress() as report:
        variants, data, setting, folder, reply = _bench_inputs(options, report)
        variants = with_decodings(variants, options["decoding"])
        document = verb(variants, data, setting, folder, options["limit"] or 0, reply, report)
    print_report(document)
    say(f"replies and report: {folder}")
    if options["as_json"]:
        print_json(document)


def _bench_inputs(options: dict[str, Any], report: Any) -> tuple[list[Any], str, str, Path, int]:
    from dataclasses import replace

    from petool_lite.bench.variants import VARIANTS, Variant, run_variants
    from petool_lite.recipe import BenchSettings, load_recipe
    from petool_lite.runs import find_run, runs_root

    if options["model"]:
        if options["run"]:
            raise PetoolError("--model and --run exclude each other", "give one of them", USAGE)
        model, plain = Path(options["model"]).expanduser(), BenchSettings()
        folder = Path(options["out"] or runs_root() / f"bench-{model.stem}")
        variant = Variant(model.stem, model, options["style"])
        return [variant], options["data"] or plain.data, options["setting"] or "rating", folder, plain.max_reply_tokens
    names = options["variants"].split(",")
    if not set(names) <= set(VARIANTS):
        raise PetoolError(f"unknown variant in {options['variants']}", f"known: {', '.join(VARIANTS)}", USAGE)
    run = find_run(options["run"])
    recipe = load_recipe(str(run / "recipe.toml"))[1]
    variants = run_variants(run, recipe, names, report)
    if options["style"]:
        variants = [replace(variant, style=options["style"]) for variant in variants]
    folder = Path(options["out"] or run / "bench")
    setting = options["setting"] or recipe.data.setting
    return variants, options["data"] or recipe.bench.data, setting, folder, recipe.bench.max_reply_tokens


@bench.command("score")
@click.argument("results")
@as_json
def bench_score(results: str, as_json: bool) -> None:
    """Score a results-<variant>.jsonl again; loads no model."""
    from dataclasses import asdict

    from petool_lite.bench.run import read_results
    from petool_lite.bench.score import score_rows

    _show(results, asdict(score_rows(read_results(Path(results)))), as_json)


main.add_command(data)
main.add_command(call)
main.add_command(serve)


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
