"""`petool-lite data`: fetch, look at, check, convert and split entries."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from petool_lite.cli.options import SETTING, as_json, new_file, set_option, setting_option, skip_option
from petool_lite.console import emit, print_json, print_loss_mask, progress, say
from petool_lite.data import files as sources
from petool_lite.data import inspect
from petool_lite.data.answers import answer_faults, schema_faults
from petool_lite.data.files import load_corpus, load_dataset, load_tools, write_folds, write_lines
from petool_lite.data.openai import entry_line
from petool_lite.data.simulate import WITHOUT
from petool_lite.data.simulate import simulate as simulated
from petool_lite.data.splits import leaks
from petool_lite.errors import PetoolError
from petool_lite.models import resolve_base
from petool_lite.prompt.render import Layout, chat_from_directory, example
from petool_lite.recipe import load_recipe

data = click.Group("data", help="Fetch, look at, check, convert and split entries.")


@data.command()
@click.option("--repo", default=sources.REPO, help="Dataset on the Hub.")
@click.option("--file", "names", multiple=True, help="One of its files; can be repeated. All six if not given.")
@click.option("--revision", help="A commit, branch or tag; the newest commit if not given.")
@as_json
def fetch(repo: str, names: tuple[str, ...], revision: str | None, as_json: bool) -> None:
    """Download data files into the Hub's cache, once, and print their paths.

    PEToolBench's if no --repo is given. Public sets of tool calls that can be read, too:
    Salesforce/xlam-function-calling-60k, Team-ACE/ToolACE, NousResearch/hermes-function-calling-v1."""
    with progress() as report:
        chosen = names or (sources.FILES if repo == sources.REPO else tuple(sources.data_files(repo)))
        files = sources.fetch(repo, chosen, revision, report)
    emit([asdict(file) | {"path": str(file.path)} for file in files], as_json, lines=[file.path for file in files])


@data.command()
@click.argument("source")
@setting_option
@click.option("--base", default="smollm2-135m", help="Whose tokenizer counts, as in recipes.")
@skip_option
@as_json
def stats(source: str, setting: str, base: str, strict: bool, as_json: bool) -> None:
    """Figures of SOURCE: entries, candidates, history, ratings, tokens in each prompt style."""
    dataset = load_dataset(source, setting, skip_bad=not strict)
    emit(inspect.stats(dataset, chat_from_directory(resolve_base(base).directory)), as_json, source)


@data.command()
@click.argument("source")
@click.argument("other", required=False)
@setting_option
@skip_option
@as_json
def check(source: str, other: str | None, setting: str, strict: bool, as_json: bool) -> None:
    """Check every entry of SOURCE, and that nothing of it leaks into OTHER. Exit code 1 for a fault or a leak."""
    sets = [load_dataset(name, setting, skip_bad=not strict) for name in (source, other) if name is not None]
    odd = [f"{s.source}, entry {e.id}: {fault}" for s in sets for e in s.entries for fault in answer_faults(e)]
    odd += [message for dataset in sets for message in dataset.bad]
    found = leaks(*(dataset.entries for dataset in sets)) if other is not None else {}
    leaked = {kind: {"count": len(values), "examples": values[:3]} for kind, values in found.items()}
    lines = odd + [f"leak, {kind.replace('_', ' ')}: {len(values)} in both, such as {', '.join(values[:3])}"
                   for kind, values in found.items()]  # fmt: skip
    counts, names = [len(dataset.entries) for dataset in sets], inspect.named_by(sets[0])
    forms = "; ".join(f"{form}: {count}" for form, count in names.items())
    good = [f"{sum(counts)} entries, no faults{', no leaks' if other else ''}", f"providers of tools, by {forms}"]
    emit({"entries": counts, "faults": odd, "leaks": leaked, "providers": names}, as_json, lines=lines or good)
    if lines:
        raise PetoolError(f"{len(lines)} problems in {sum(counts)} entries", "they are listed on stdout")


@data.command()
@click.argument("source")
@click.option("--folds", default=5, type=click.IntRange(min=2), help="Parts of about equal size.")
@click.option("--seed", default=0, help="Which functions go where.")
@click.option("--to", "folder", default="folds", metavar="DIR", help="Where the files go.")
@setting_option
@as_json
def split(source: str, folds: int, seed: int, folder: str, setting: str, as_json: bool) -> None:
    """Split SOURCE by function: test functions of a fold occur nowhere in its training file."""
    files = write_folds(source, setting, folds, seed, Path(folder))
    written = [{"file": str(path), "entries": count} for path, count in files.items()]
    emit(written, as_json, lines=[f"{path}  {count} entries" for path, count in files.items()])


@data.command()
@click.argument("source")
@click.argument("target")
@setting_option
@skip_option
@as_json
def convert(source: str, target: str, setting: str, strict: bool, as_json: bool) -> None:
    """Write the entries of SOURCE to TARGET as OpenAI fine-tuning lines (JSONL), whatever form they are in."""
    path = new_file(target, "TARGET")
    dataset = load_dataset(source, setting, skip_bad=not strict)
    faults = {entry.id: schema_faults(entry) for entry in dataset.entries}
    loose = [f"{source}, entry {name}, {found[0]}" for name, found in faults.items() if found]
    if loose and strict:
        raise PetoolError(f"{len(loose)} answers are not of their schema: {loose[0]}", "leave them out: --skip-bad")
    sound, bad = [entry for entry in dataset.entries if not faults[entry.id]], [*dataset.bad, *loose]
    write_lines(path, map(entry_line, sound))
    for message in [*(f"left out: {one}" for one in bad), f"{len(sound)} entries, {len(bad)} left out"]:
        say(message)
    emit({"file": str(path), "entries": len(sound), "left_out": bad}, as_json, lines=[path])


@data.command()
@click.argument("recipe")
@set_option
@click.option("--entry", "number", default=0, type=click.IntRange(min=0), help="Which, from 0.")
@as_json
def preview(recipe: str, overrides: tuple[str, ...], number: int, as_json: bool) -> None:
    """Show one training row of RECIPE as the model sees it; tokens that carry loss are coloured."""
    chosen = load_recipe(recipe, overrides)[1]
    chat = chat_from_directory(resolve_base(chosen.model.base).directory)
    entries = load_dataset(chosen.data.train, chosen.data.one_setting).entries
    if number >= len(entries):
        raise PetoolError(f"{chosen.data.train} has {len(entries)} entries, --entry counts from 0")
    layout = Layout(chosen.data.style, chosen.model.max_tokens, chosen.data.overlength)
    if (row := example(chat, entries[number], layout)) is None:
        raise PetoolError(f"entry {entries[number].id} is too long and would be left out", "raise model.max_tokens")
    found = inspect.preview(chat, row)
    print_json(found) if as_json else print_loss_mask(found)


@data.command()
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("--tools", "lists", multiple=True, metavar="FILE", help="More tools to offer beside; can be repeated.")
@click.option("--count", default=1000, type=click.IntRange(1, 10**7), help="How many entries.")
@click.option("--seed", default=0, help="The same seed makes the same entries.")
@click.option("--out", "target", required=True, metavar="FILE", help="Where the OpenAI lines go.")
@click.option("--setting", type=SETTING, default="rating", help="Users who rate; who do not; who leave what they used.")
@click.option("--without-call", default=WITHOUT, type=click.FloatRange(0, 1), help="Share in which no tool fits.")
@skip_option
@as_json
def simulate(sources: tuple[str, ...], count: int, target: str, strict: bool, as_json: bool, **options: Any) -> None:
    """Make entries of simulated users from the calls in SOURCE...: whose tool is right follows from their history.

    SOURCE is a log of calls in any form that `data check` reads; your own, or public ones."""
    path = new_file(target, "FILE")
    with progress() as report:
        examples, tools = load_corpus(sources, skip_bad=not strict)
        tools += [tool for name in options["lists"] for tool in load_tools(name)]
        made = simulated(examples, tools, count, options["seed"], options["setting"], options["without_call"])

        def lines() -> Iterator[Any]:
            for number, entry in enumerate(made, 1):
                if number % 100 == 0 or number == count:
                    report("simulating users", number, count, "")
                yield entry_line(entry)

        write_lines(path, lines())
    say(f"{count} entries of {len(examples)} calls")
    emit({"file": str(path), "entries": count, "calls": len(examples)}, as_json, lines=[path])
