"""`petool-lite bench`: score models on PEToolBench entries."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from petool_lite.cli.data import SETTING, as_json
from petool_lite.errors import USAGE, PetoolError

run_option = click.option(
    "--run", default=None, metavar="RUN", help="A run's folder or name; the newest complete one if not given."
)


def _shard(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """The two numbers of I/N, counted from 0."""
    first, slash, second = (value or "").partition("/")
    if value is None:
        return None
    if not (slash and first.isdigit() and second.isdigit() and int(first) < int(second)):
        raise click.BadParameter(f"{value!r} is no shard, such as 0/4 to 3/4")
    return int(first), int(second)


def show(title: str, facts: dict[str, Any], as_json: bool) -> None:
    """Facts as a table, or as one JSON document."""
    from petool_lite.console import print_facts, print_json

    print_json(facts) if as_json else print_facts(title, facts)


@click.group(invoke_without_command=True)
@run_option
@click.option("--model", "model", default=None, metavar="FILE", help="Bench this GGUF file instead of a run.")
@click.option(
    "--variants", default="base,tuned,rules", show_default=True, metavar="NAME[,NAME]",
    help="What to bench: base, tuned, tuned-q8_0, tuned-nf4-gpu, ..., or the groups rules, cpu, gpu, all.",
)  # fmt: skip
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
@click.option("--batch", type=click.IntRange(1, 512), default=None, help="Replies decoded together on a GPU.")
@click.option(
    "--shard", metavar="I/N", callback=_shard, default=None, help="Only part I of N (from 0); see `bench merge`."
)
@click.option("--fresh", is_flag=True, help="Start over instead of going on with results that are there.")
@click.option("--out", default=None, metavar="DIR", help="Where results go; the run's bench folder if not given.")
@as_json
@click.pass_context
def bench(context: click.Context, /, **options: Any) -> None:
    """Score models and rules on PEToolBench entries: GGUF files on this CPU, bases and adapters on a GPU.

    A stopped bench goes on where it was when its command is given again.
    """
    if context.invoked_subcommand is not None:
        return
    from petool_lite.bench.shards import bench_ranks
    from petool_lite.bench.terminal import print_report
    from petool_lite.console import print_json, progress, say

    with progress() as report:
        job = _job(options, report)
        document = bench_ranks(job.variants, job.task, job.folder, report)
    if document is None:  # a shard: another command, or the first process, has the report
        return
    print_report(document)
    say(f"replies and report: {job.folder}")
    if options["as_json"]:
        print_json(document)


@dataclass(frozen=True)
class _Job:
    """What a command line asks for."""

    variants: list[Any]
    task: Any
    folder: Path


def _job(options: dict[str, Any], report: Any) -> _Job:
    from dataclasses import replace

    from petool_lite.bench.run import Task
    from petool_lite.bench.variants import GPU, with_decodings
    from petool_lite.data.files import load_dataset

    variants, bench, trained, folder = _model_inputs(options) if options["model"] else _run_inputs(options, report)
    if options["style"]:
        variants = [item if item.engine == "none" else replace(item, style=options["style"]) for item in variants]
    if options["batch"]:
        several = [item.engine == GPU and item.batch > 1 for item in variants]
        variants = [
            replace(item, batch=options["batch"]) if many else item
            for item, many in zip(variants, several, strict=True)
        ]
    setting = options["setting"] or _default_setting(trained)
    dataset = load_dataset(options["data"] or bench.data, setting, options["limit"] or 0)
    limit, shard, fresh = (options[key] for key in ("limit", "shard", "fresh"))
    task = Task(dataset, setting, bench.max_reply_tokens, limit, shard, fresh)
    return _Job(with_decodings(variants, options["decoding"]), task, Path(options["out"] or folder))


def _default_setting(data: Any) -> str:
    """The setting of the recipe's `data`; says so where that learned all of them."""
    from petool_lite.console import say

    setting: str = data.one_setting
    if setting != data.setting:
        say(f"the run learned every setting; this scores {setting} (--setting takes another, --out keeps them apart)")
    return setting


def _model_inputs(options: dict[str, Any]) -> tuple[list[Any], Any, Any, Path]:
    from petool_lite.bench.variants import Variant, rule_variants
    from petool_lite.gguf_header import check_gguf
    from petool_lite.recipe import Recipe
    from petool_lite.runs import runs_root

    if options["run"]:
        raise PetoolError("--model and --run exclude each other", "give one of them", USAGE)
    model = Path(options["model"]).expanduser()
    check_gguf(model)
    variants = [Variant(model.stem, model), *rule_variants(options["variants"].split(","))]
    return variants, Recipe().bench, Recipe().data, runs_root() / f"bench-{model.stem}"


def _run_inputs(options: dict[str, Any], report: Any) -> tuple[list[Any], Any, Any, Path]:
    from petool_lite.bench.variants import check_names, run_variants
    from petool_lite.recipe import load_recipe
    from petool_lite.runs import find_run

    names = options["variants"].split(",")
    check_names(names)
    run = find_run(options["run"])
    recipe = load_recipe(str(run / "recipe.toml"))[1]
    return run_variants(run, recipe, names, report), recipe.bench, recipe.data, run / "bench"


@bench.command("merge")
@click.argument("folders", nargs=-1, required=True, metavar="DIR...")
@click.option("--out", required=True, metavar="DIR", help="Where the merged results and their report go.")
@as_json
def bench_merge(folders: tuple[str, ...], out: str, as_json: bool) -> None:
    """Make the results of all shards in DIR... one, as if they had been made by one command."""
    from petool_lite.bench.merge import merge_shards
    from petool_lite.bench.report import write_report
    from petool_lite.bench.terminal import print_report
    from petool_lite.console import print_json, say

    merge_shards([Path(folder).expanduser() for folder in folders], Path(out).expanduser())
    document = write_report(Path(out).expanduser())
    print_report(document)
    say(f"replies and report: {out}")
    if as_json:
        print_json(document)
