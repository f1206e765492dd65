"""`petool-lite doctor`: what this machine can do, and the fastest settings for a model on it."""

import click

from petool_lite.cli.call import chosen_model, model_option
from petool_lite.cli.data import as_json
from petool_lite.errors import USAGE, PetoolError


@click.command()
@click.option("--tune", is_flag=True, help="Find the fastest settings for a model here, once, and remember them.")
@model_option
@as_json
def doctor(tune: bool, model: str | None, as_json: bool) -> None:
    """Show what this machine can do: GPU, llama.cpp's health, disk. With --tune, make `call` and `serve` faster."""
    from petool_lite.console import plain, print_facts, print_json, print_table, progress
    from petool_lite.doctor import examine
    from petool_lite.doctor import tune as verb

    if model and not tune:
        raise PetoolError("--model says what --tune tunes for", f"petool-lite doctor --tune --model {model}", USAGE)
    if tune:
        with progress() as report:
            found = verb(chosen_model(model), report)
        if as_json:
            print_json(found)
            return
        columns = list(found["trials"][0])
        rows = [[plain(value) for value in trial.values()] for trial in found["trials"]]
        print_table(f"trials with {found['model']}", [name.replace("_", " ") for name in columns], rows)
        click.echo("best: " + plain(found["settings"]))
        return
    facts = examine()
    if as_json:
        print_json(facts)
        return
    print_facts("this machine", facts)
