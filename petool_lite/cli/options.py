"""Options that several verbs have."""

from pathlib import Path

import click

from petool_lite.data import SETTINGS
from petool_lite.errors import PetoolError

as_json = click.option("--json", "as_json", is_flag=True, help="End stdout with one JSON document on one line.")
SETTING = click.Choice(SETTINGS)
setting_option = click.option(
    "--setting", type=SETTING, default="rating", show_default=True, help="PEToolBench: which prompt."
)
skip_option = click.option(
    "--strict/--skip-bad", "strict", default=True, show_default=True,
    help="Refuse a file with a broken entry, or count it.",
)  # fmt: skip
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one setting; can be repeated."
)
run_option = click.option(
    "--run", default=None, metavar="RUN", help="A run's folder or name; the newest complete one if not given."
)


def new_file(name: str, argument: str) -> Path:
    """The path of a file to be written; raises PetoolError if it is there."""
    if Path(name).exists():
        raise PetoolError(f"{name} exists already", f"give another {argument}")
    return Path(name)
