"""`petool-lite doctor`: what this machine can do, and the fastest settings for a model on it."""

import os
from dataclasses import asdict

import click

from petool_lite import doctor as verb
from petool_lite.cli.options import as_json, chosen_model, model_option
from petool_lite.console import emit, plain, progress, say
from petool_lite.inference.llama_open import EngineSettings


@click.command()
@click.option("--tune", is_flag=True, help="Find the fastest settings for a model here, once, and remember them.")
@model_option
@as_json
def doctor(tune: bool, model: str | None, as_json: bool) -> None:
    """Show what this machine can do: GPU, llama.cpp's health, disk. With --tune, make `call` and `serve` faster."""
    if not tune:
        emit(verb.examine(chosen_model(model) if model else None), as_json, "this machine")
        return
    if (load := os.getloadavg()[0]) > 1:
        say(f"note: a load of {load:.1f}: other programs may decide what is fastest; tune while nothing else runs")
    with progress() as report:
        found = verb.tune(chosen_model(model), report)
    rows = []  # in few enough columns for a terminal of 80: what each changes, and its figures
    for trial in found["trials"]:
        changed = plain({name: trial[name] for name, usual in asdict(EngineSettings()).items() if trial[name] != usual})
        speed = {f"{kind}/s": trial[f"{kind}_tokens_per_s"] for kind in ("prefill", "decode")}
        seconds = {f"{kind} s": trial[f"{kind}_s"] for kind in ("load", "call")}
        rows.append({"settings": changed or "as they are", **speed, **seconds})
    emit(found if as_json else rows, as_json, f"trials with {found['model']}")
    say("best: " + plain(found["settings"]))
