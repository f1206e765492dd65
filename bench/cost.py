"""What a variant costs: times, speeds, memory and size, from its rows and meta."""

from collections.abc import Mapping, Sequence
from typing import Any

from petool_lite.bench.stats import quantile


def cost(rows: Sequence[Mapping[str, Any]], meta: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds a call (median and 95th percentile, cold and warm apart), tokens/s, GB and bytes; None where unknown.

    A call is cold if nothing of its prompt was in the engine's memory. Prefill counts the tokens that were read, not
    those that were reused. A batch on a GPU shares its time among its rows. Variants without an engine cost nothing.
    """
    gpu = meta.get("gpu") or {}
    runs = [row for row in rows if row["status"] == "ok"] if meta["engine"] != "none" else []
    read = sum(max(0, row["prompt_tokens"] - row.get("cached_tokens", 0)) for row in runs)
    return {
        "cold": _times([row for row in runs if row.get("cold")]),
        "warm": _times([row for row in runs if not row.get("cold")]),
        "prefill_tokens_per_s": _rate(read, sum(row["prefill_s"] for row in runs)),
        "decode_tokens_per_s": _rate(sum(row["reply_tokens"] for row in runs), sum(row["decode_s"] for row in runs)),
        "reused_share": _rate(sum(row.get("cached_tokens", 0) for row in runs), sum(r["prompt_tokens"] for r in runs)),
        "peak_memory_gb": meta.get("peak_memory_gb") if runs else None,
        "model_bytes": meta.get("model_bytes") or None,
        "wall_seconds": meta.get("seconds"),
        "gpu_batch": gpu.get("batch"),
        "gpu_tokens_per_s": gpu.get("tokens_per_s"),
        "gpu_memory_gb": gpu.get("memory_gb"),
        "gpu_flips": gpu.get("flips"),
        "gpu_flips_checked": gpu.get("flips_checked"),
        "gpu_flips_by_batch": gpu.get("flips_by_batch"),
    }


def _times(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    seconds = [row["seconds"] for row in rows]
    return {"n": len(seconds), "median_s": quantile(seconds, 0.5), "p95_s": quantile(seconds, 0.95)}


def _rate(amount: float, seconds: float) -> float | None:
    return round(amount / seconds, 4) if seconds > 0 and amount > 0 else None
