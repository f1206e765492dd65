"""Rows of a results file: what an entry asks, what a reply was, and facts that explain it; format in docs/bench.md."""

import hashlib
import struct
from collections.abc import Sequence
from typing import Any

from petool_lite.bench.results import SCHEMA

from petool_lite.data.answers import equal_tools
from petool_lite.data.entries import Entry, Prompt, provider
from petool_lite.inference.constrain import declared
from petool_lite.inference.llama import Reply
from petool_lite.inference.parse import failure


def ids_sha256(ids: Sequence[int]) -> str:
    """SHA-256 of token ids as little-endian uint32, as hex: equal where two engines read the same prompt."""
    return hashlib.sha256(struct.pack(f"<{len(ids)}I", *ids)).hexdigest()


def entry_row(index: int, entry: Entry, setting: str) -> dict[str, Any]:
    """What a row says of the entry itself; `prompt_sha256` is of the text until a row of an engine replaces it."""
    assert entry.gold is not None  # checked before any model is loaded
    prompt = entry.prompt(setting)
    gold = {"tool_name": entry.gold.tool_name, "parameters": dict(entry.gold.parameters)}
    text = f"{prompt.text}\n{entry.query}"
    return {
        "schema": SCHEMA,
        "index": index,
        "entry_id": entry.id,
        "setting": setting,
        "prompt_sha256": hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(),
        "gold": gold,
        "facts": _facts(entry, prompt, entry.gold.tool_name, setting),
    }


def _facts(entry: Entry, prompt: Prompt, gold: str, setting: str) -> dict[str, Any]:
    tool = next((tool for tool in prompt.tools if tool.name == gold), None)
    parameters = declared(tool)[0] if tool else ()
    own = [item.rating for item in prompt.history if provider(item.call.tool_name) == provider(gold)]
    rated = [rating for rating in own if rating is not None]
    return {
        "offered": [item.name for item in prompt.tools],
        "same_job": list(equal_tools(entry, setting) or ()),
        "declared": [item.name for item in parameters],
        "history_length": len(prompt.history),
        "liked_share": round(sum(rated) / len(rated), 4) if rated else None,
        "defaults": {item.name: item.default for item in parameters},
    }


def reply_row(reply: Reply, ids: Sequence[int], entry: Entry, setting: str) -> dict[str, Any]:
    """What a row says of a model's reply to the prompt `ids`."""
    return {
        "status": "ok",
        "prompt_sha256": ids_sha256(ids),
        "prompt_tokens": len(ids),
        "reply": reply.text,
        "reply_tokens": len(reply.ids),
        "finish": reply.finish,
        "failure": failure(reply.text, entry.prompt(setting).tools, reply.finish),
        "cached_tokens": min(reply.reused_tokens, len(ids)),
        "prefill_s": round(reply.prefill_s, 4),
        "decode_s": round(reply.decode_s, 4),
        "seconds": round(reply.prefill_s + reply.decode_s, 4),
    }


def unread_row(status: str) -> dict[str, Any]:
    """A row without a reply: the prompt is too long even without history, or the engine failed."""
    return {
        "status": status,
        "prompt_tokens": 0,
        "reply": "",
        "reply_tokens": 0,
        "finish": "stop",
        "failure": None,
        "cached_tokens": 0,
        "prefill_s": 0.0,
        "decode_s": 0.0,
        "seconds": 0.0,
        "cold": False,
        "batch": 1,
        "history_dropped": 0,
    }
