"""`petool-lite rate`: what a user thinks of a call."""

import click

from petool_lite.cli.options import as_json
from petool_lite.console import emit
from petool_lite.memory.store import Store


@click.command()
@click.argument("which", metavar="last|ID")
@click.argument("verdict", type=click.Choice(["liked", "disliked"]))
@click.option("--user", metavar="NAME", help="Whose call it is; `last` is this user's then.")
@as_json
def rate(which: str, verdict: str, user: str | None, as_json: bool) -> None:
    """Say what the user thinks of a call that `call --user` or `serve` kept; the next call knows.

    \b
    petool-lite rate last disliked --user ann"""
    found = Store().find(None if which == "last" else which, user, verdict)
    emit(found.facts(), as_json, lines=[f"{verdict}: {found.called}, for {found.user}: {found.query}"])
