"""`petool-lite runs`: what was trained on this machine."""

import json

import click

from petool_lite.cli.options import as_json
from petool_lite.console import emit
from petool_lite.runs import find_run, is_complete, list_runs, read_manifest


@click.group()
def runs() -> None:
    """Training runs on this machine."""


@runs.command("list")
@as_json
def runs_list(as_json: bool) -> None:
    """All runs, the newest last."""
    emit([{"run": str(run), "complete": is_complete(run)} for run in list_runs()], as_json, "runs")


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
