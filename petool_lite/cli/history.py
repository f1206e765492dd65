"""`petool-lite history`: what is remembered of users; shown, forgotten, written for others and read from them."""

import json
import time

import click

from petool_lite.cli.options import as_json, new_file
from petool_lite.console import emit, say
from petool_lite.data.fields import Fault
from petool_lite.data.files import raw_rows, write_lines
from petool_lite.errors import PetoolError
from petool_lite.inference.states import StateStore
from petool_lite.memory.lines import openai_line, read_line, training_rows
from petool_lite.memory.store import Store

history = click.Group("history", help="What users did with their tools, and their verdicts.")
user_option = click.option("--user", metavar="NAME", help="Of this user only.")


@history.command("list")
@user_option
@click.option("--limit", default=20, type=click.IntRange(min=1), help="The newest so many.")
@as_json
def history_list(user: str | None, limit: int, as_json: bool) -> None:
    """The newest calls, the newest last."""
    found = [item.facts() | {"called": item.called} for item in Store().records(user, limit)]
    for item in () if as_json else found:
        moment = time.strftime("%Y-%m-%d %H:%M", time.localtime(item["time"]))
        item |= {"time": moment, "verdict": item["verdict"] or "-"}
        del item["answer"], item["confidence"], item["result"]
    emit(found, as_json, "history")


@history.command("show")
@click.argument("which", metavar="last|ID")
@user_option
@as_json
def history_show(which: str, user: str | None, as_json: bool) -> None:
    """One call with the tools that were offered."""
    found = Store().find(None if which == "last" else which, user)
    document = found.facts() | {"turns": json.loads(found.turns or "null"), "tools": json.loads(found.tools)}
    emit(document, as_json, lines=[json.dumps(document, indent=2, ensure_ascii=False)])


@history.command("forget")
@click.option("--user", required=True, metavar="NAME", help="Whom to forget.")
@as_json
def history_forget(user: str, as_json: bool) -> None:
    """Remove a user's calls from the store and from free space in its file, and what the engine saved for this user."""
    store = Store()
    count = store.forget(user)
    StateStore().forget(user)
    aside = sorted(store.path.parent.glob(f"{store.path.name}.damaged-*"))
    for path in aside:
        say(f"note: {path} was damaged and kept aside; it may still hold calls of {user}: remove it by hand")
    found = {"user": user, "forgotten": count, "not_looked_into": list(map(str, aside))}
    emit(found, as_json, lines=[f"{count} forgotten"])


@history.command("export")
@click.option("--format", "form", type=click.Choice(["openai", "training"]), default="openai",
              help="All calls as conversations; or what training on history: learns from.")  # fmt: skip
@user_option
@click.option("--out", "target", metavar="FILE", help="Where the lines go; stdout if not given.")
@as_json
def history_export(form: str, user: str | None, target: str | None, as_json: bool) -> None:
    """Write calls as JSON lines: to keep, to move to another machine (import), or to train on elsewhere."""
    path = new_file(target, "FILE") if target else None
    trains = form == "training"
    rows = training_rows(f"history:{user or '*'}") if trains else [openai_line(item) for item in Store().records(user)]
    if path:
        write_lines(path, rows)
        emit({"file": str(path), "calls": len(rows)}, as_json, lines=[path])
    elif rows or as_json:
        emit(rows, as_json, lines=[json.dumps(row, ensure_ascii=False) for row in rows])


@history.command("import")
@click.argument("source", metavar="FILE")
@click.option("--user", metavar="NAME", help="Whose calls they are where a line does not say.")
@as_json
def history_import(source: str, user: str | None, as_json: bool) -> None:
    """Add the calls of FILE, `history export`'s or OpenAI conversations, one a line; a known call stays as it is."""
    found = []
    for number, row in enumerate(raw_rows(source)):
        try:
            found += read_line(row, number, user)
        except Fault as fault:
            raise PetoolError(f"{source}, line {number + 1}, {fault}", "nothing was added; mend the file") from fault
    added = Store().add(found)
    known = len(found) - added
    emit({"added": added, "known": known}, as_json, lines=[f"{added} added, {known} were there"])
