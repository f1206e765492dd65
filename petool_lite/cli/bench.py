"""`petool-lite bench`: generate replies and score them; `bench score | report | compare | merge` read results again."""

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from petool_lite.bench import run as verb
from petool_lite.bench import variants as known
from petool_lite.bench.compare import compare_folders, print_comparison
from petool_lite.bench.engines import Task
from petool_lite.bench.report import build_report, print_report, write_report
from petool_lite.bench.results import load_folder, load_results, merge_shards, results_folder
from petool_lite.cli.options import DECODINGS, SETTING, as_json, decoding_option, run_option
from petool_lite.console import print_json, progress, say
from petool_lite.data.files import load_dataset
from petool_lite.errors import USAGE, PetoolError
from petool_lite.recipe import Recipe, load_recipe
from petool_lite.runs import find_run, read_manifest, runs_root, write_json


def _shard(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """The two numbers of I/N, counted from 0."""
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", value or "")
    if value is None or (found and int(found[1]) < int(found[2])):
        return (int(found[1]), int(found[2])) if found else None
    raise click.BadParameter(f"{value!r} is no shard, such as 0/4 to 3/4")


@click.group(invoke_without_command=True)
@run_option
@click.option("--model", metavar="FILE|DIR|ID", help="Not a run: a GGUF file, a model on the GPU, --endpoint's name.")
@click.option("--endpoint", metavar="URL", help="Ask --model of this server; a key goes into PETOOL_LITE_ENDPOINT_KEY.")
@click.option("--max-requests", type=click.IntRange(min=1), help="To --endpoint at most; else about 3 an entry.")
@click.option(
    "--variants", metavar="NAME[,NAME]",
    help="What to bench: base, tuned, tuned-q8_0, tuned-nf4-gpu, ..., or the groups rules, cpu, gpu, all. "
    "If not given: base, tuned and rules, on the GPU if the run was trained on one that is here.",
)  # fmt: skip
@click.option("--data", metavar="SOURCE", help="Entries to score; the recipe's own if not given.")
@click.option("--setting", type=SETTING, help="PEToolBench's prompt; the recipe's own, or rating.")
@click.option("--style", type=click.Choice(["published", "petool"]), help="Override the file's prompt style.")
@decoding_option(type=click.Choice([*DECODINGS, "both"]))
@click.option("--limit", type=click.IntRange(min=1), help="Score the first N entries only.")
@click.option("--batch", type=click.IntRange(1, 512), help="Replies made side by side.")
@click.option("--shard", metavar="I/N", callback=_shard, help="Only part I of N (from 0); see `bench merge`.")
@click.option("--fresh", is_flag=True, help="Start over instead of going on with results that are there.")
@click.option("--out", metavar="DIR", help="Where results go; the run's bench folder if not given.")
@as_json
@click.pass_context
def bench(context: click.Context, /, **options: Any) -> None:
    """Score models and rules on labelled entries: GGUF files on this CPU, bases and adapters on a GPU, endpoints.

    A stopped bench goes on where it was when its command is given again."""
    if context.invoked_subcommand is not None:
        return
    with progress() as report:
        document = verb.bench(*_work(options, report), report)
    if document is not None:
        _show_report(document, options["out"], options["as_json"])


def _show_report(document: dict[str, Any], where: object, as_json: bool) -> None:
    print_json(document) if as_json else print_report(document)
    say(f"replies and report: {where}")


def _work(options: dict[str, Any], report: Any) -> tuple[list[Any], Any, Path]:
    """Variants, task and folder that a command line asks for; options["out"] is the folder afterwards."""
    of_run = options["model"] is None and options["endpoint"] is None
    recipe, variants, folder = (_of_run if of_run else _of_model)(options, report)
    if options["style"]:
        variants = [item if item.engine == known.NONE else replace(item, style=options["style"]) for item in variants]
    if options["batch"]:
        variants = [replace(item, batch=options["batch"]) for item in variants]
    setting = options["setting"] or recipe.data.one_setting
    if options["setting"] is None and recipe.data.setting != setting:
        say(f"the run learned every setting; this scores {setting} (--setting takes another, --out keeps them apart)")
    dataset = load_dataset(recipe.bench.data if options["data"] is None else options["data"], setting)
    rank, count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    shard = options["shard"] or ((rank, count) if count > 1 else None)  # torchrun's and accelerate's processes share
    options["out"] = options["out"] or str(folder)
    task = Task(dataset, recipe.bench.max_reply_tokens, options["limit"], shard, options["fresh"])
    return known.with_decodings(variants, options["decoding"]), task, Path(options["out"])


def _of_model(options: dict[str, Any], report: Any) -> tuple[Recipe, list[Any], Path]:
    if options["run"] is not None:
        raise PetoolError("--model and --run exclude each other", "give one of them", USAGE)
    if options["endpoint"] is None:
        chosen = known.model_variant(options["model"], report)
    elif options["model"]:
        chosen = known.endpoint_variant(options["endpoint"], options["model"], options["max_requests"] or 0)
    else:
        raise PetoolError("--endpoint needs the name of a model there", "give --model NAME", USAGE)
    rules = known.check_names((options["variants"] or "rules").split(","))
    return Recipe(), [chosen, *map(known.rule_variant, rules)], runs_root() / f"bench-{chosen.name}"


def _of_run(options: dict[str, Any], report: Any) -> tuple[Recipe, list[Any], Path]:
    names = options["variants"].split(",") if options["variants"] else []
    known.check_names(names)
    run = find_run(options["run"])
    recipe = load_recipe(str(run / "recipe.toml"))[1]
    return recipe, known.run_variants(run, recipe, names or known.default_names(run, report), report), run / "bench"


@bench.command("score")
@click.argument("results")
@as_json
def bench_score(results: str, as_json: bool) -> None:
    """Score RESULTS, a results-<variant>.jsonl or a folder of them; loads no model."""
    place = Path(results).expanduser()
    document = build_report(load_folder(results_folder(results)) if place.is_dir() else [load_results(place)])
    print_json(document) if as_json else print_report(document)


@bench.command("report")
@click.argument("folders", nargs=-1, required=True, metavar="DIR...")
@click.option("--out", metavar="DIR", help="Where the report goes; beside the results if not given.")
@click.option("--calibrate", metavar="VARIANT", help="Keep the temperature that suits its confidence, for export.")
@as_json
def bench_report(folders: tuple[str, ...], out: str | None, calibrate: str | None, as_json: bool) -> None:
    """Write report.json, .md and .html anew from the results in DIR, bench folder or run; several make one in --out."""
    if len(folders) > 1 and out is None:
        raise PetoolError("several folders make one report", "say where it goes: --out DIR", USAGE)
    places = [results_folder(folder) for folder in folders]
    target = Path(out).expanduser() if out else places[0]
    document = write_report(*places, target=target)
    _show_report(document, target, as_json)
    if not calibrate:
        return
    found = next((item["calibration"] for item in document["variants"] if item["name"] == calibrate), None)
    if found is None:
        raise PetoolError(f"no replies of {calibrate} with probabilities", "name a constrained variant", USAGE)
    run = find_run(str(places[0].parent))  # which refuses what is no run
    write_json(run / "manifest.json", read_manifest(run) | {"temperature": found["temperature"]})
    say(f"temperature {found['temperature']:.2f} is kept in {run}; petool-lite export writes it into the GGUF file")


@bench.command("compare")
@click.argument("first")
@click.argument("second")
@click.option("--variant", metavar="NAME", help="This variant only.")
@click.option("--against", metavar="NAME", help="Its name in SECOND, if it has another there.")
@as_json
def bench_compare(first: str, second: str, variant: str | None, against: str | None, as_json: bool) -> None:
    """Compare two runs or bench folders on the entries that both scored: differences, tests, how many flipped."""
    found = compare_folders(results_folder(first), results_folder(second), variant, against)
    print_json(found) if as_json else print_comparison(found)


@bench.command("merge")
@click.argument("folders", nargs=-1, required=True, metavar="DIR...")
@click.option("--out", required=True, metavar="DIR", help="Where the merged results and their report go.")
@as_json
def bench_merge(folders: tuple[str, ...], out: str, as_json: bool) -> None:
    """Make the results of all shards in DIR... one, as if they had been made by one command."""
    target = Path(out).expanduser()
    merge_shards([Path(folder).expanduser() for folder in folders], target)
    _show_report(write_report(target), out, as_json)
