"""Looking at data before training on it: figures of a source, faults and leaks, and what a model sees of an entry."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from petool_lite.data.entries import DISLIKED, LIKED, Entry, Tool, providers
from petool_lite.data.files import Dataset
from petool_lite.errors import PetoolError
from petool_lite.prompt.render import STYLES, Chat, Example, Layout, prompt_text, spread

_NO_LIMIT = 10**9  # tokens


def stats(dataset: Dataset, chat: Chat) -> dict[str, Any]:
    """Figures of a source; prompt lengths in tokens of `chat`'s tokenizer, for every prompt style that it can have."""
    entries = dataset.entries
    verdicts = Counter(item.verdict for entry in entries for item in entry.history)
    rated = verdicts[LIKED] + verdicts[DISLIKED]
    found = {
        "entries": len(entries),
        "of": dataset.total,
        "bad": len(dataset.bad),
        "with_answer": sum(entry.answer is not None for entry in entries),
        "without_call": sum(isinstance(entry.answer, str) for entry in entries),
        "functions": len({entry.function for entry in entries if entry.function is not None}),
        "tools": spread([len(entry.tools) for entry in entries]),
        "history": spread([len(entry.history) for entry in entries]),
        "liked_percent": round(100 * verdicts[LIKED] / rated, 1) if rated else None,
        "history_of_offered_providers": spread([_bearing(entry) for entry in entries]),
    }
    for style in STYLES:
        layout = Layout(style, _NO_LIMIT)
        fit = [entry for entry in entries if style == "petool" or entry.published is not None]
        found[f"tokens_{style}"] = spread([len(chat.encode(prompt_text(chat, entry, layout))) for entry in fit])
    return found


def _bearing(entry: Entry) -> int:
    known = providers(entry)
    offered = {known[tool.name] for tool in entry.tools}
    return sum(known[item.call.name] in offered for item in entry.history)


def named_by(dataset: Dataset) -> dict[str, int]:
    """How the providers of the offered tools were read: how many were declared, of which form of name, or unknown."""
    found = Counter(
        "declared" if tool.provider else "unknown, the name alone" if owners[tool.name] == tool.name else _form(tool)
        for entry in dataset.entries
        for owners in [providers(entry)]
        for tool in entry.tools
    )
    return dict(found.most_common())


def _form(tool: Tool) -> str:
    name = tool.name
    if name.startswith("<"):
        return "<category>.<provider>.<api>"
    if name.startswith("mcp__"):
        return "mcp__server__tool"
    return next(f"server{joint}tool" for joint in ("__", ".", "/", "_") if joint in name)


def _decoder(chat: Chat) -> Callable[[list[int]], str]:
    if chat.decode is None:
        raise PetoolError("this tokenizer cannot turn ids into text")
    return chat.decode


def preview(chat: Chat, row: Example) -> dict[str, Any]:
    """The pieces that a coloured view needs: prompt text and each answer token as text."""
    decode = _decoder(chat)
    answer = [decode([token]) for token in row.ids[row.answer_start :]]
    return {
        "entry_id": row.entry_id,
        "prompt_tokens": row.answer_start,
        "loss_tokens": len(answer),
        "history_dropped": row.history_dropped,
        "prompt": decode(row.ids[: row.answer_start]),
        "answer": answer,
    }


def prompts_of(chat: Chat, entries: Mapping[str, Entry], style: str) -> Mapping[str, tuple[int, str]]:
    """For every setting of an entry: tokens and text of its prompt."""
    shown = {}
    for setting, entry in entries.items():
        ids = chat.encode(prompt_text(chat, entry, Layout(style, _NO_LIMIT)))
        shown[setting] = (len(ids), _decoder(chat)(ids))
    return shown
