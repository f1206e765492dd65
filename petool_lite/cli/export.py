"""`petool-lite export`: parse, export a run, print the files."""

from typing import Any

import click

from petool_lite.cli.options import as_json, run_option
from petool_lite.console import print_json, progress, say
from petool_lite.export import Options, export_run, hub
from petool_lite.runs import find_run


@click.command()
@run_option
@click.option("--gguf", "types", default="q4_k_m", metavar="TYPE[,TYPE]", help="Types to write.")
@click.option("--lora-gguf", "lora", is_flag=True, help="Also the adapter alone, for llama.cpp to apply to a base.")
@click.option("--merge-base", type=click.Choice(["bf16", "nf4"]),
              help="Merge into the base as it is, or as 4-bit training saw it; else what trained.")  # fmt: skip
@click.option("--imatrix", is_flag=True, help="Quantize by what matters on the recipe's own training rows.")
@click.option("--verify", "level", type=click.Choice(["full", "quick"]), default="full", help="quick runs no model.")
@click.option("--push", metavar="OWNER/NAME", help="Send the export to the Hub, to a private model if new.")
@as_json
def export(run: str | None, types: str, push: str | None, as_json: bool, **options: Any) -> None:
    """Write what a run trained as GGUF files, an adapter merged into its base, checked against the model itself."""
    names = tuple(dict.fromkeys(name.strip().lower() for name in types.split(",") if name.strip()))
    folder = find_run(run) / "export"
    if push is not None:
        hub.check_push(push)
    with progress() as report:
        document = export_run(folder.parent, Options(types=names, **options), report)
        address = {} if push is None else {"pushed": hub.push(folder, folder.parent, push, report)}
    if as_json:
        print_json({**document, **address, "paths": [str(folder / item["file"]) for item in document["files"]]})
        return
    for item in document["files"]:
        found = hub.figures(document["checks"].get(item["type"], {}))
        say(", ".join([f"{item['type']}: {item['bytes'] / 1e6:.0f} MB", *found]))
        click.echo(folder / item["file"])
    for place in address.values():
        say(f"on the Hub: {place}")
