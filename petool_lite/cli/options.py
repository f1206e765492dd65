"""Options that several verbs have."""

from functools import partial
from pathlib import Path
from typing import Any

import click

from petool_lite.data import SETTINGS
from petool_lite.errors import PetoolError
from petool_lite.places import user_path

as_json = click.option("--json", "as_json", is_flag=True, help="End stdout with one JSON document on one line.")
SETTING = click.Choice(SETTINGS)
setting_option = click.option("--setting", type=SETTING, default=SETTINGS[0], help="PEToolBench: which prompt.")
skip_option = click.option("--strict/--skip-bad", "strict", default=True, help="Refuse broken entries, or count them.")
set_option = click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="A setting; can be repeated.")
run_option = click.option("--run", metavar="RUN", help="A run's folder or name; the newest complete one if not given.")
model_option = click.option("--model", metavar="FILE", help="A GGUF file; else the newest run's smallest export.")
DECODINGS = ("constrained", "free")
_DECODING = "Only calls of the offered tools, by their schemas; or anything."
decoding_option = partial(click.option, "--decoding", default=DECODINGS[0], help=_DECODING)


def engine_options(command: Any) -> Any:
    """What `call` and `serve` have in common."""
    for option in (
        click.option("--mcp", multiple=True, metavar="COMMAND|URL", help="Tools of a running MCP server, named by it, "
                     "or by NAME in NAME=COMMAND; may be given again."),
        click.option("--store/--no-store", default=True, help="Keep what a user did, and read what bears on tools."),
        click.option("--context", "n_ctx", default=0, type=click.IntRange(min=0),
                     help="Tokens of prompt and reply together; 0 has room for 8192."),
        click.option("--trim-history", is_flag=True, help="Let old history go where the prompt is too long."),
        decoding_option(type=click.Choice(DECODINGS)),
        model_option,
    ):  # fmt: skip
        command = option(command)
    return command


def chosen_model(name: str | None) -> Path:
    """The named GGUF file, or the newest complete run's smallest export."""
    if name is not None:
        return user_path(name)
    from petool_lite.bench.variants import tuned_file
    from petool_lite.runs import find_run

    try:
        run = find_run(None)
    except PetoolError as error:
        raise PetoolError(error.message, f"{error.hint}; or give --model FILE.gguf") from error
    return tuned_file(run)


def new_file(name: str, argument: str) -> Path:
    """The path of a file to be written; raises PetoolError if it is there."""
    if Path(name).exists():
        raise PetoolError(f"{name} exists already", f"give another {argument}")
    return Path(name)
