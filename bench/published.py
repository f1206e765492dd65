"""The published table of the rating setting, and which of our runs may stand beside it.

Figures: PEToolLLM (arXiv 2502.18980) and the published Llama-3.2-3B fine-tune. Notes: what the evaluation scripts
published with them do differently from this bench.
"""

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

SETTING, ENTRIES = "rating", 1000
_FILES = ("user_entries_test.json", "user_entries_test_r.json")
SOURCE = "published, not run here"

NOTES = {
    "a": "Prompts are cut after 4,000 tokens, so the end of the tools and the request itself is lost in long ones; "
    "here nothing is cut in silence: old history is dropped whole and counted.",
    "b": "Replies are sampled: temperature 0.1 for the open models, the service's default for GPT; "
    "here decoding is greedy.",
    "c": "Run through a service without a pinned version; calls that failed or took over 10 s are left out of the "
    "denominator, and replies are brought to Unicode NFKC before scoring.",
    "d": "The system prompt is sent inside the user's message.",
    "e": "A plain USER/ASSISTANT prompt instead of the tokenizer's chat template.",
    "f": "Trained in two stages, SFT and then DPO, and scored as a bf16 merge.",
    "g": "Weights in NF4, greedy, prompts cut after 8,192 tokens; its scorer lets the match span lines "
    "(our figures by that scorer: `spanning`).",
}

# name, tool, parameters, notes: the scripts' protocol as far as they show it
ROWS = (
    ("Vicuna-7B", 10.80, 57.40, "abe"),
    ("Mistral-7B", 15.40, 63.20, "abd"),
    ("Qwen2.5-7B", 24.80, 66.50, "ab"),
    ("LLaMA3-8B", 26.90, 77.70, "ab"),
    ("GPT-4o-mini", 38.40, 77.70, "bc"),
    ("GPT-4o", 45.70, 79.60, "bc"),
    ("PEToolLLaMA", 78.40, 89.70, "abf"),
    ("Llama-3.2-3B-Instruct", 20.90, 49.20, "g"),
    ("Llama-3.2-3B-Instruct SFT", 78.70, 94.10, "g"),
)


def partial_reasons(rows: Sequence[Mapping[str, Any]], meta: Mapping[str, Any]) -> list[str]:
    """Why a variant was not scored on the whole of its data; empty if it was."""
    total, found = meta["data"]["total"], []
    if meta.get("limit") and meta["limit"] < total:
        found.append(f"limited to {meta['limit']} of {total:,} entries")
    if meta.get("shard"):
        found.append("one shard of the data")
    if len(rows) < meta["entries"] or not meta["complete"]:
        found.append(f"{len(rows):,} of {meta['entries']:,} entries so far")
    broken = sum(row["status"] == "engine_error" for row in rows)
    if broken:
        found.append(f"the engine failed on {broken:,} entries, which are not scored")
    return found


def not_published_data(meta: Mapping[str, Any]) -> str:
    """Why a variant's data is not the published rating test set; empty if it is, by file name and number of entries."""
    data = meta["data"]
    name = PurePosixPath(data["source"].replace("\\", "/")).name.removesuffix(".zip")
    if meta["setting"] != SETTING:
        return f"the published table is of the {SETTING} setting"
    if name not in _FILES or data["total"] != ENTRIES:
        return f"{data['source']} with {data['total']:,} entries is not the published test set"
    return ""


def published_table(variants: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The published rows with their notes, and the names of our variants that may stand beside them.

    A partial run or other data never does; `left_out` says why. Without any of ours there is no table: `rows` is empty.
    """
    ours = [item["name"] for item in variants if not item["partial"] and not item["other_data"]]
    left_out = {
        item["name"]: (["partial: " + "; ".join(item["partial"])] if item["partial"] else [])
        + ([item["other_data"]] if item["other_data"] else [])
        for item in variants
        if item["name"] not in ours
    }
    rows = [
        {"name": name, "tool_acc": tool, "param_acc": param, "notes": list(notes)} for name, tool, param, notes in ROWS
    ]
    return {
        "source": SOURCE,
        "ours": ours,
        "rows": rows if ours else [],
        "notes": NOTES if ours else {},
        "left_out": left_out,
    }
