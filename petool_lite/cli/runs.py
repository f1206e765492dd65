"""`petool-lite runs`: what was trained on this machine."""

import json
from contextlib import suppress
from pathlib import Path

import click

from petool_lite.average import average
from petool_lite.bench.score import METRIC_WORDS, METRICS
from petool_lite.cli.options import as_json
from petool_lite.console import emit, plain
from petool_lite.errors import PetoolError
from petool_lite.runs import find_run, list_runs, read_manifest, state
from petool_lite.text import read_object

runs = click.Group("runs", help="Training runs on this machine.")


@runs.command("list")
@as_json
def runs_list(as_json: bool) -> None:
    """All runs, the newest last, with what the tuned model scored in each run's own bench."""
    found = [{"run": str(run), "state": state(run), "scores": _scores(run)} for run in list_runs()]
    emit(found if as_json else [item | {"scores": plain(item["scores"])} for item in found], as_json, "runs")


@runs.command("show")
@click.argument("run", required=False)
@as_json
def runs_show(run: str | None, as_json: bool) -> None:
    """The manifest of a complete run."""
    manifest = read_manifest(find_run(run))
    emit(manifest, as_json, lines=[json.dumps(manifest, indent=2)])


@runs.command("path")
@click.argument("run", required=False)
def runs_path(run: str | None) -> None:
    """The folder of a run, the newest complete one if not named."""
    click.echo(find_run(run))


@runs.command("average")
@click.argument("names", nargs=-1, required=True, metavar="RUN RUN...")
@as_json
def runs_average(names: tuple[str, ...], as_json: bool) -> None:
    """A new run whose weights are the mean of several runs' of one recipe, trained with other seeds."""
    made = average([find_run(name) for name in names])
    emit({"run": str(made)}, as_json, lines=[made])


def _scores(run: Path) -> dict[str, float]:
    """Right tools, parameters and both of the first tuned variant in a run's report, in percent; empty for none."""
    with suppress(PetoolError):
        found = read_object(run / "bench" / "report.json", "no report", "")["variants"]
        tuned: dict[str, float] = next((item for item in found if item["name"].startswith("tuned")), {})
        return {word: tuned[f"{name}_acc"] for word, name in zip(METRIC_WORDS, METRICS, strict=True) if tuned}
    return {}
