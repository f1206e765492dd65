"""Every family through Unsloth as training loads it, in 16 and in 4 bits: packed rows are as exact as rows alone."""

import json
import subprocess
import sys

import pytest
from support_families import CHANGES, family_model, small_tokenizer

UPDATES = """
import json, sys
import torch
from petool_lite.models import resolve_base
from petool_lite.recipe import load_recipe
from petool_lite.train.load import load_model
from petool_lite.train.step import answer_loss, micro_batches

def update(model, rows, budget):
    total = 0.0
    for batch in micro_batches(rows, budget):
        loss = answer_loss(model, batch)
        loss.backward()
        total += loss.item()
    found = {name: p.grad.float().clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return total, found

for place in sys.argv[1:]:
    for precision in ("bf16", "nf4"):
        recipe = load_recipe("demo", [f"model.base={place}", f"model.precision={precision}", "lora.dropout=0.0"])[1]
        model, _ = load_model(recipe, resolve_base(place), True)
        torch.manual_seed(1)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.05)
        sizes = ((90, 60), (9, 1), (70, 66))
        rows = [{"input_ids": torch.randint(3, 300, (n,)).tolist(), "answer_start": start} for n, start in sizes]
        (one, single), (two, packed) = update(model, rows, 1), update(model, rows, 1000)
        apart = max(float((packed[n] - single[n]).norm() / (single[n].norm() + 1e-9)) for n in single)
        small = sum(module.weight.numel() for module in model.modules() if type(module).__name__ == "Linear4bit")
        print(json.dumps([precision, abs(one - two) / one, apart, len(single), small > 0]), file=sys.__stdout__)
"""


@pytest.mark.slow
def test_packed_and_unpacked_updates_agree_through_unsloth(tmp_path) -> None:
    places = []
    for name in CHANGES:
        tokenizer = small_tokenizer(name, tmp_path / name / "tokenizer")
        places.append(family_model(name, tokenizer, tmp_path / name / "model"))
    result = subprocess.run([sys.executable, "-c", UPDATES, *places], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    found = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("[")]
    assert len(found) == 2 * len(CHANGES)
    for (precision, loss, apart, learned, packed), name in zip(found, [n for n in CHANGES for _ in "12"], strict=True):
        assert loss < 1e-3, (name, precision)
        assert apart < 3e-2, (name, precision)
        assert learned >= 2 * 7 * 2, (name, precision)
        assert packed == (precision == "nf4"), name
