"""Looking at data before training on it: figures of a source, and what a model sees of an entry."""

import sys
from collections import Counter
from itertools import pairwise
from typing import Any

from petool_lite.data.entries import DISLIKED, LIKED, Tool, bearing, providers
from petool_lite.data.files import Dataset
from petool_lite.data.splits import function_keys
from petool_lite.prompt.render import STYLES, Chat, Example, Layout, prompt_text, spread


def stats(dataset: Dataset, chat: Chat) -> dict[str, Any]:
    """Figures of a source; prompt lengths in tokens of `chat`'s tokenizer, for every prompt style that it can have."""
    entries = dataset.entries
    verdicts = Counter(item.verdict for entry in entries for item in entry.history)
    rated = verdicts[LIKED] + verdicts[DISLIKED]
    found = {
        **{"entries": len(entries), "of": dataset.total, "bad": len(dataset.bad)},
        "with_answer": sum(entry.answer is not None for entry in entries),
        "without_call": sum(isinstance(entry.answer, str) for entry in entries),
        "functions": len({key for keys in function_keys(entries, entries) for key in keys}),
        "tools": spread([len(entry.tools) for entry in entries]),
        "history": spread([len(entry.history) for entry in entries]),
        "liked_percent": round(100 * verdicts[LIKED] / rated, 1) if rated else None,
        "history_of_offered_providers": spread([len(bearing(entry)) for entry in entries]),
    }
    for style in STYLES:
        layout = Layout(style, sys.maxsize)
        if fit := [entry for entry in entries if style == "petool" or entry.published is not None]:
            found[f"tokens_{style}"] = spread([len(chat.encode(prompt_text(chat, entry, layout))) for entry in fit])
    return found


def named_by(dataset: Dataset) -> dict[str, int]:
    """How the providers of the offered tools were read: how many were declared, of which form of name, or unknown."""
    owners = ((tool, known[tool.name]) for e in dataset.entries for known in [providers(e)] for tool in e.tools)
    return dict(Counter(_form(tool, owner) for tool, owner in owners).most_common())


def _form(tool: Tool, owner: str) -> str:
    if tool.provider or owner == tool.name:
        return "declared" if tool.provider else "unknown, the name alone"
    for start, form in (("<", "<category>.<provider>.<api>"), ("mcp__", "mcp__server__tool")):
        if tool.name.startswith(start):
            return form
    return next(f"server{joint}tool" for joint in ("__", ".", "/", "_") if joint in tool.name)


def preview(chat: Chat, row: Example) -> dict[str, Any]:
    """The pieces that a coloured view needs: stretches that are read, as one text, and learned tokens one by one."""
    assert chat.decode is not None  # a chat from a directory has one
    pieces: list[dict[str, Any]] = []
    for number, (start, end) in enumerate(pairwise([0, *row.earlier, row.answer_start, len(row.ids)])):
        learned = number % 2 == 1
        parts = [[token] for token in row.ids[start:end]] if learned else [row.ids[start:end]]
        pieces += [{"text": chat.decode(part), "learned": learned} for part in parts]
    counts = {"tokens": len(row.ids), "loss_tokens": row.learned, "history_dropped": row.history_dropped}
    return {"entry_id": row.entry_id, **counts, "pieces": pieces}
