"""Loss and gradients of an update through Unsloth, which changes transformers: in a process of its own."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

UPDATES = """
import json, sys
import torch
from petool_lite.models import resolve_base
from petool_lite.recipe import load_recipe
from petool_lite.train.load import load_model
from support_updates import an_update

places, sizes, again = json.loads(sys.argv[1])
for place in places:
    for precision in ("bf16", "nf4"):
        recipe = load_recipe("demo", [f"model.base={place}", f"model.precision={precision}", "lora.dropout=0.0"])[1]
        model, _ = load_model(recipe, resolve_base(place), again)
        torch.manual_seed(1)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.05)
        rows = [{"input_ids": torch.randint(3, 300, (n,)).tolist(), "answer_start": start} for n, start in sizes]
        (one, single), (two, packed) = an_update(model, rows, 1), an_update(model, rows, 5000)
        apart = max(float((packed[n] - single[n]).norm() / (single[n].norm() + 1e-9)) for n in single)
        norm = sum(float(gradient.norm()) for gradient in packed.values())
        small = sum(module.weight.numel() for module in model.modules() if type(module).__name__ == "Linear4bit")
        print("UPDATE", json.dumps([precision, [one, two], apart, norm, len(packed), small > 0]), file=sys.__stdout__)
"""


def gradients(model: Any) -> dict[str, Any]:
    """What the parameters have gathered, in float32; then they have none."""
    found = {name: p.grad.float().clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def an_update(model: Any, rows: list[dict[str, Any]], budget: int) -> tuple[float, dict[str, Any]]:
    """Loss and gradients of all rows, in micro-batches of `budget` tokens."""
    from petool_lite.train.step import answer_loss, micro_batches

    total = 0.0
    for batch in micro_batches(rows, budget):
        loss = answer_loss(model, batch)
        loss.backward()
        total += loss.item()
    return total, gradients(model)


def updates(places: Sequence[Path], sizes: Sequence[tuple[int, int]], again: bool = True) -> list[Any]:
    """For each model and precision: its name, the losses of rows alone and packed, the largest relative distance of
    their gradients, the sum of the packed ones' norms and their number, and whether weights are in 4 bits; `again`:
    with checkpointing."""
    given = json.dumps([[str(place) for place in places], sizes, again])
    result = subprocess.run(
        [sys.executable, "-c", UPDATES, given], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line[7:]) for line in result.stdout.splitlines() if line.startswith("UPDATE ")]
