"""What `train_speed` and `curves` run in processes of their own: petool-lite's ways one after the other, and one peer.

Every one is told its changes to the recipe rating, and a peer takes LoRA shape, precision, optimizer and its settings
from there as petool-lite's own trainer does.
"""

OURS = """
import gc, json, os, sys, time
import torch
from petool_lite.errors import PetoolError
from petool_lite.recipe import load_recipe
from petool_lite.train import train
from petool_lite.train.devices import grow_in_place
from petool_lite.train.planner import LEAN

grow_in_place()  # as train does, which is called too late here: what follows uses the GPU before
started = float(os.environ["BENCH_STARTED"])
for number, way in enumerate(json.loads(sys.argv[1])):
    if number and time.time() > float(os.environ["BENCH_LIMIT"]):
        break
    first, start = [], []

    def report(stage, done, total, note):
        if stage == "training" and done == 1 and not first:
            first.append(time.time() - started)
        if total == 0:
            print(stage, file=sys.stderr)
            start.append([stage[:60], round(time.time() - started, 1)])

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        share = LEAN / torch.cuda.mem_get_info()[1] if way.get("held") else 1.0
        torch.cuda.set_per_process_memory_fraction(share)
    held = torch.cuda.memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    begun = time.time()
    try:
        run = train("bench", load_recipe("rating", way["settings"])[1], report)
    except PetoolError as error:
        print("FAILED", way["name"], error.message, error.hint, flush=True)
        continue
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    manifest = json.loads((run / "manifest.json").read_text())
    chosen = manifest["recipe"]
    settings = chosen["train"]
    way_text = [chosen["model"]["precision"], "checkpointing" if settings["checkpointing"] else "all kept"]
    away = "offload with q, k, v" if settings["offload_heads"] else "offload"
    way_text += [away] * settings["offload"] + [f"{settings['token_budget']:,} tokens"]
    seconds = rows[-1]["seconds"] - rows[0]["seconds"]
    print("RESULT", json.dumps({
        "name": "petool-lite, " + way["name"], "way": ", ".join(way_text),
        "tokens_per_s": (rows[-1]["tokens"] - rows[0]["tokens"]) / seconds, "peak_gb": manifest["peak_memory_gb"],
        "reserved_gb": manifest.get("reserved_memory_gb"), "held_before_gb": round(held, 2),
        "limit_gb": round(LEAN / 2**30, 1) if way.get("held") else None,
        "predicted": manifest["predicted"], "first_step_s": None if number else round(first[0], 1),
        "start": None if number else start, "updates_s": [row["seconds"] for row in rows],
        "seconds": round(time.time() - begun, 1), "losses": [round(row["loss"], 4) for row in rows],
        "tokens": [row["tokens"] for row in rows],
        "mean_tokens": manifest["data"]["tokens"] / manifest["data"]["kept"],
    }), flush=True)
"""

PEER = """
import json, sys, time
told = json.loads(sys.argv[1])
if told["engine"] == "unsloth":
    from unsloth import FastLanguageModel
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer
from petool_lite.recipe import load_recipe
from petool_lite.train.devices import arithmetic
from petool_lite.train.loop import optimizer_arguments

recipe = load_recipe("rating", told["settings"])[1]
seed, lora = recipe.train.seed, recipe.lora
shape = {"r": lora.r, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout, "target_modules": lora.targets}
gpu = torch.cuda.is_available()
four_bit, dtype = recipe.model.precision == "nf4", arithmetic()
if told["engine"] == "unsloth":
    model, tokenizer = FastLanguageModel.from_pretrained(
        told["base"], max_seq_length=8192, load_in_4bit=four_bit, dtype=dtype)
    model = FastLanguageModel.get_peft_model(
        model, use_gradient_checkpointing="unsloth", random_state=seed, **shape)
else:
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    torch.manual_seed(seed)
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                   bnb_4bit_compute_dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(
        told["base"], dtype=dtype, device_map={"": 0 if gpu else "cpu"}, attn_implementation="sdpa",
        quantization_config=quantized if four_bit else None)
    tokenizer = AutoTokenizer.from_pretrained(told["base"])
    if four_bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=True)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **shape))

rows = json.loads(open(told["data"]).read())
table = Dataset.from_list([{"input_ids": row["ids"], "start": row["start"]} for row in rows])
seen = []

def collate(batch):
    row, = batch
    ids = torch.tensor([row["input_ids"]])
    labels = ids.clone()
    labels[0, : row["start"]] = -100
    seen.append(ids.numel())
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

class Clock(TrainerCallback):
    marks = []
    def on_step_end(self, *_, **__):
        if gpu:
            torch.cuda.synchronize()
        self.marks.append((time.time(), len(seen)))

if not gpu:  # TRL computes the same loss by a Triton kernel
    SFTTrainer.compute_loss = Trainer.compute_loss
trainer = SFTTrainer(
    model=model, processing_class=tokenizer, train_dataset=table, data_collator=collate, callbacks=[Clock()],
    args=SFTConfig(
        output_dir=told["out"], per_device_train_batch_size=1, bf16=dtype == torch.bfloat16,
        gradient_accumulation_steps=recipe.train.batch_size * recipe.train.accumulate, report_to="none",
        max_steps=told["updates"], logging_steps=1,
        save_strategy="no", max_length=None, remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True}, use_cpu=not gpu, seed=seed, data_seed=seed,
        gradient_checkpointing=told["engine"] == "hf", **optimizer_arguments(recipe.train, told["updates"])))
learned = {str(weight.dtype).removeprefix("torch.") for weight in model.parameters() if weight.requires_grad}
trainer.train()
(begin, first), (end, last) = Clock.marks[0], Clock.marks[told["updates"] - 1]
# what is collated ahead of an update is at most one row off
tokens = sum(seen[first:last])
print("RESULT", json.dumps({
    "name": told["name"], "tokens_per_s": tokens / (end - begin), "seconds": round(end - begin, 1),
    "peak_gb": torch.cuda.max_memory_allocated() / 2**30 if gpu else 0.0,
    "reserved_gb": torch.cuda.max_memory_reserved() / 2**30 if gpu else None,
    "row_tokens": seen, "adapter_in": ", ".join(sorted(learned)),
    "losses": [round(float(log["loss"]), 4) for log in trainer.state.log_history if "loss" in log]}), flush=True)
if told.get("save"):
    model.save_pretrained(told["save"])
"""
