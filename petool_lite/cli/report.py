"""`petool-lite bench score | report | compare`: results files read again; nothing here loads a model."""

from pathlib import Path
from typing import Any

import click

from petool_lite.cli.data import as_json
from petool_lite.errors import USAGE, PetoolError


@click.command("score")
@click.argument("results")
@as_json
def score(results: str, as_json: bool) -> None:
    """Score RESULTS, a results-<variant>.jsonl or a folder of them; loads no model."""
    from petool_lite.bench.results import load_rows, results_files
    from petool_lite.bench.score import score_rows
    from petool_lite.console import print_json, say

    found: dict[str, Any] = {}
    for path in results_files(results):
        rows, cut = load_rows(path)
        if cut:
            say(f"{path}: the last line was cut and is left out")
        found[str(path)] = score_rows(rows)
    if as_json:
        print_json(next(iter(found.values())) if Path(results).is_file() else found)
        return
    from petool_lite.bench.tables import score_files_table
    from petool_lite.bench.terminal import print_table

    print_table(score_files_table(found))


@click.command("report")
@click.argument("folders", nargs=-1, required=True, metavar="DIR...")
@click.option("--out", default=None, metavar="DIR", help="Where the report goes; beside the results if not given.")
@as_json
def report(folders: tuple[str, ...], out: str | None, as_json: bool) -> None:
    """Write report.json, report.md and report.html anew from the results files in DIR, a bench folder or a run.

    Several folders, such as one a setting, make one report in --out.
    """
    from petool_lite.bench.report import write_report
    from petool_lite.bench.results import results_folder
    from petool_lite.bench.terminal import print_report
    from petool_lite.console import print_json, say

    if len(folders) > 1 and out is None:
        raise PetoolError("several folders make one report", "say where it goes: --out DIR", USAGE)
    places = [results_folder(folder) for folder in folders]
    target = Path(out) if out else places[0]
    document = write_report(*places, target=target)
    print_json(document) if as_json else print_report(document)
    say(f"report: {target / 'report.html'}")


@click.command("compare")
@click.argument("first")
@click.argument("second")
@click.option("--variant", default=None, metavar="NAME", help="This variant only.")
@click.option("--against", default=None, metavar="NAME", help="Its name in SECOND, if it has another there.")
@as_json
def compare(first: str, second: str, variant: str | None, against: str | None, as_json: bool) -> None:
    """Compare two runs or bench folders on the entries that both scored: differences, tests, entries that flipped."""
    from petool_lite.bench.compare import compare_folders
    from petool_lite.bench.results import results_folder
    from petool_lite.bench.terminal import print_comparison
    from petool_lite.console import print_json

    found = compare_folders(results_folder(first), results_folder(second), variant, against)
    print_json(found) if as_json else print_comparison(found)
