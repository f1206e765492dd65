"""Tokens/s and memory of training on one GPU: petool-lite in its ways, and what others do with the same rows.

    python dev/train_speed.py BASE DATA [--seconds 1200] [--only NAME]

BASE is a model directory, DATA a file of PEToolBench entries. All sides take the recipe rating: LoRA on 4 bits. Lean
ways may hold 7.4 GiB, what a card of 8 GB gives, from loading on. The peers are Unsloth fed equal large micro-batches
through its own trainer, Unsloth as published one row at a time, and Transformers + PEFT + TRL + bitsandbytes. The first
update of each, which compiles kernels, is left out. It prints a table and, last, a JSON line.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

GIB = 2**30
_PLAIN = "lora.dropout=0.0"
# Ways of ours: name, settings beyond the recipe's, updates, GiB that torch may hold (0: all), tokens of a made row (0:
# the rows of DATA).
WAYS: tuple[tuple[str, tuple[str, ...], int, float, int], ...] = (
    # the smallest first: Unsloth keeps the buffers of the largest micro-batch that a process has had
    ("in the 4.35 GiB that Unsloth holds (dropout 0.1)", ("train.token_budget=7232",), 3, 4.35, 0),
    ("lean, as published (dropout 0.1)", (), 4, 7.4, 0),
    ("auto", (_PLAIN, "train.memory=auto"), 4, 0, 0),
    ("lean, rows of 8k tokens", (_PLAIN, "train.rows=12"), 3, 7.4, 8000),
    ("lean (dropout 0)", (_PLAIN,), 3, 7.4, 0),
)
# Peers: name, engine, settings, rows a micro-batch, updates, and which rows: "real" ones (of several like ones the
# shorter are padded), "equal" ones cut to the mean length, or "packed" to 8,192 tokens by TRL.
PEERS: tuple[tuple[str, str, tuple[str, ...], int, int, str], ...] = (
    ("Unsloth, 9 equal rows a micro-batch (dropout 0)", "unsloth", (_PLAIN,), 9, 3, "equal"),
    ("Unsloth, 9 equal rows a micro-batch (dropout 0.1)", "unsloth", (), 9, 3, "equal"),
    ("Unsloth, 9 real rows of like length, padded (dropout 0)", "unsloth", (_PLAIN,), 9, 3, "real"),
    ("Unsloth, bf16, 6 equal rows (dropout 0)", "unsloth", (_PLAIN, "model.precision=bf16"), 6, 3, "equal"),
    ("Unsloth, bf16, 15 equal rows (dropout 0)", "unsloth", (_PLAIN, "model.precision=bf16"), 15, 3, "equal"),
    ("Unsloth, bf16, 6 equal rows (dropout 0.1)", "unsloth", ("model.precision=bf16",), 6, 3, "equal"),
    ("Unsloth, packed by TRL (dropout 0)", "unsloth", (_PLAIN,), 1, 3, "packed"),
    ("Unsloth, as published (dropout 0.1), one row", "unsloth", (), 1, 3, "real"),
    ("Transformers + PEFT + TRL, as published, one row", "hf", (), 1, 3, "real"),
    ("Transformers + PEFT + TRL, packed by TRL (dropout 0.1)", "hf", (), 1, 3, "packed"),
)


def measure(base: str, data: str, seconds: float, only: Sequence[str]) -> list[dict[str, Any]]:
    """Run the ways, then the peers, each side in a process of its own, as long as there is time; what fails is told."""
    begun = time.time()
    ways, peers = ([item for item in items if not only or item[0] in only] for items in (WAYS, PEERS))
    sides = [*([("--ours", {"ways": ways})] if ways else []), *(("--peer", {"peer": peer}) for peer in peers)]
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder, "results.jsonl")
        kept.touch()
        task = {"base": base, "data": data, "folder": folder, "until": begun + (seconds if only else 0.55 * seconds)}
        for side, what in sides:
            left, env = begun + seconds - time.time(), os.environ | {"PETOOL_LITE_RUNS": f"{folder}/runs"}
            if left > 40:
                line = [sys.executable, __file__, side, json.dumps(task | what)]
                with suppress(subprocess.TimeoutExpired):
                    subprocess.run(line, stdout=sys.stderr, env=env, timeout=left)
        return [json.loads(row) for row in kept.read_text().splitlines()]


def keep(task: Mapping[str, Any], result: dict[str, Any]) -> None:
    """Add a result to those of all processes, and show it."""
    with Path(task["folder"], "results.jsonl").open("a") as file:
        print(json.dumps(result), file=file)
    print("RESULT", json.dumps(result), flush=True)


def ours(task: Mapping[str, Any]) -> None:
    """Train each way through petool-lite's own `train`, and print its result."""
    from petool_lite.train.devices import grow_in_place

    grow_in_place()  # as train does, which is called too late here: what follows uses the GPU before
    import torch

    from petool_lite.errors import PetoolError
    from petool_lite.recipe import load_recipe
    from petool_lite.train import run as running

    planning: Any = sys.modules["petool_lite.train.memory"]
    reading = planning.prepare
    common = [f"model.base={task['base']}", f"data.train={task['data']}"]
    whole = torch.cuda.mem_get_info()[1]
    for number, (name, settings, updates, limit, length) in enumerate(task["ways"]):
        if number and time.time() > task["until"]:
            return
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit * GIB / whole) if limit else 1.0)
        planning.prepare = made_rows(Path(task["folder"]), length) if length else reading
        recipe = load_recipe("rating", [*common, *settings, f"train.max_steps={updates}", "train.save_every=0"])[1]
        try:  # what was chosen and what the dry step took is shown
            run = running.train("speed", recipe, lambda stage, done, total, _: total or print(stage, flush=True))
        except PetoolError as error:
            print("FAILED", name, error.message, error.hint, flush=True)
            continue
        keep(task, figures(name, run))


def figures(name: str, run: Path) -> dict[str, Any]:
    """What a run's metrics and manifest tell of its speed and memory, without its first update."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    manifest = json.loads((run / "manifest.json").read_text())
    way = manifest["memory"]
    kept = "checkpointing" if way["checkpointing"] else "all kept"
    return {
        "name": f"petool-lite, {name}",
        "how": f"{way['precision']}, {kept}, {way['token_budget']:,} tokens a micro-batch",
        "tokens_per_s": (rows[-1]["tokens"] - rows[0]["tokens"]) / (rows[-1]["seconds"] - rows[0]["seconds"]),
        "peak_gb": manifest["peak_memory_gb"],
        "held_gb": manifest["reserved_memory_gb"],
        "predicted_gb": way["peak_gb"],
        "updates_s": [row["seconds"] for row in rows],
        "losses": [round(row["loss"], 4) for row in rows],
    }


def made_rows(folder: Path, length: int) -> Any:
    """Stands for `prepare`: 36 rows of `length` tokens drawn by chance."""
    import random

    from datasets import Dataset, load_from_disk

    from petool_lite.prompt.prepare import Prepared

    draw = random.Random(0)
    ids = [[draw.randrange(1000, 100_000) for _ in range(length)] for _ in range(36)]
    rows = [{"entry_id": str(n), "input_ids": row, "answer_start": length - 36} for n, row in enumerate(ids)]
    Dataset.from_list(rows).save_to_disk(folder / "made")
    counts = {"kept": 36, "tokens": 36 * length, "loss_tokens": 36 * 36}
    return lambda *_, **__: Prepared(load_from_disk(folder / "made"), counts, (), "made")


def peer(task: Mapping[str, Any]) -> None:
    """Train one peer through TRL's trainer with the recipe's settings, and print its result."""
    name, engine, settings, batch, updates, kind = task["peer"]
    if engine == "unsloth":
        from unsloth import FastLanguageModel  # noqa: F401 - must come before transformers and trl
    import torch
    from datasets import Dataset
    from transformers import DataCollatorForSeq2Seq, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from petool_lite.recipe import load_recipe

    common = [f"model.base={task['base']}", f"data.train={task['data']}"]
    recipe = load_recipe("rating", [*common, *settings])[1]
    model, tokenizer = loaded(engine, task["base"], recipe)
    tokenizer.padding_side, tokenizer.pad_token = "right", tokenizer.pad_token or tokenizer.eos_token
    accumulate, packed = 16 if batch == 1 else 2, kind == "packed"
    rows = prepared_ids(recipe, (3 if packed else 1) * batch * accumulate * updates, kind, batch)
    seen: list[int] = []
    marks: list[tuple[float, int]] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            marks.append((time.time(), len(seen)))

    arguments = SFTConfig(
        output_dir=f"{task['folder']}/peer", per_device_train_batch_size=batch, bf16=True, report_to="none",
        gradient_accumulation_steps=accumulate, max_steps=updates, logging_steps=1, save_strategy="no",
        gradient_checkpointing=engine == "hf", optim=recipe.train.optimizer, learning_rate=recipe.train.learning_rate,
        weight_decay=recipe.train.weight_decay, max_grad_norm=recipe.train.clip_norm,
        **(
            {"packing": True, "max_length": 8192} if packed else
            {"max_length": None, "remove_unused_columns": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
        ),
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model, processing_class=tokenizer, train_dataset=Dataset.from_list(rows), callbacks=[Clock()],
        args=arguments, **({} if packed else {"data_collator": DataCollatorForSeq2Seq(tokenizer)}),
    )  # fmt: skip
    collate = trainer.data_collator

    def counted(members: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        seen.append(sum(len(row["input_ids"]) for row in members))
        return dict(collate(members))

    trainer.data_collator = counted
    if kind == "real" and batch > 1:  # rows of like lengths stay together
        trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(trainer.train_dataset)
    trainer.train()
    (begin, first), (end, last) = marks[0], marks[-1]
    keep(task, {
        "name": name,
        "how": f"{recipe.model.precision}, {'all kept' if recipe.model.precision == 'bf16' else 'checkpointing'}, "
        f"{batch} {kind} rows a micro-batch",
        "tokens_per_s": sum(seen[first:last]) / (end - begin),  # what is collated ahead is at most a micro-batch off
        "peak_gb": torch.cuda.max_memory_allocated() / GIB,
        "held_gb": torch.cuda.max_memory_reserved() / GIB,
        "updates_s": [round(time - marks[0][0], 2) for time, _ in marks],
    })  # fmt: skip


def loaded(engine: str, base: str, recipe: Any) -> tuple[Any, Any]:
    """The peer's model with a fresh adapter, and its tokenizer."""
    import torch

    lora = recipe.lora
    shape = {"r": lora.r, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout, "target_modules": lora.targets}
    if engine == "unsloth":
        from unsloth import FastLanguageModel

        nf4 = recipe.model.precision == "nf4"
        again, own = "unsloth" if nf4 else False, {"max_seq_length": 8192, "load_in_4bit": nf4}
        model, tokenizer = FastLanguageModel.from_pretrained(base, dtype=torch.bfloat16, **own)
        return FastLanguageModel.get_peft_model(model, use_gradient_checkpointing=again, **shape), tokenizer
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from petool_lite.inference.gpu import four_bits

    own = {"attn_implementation": "sdpa", "quantization_config": four_bits()}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, device_map={"": 0}, **own)
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=True)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **shape)), AutoTokenizer.from_pretrained(base)


def prepared_ids(recipe: Any, count: int, kind: str, batch: int) -> list[dict[str, Any]]:
    """The first rows as `kind` says: "equal" are cut at their beginning to the mean length, "packed" ones tell what TRL
    packs, and of the "real" ones those of a batch of several are of like lengths, the batches in any order."""
    import random

    from petool_lite.models import resolve_base
    from petool_lite.prompt.prepare import prepare
    from petool_lite.prompt.render import chat_from_directory

    base = resolve_base(recipe.model.base)
    table = prepare(recipe, base, chat_from_directory(base.directory)).table
    found = [table[index % len(table)] for index in range(count)]
    pairs = [(row["input_ids"], row["answer_start"]) for row in found]
    if kind == "packed":
        return [{"input_ids": ids, "completion_mask": [0] * start + [1] * (len(ids) - start)} for ids, start in pairs]
    rows = [{"input_ids": ids, "labels": [-100] * start + ids[start:]} for ids, start in pairs]
    lengths = [len(row["input_ids"]) for row in rows]
    if kind == "equal":
        mean = sum(lengths) // count
        longer = [row for row, length in zip(rows, lengths, strict=True) if length >= mean]
        return [{key: ids[-mean:] for key, ids in longer[index % len(longer)].items()} for index in range(count)]
    if batch == 1:
        return rows
    rows.sort(key=lambda row: len(row["input_ids"]))
    batches = [rows[start : start + batch] for start in range(0, count, batch)]
    random.Random(0).shuffle(batches)
    return [row for each in batches for row in each]


def main() -> None:
    """Run the comparison; print the table and the JSON line."""
    if len(sys.argv) == 3 and sys.argv[1] in ("--ours", "--peer"):
        (ours if sys.argv[1] == "--ours" else peer)(json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("data")
    parser.add_argument("--seconds", type=float, default=1200.0)
    names = [item[0] for item in (*WAYS, *PEERS)]
    parser.add_argument("--only", action="append", default=[], choices=names)
    options = parser.parse_args()
    found = measure(options.base, options.data, options.seconds, options.only)
    from petool_lite.bench.run import commit, machine
    from petool_lite.console import print_json, print_table
    from petool_lite.runs import versions

    rows = [
        [item["name"], item["how"], f"{item['tokens_per_s']:,.0f}", f"{item['peak_gb']:.2f} / {item['held_gb']:.2f}",
         f"{item['predicted_gb']:.2f}" if "predicted_gb" in item else ""] for item in found
    ]  # fmt: skip
    caption = "one run of each; peak is what tensors took, held what torch took for them"
    print_table(Path(options.base).name, ["", "how", "tokens/s", "peak / held GiB", "predicted GiB"], rows, caption)
    print_json({"commit": commit(), "machine": machine(gpu=True), "versions": versions(), "rows": found})


if __name__ == "__main__":
    main()
