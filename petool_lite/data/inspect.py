"""Looking at data before training on it: figures of a source, faults and leaks, and what a model sees of an entry."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from petool_lite.data.entries import SETTINGS, Entry, provider
from petool_lite.data.files import Dataset
from petool_lite.errors import PetoolError
from petool_lite.prompt.render import STYLES, Chat, Example, Layout, prompt_ids, spread

_NO_LIMIT = 10**9  # tokens


def stats(dataset: Dataset, setting: str, chat: Chat) -> dict[str, Any]:
    """Figures of a source in one setting; prompt lengths in tokens of `chat`'s tokenizer, for every prompt style."""
    entries = dataset.entries
    prompts = [entry.prompt(setting) for entry in entries]
    ratings = Counter(item.rating for prompt in prompts for item in prompt.history)
    rated = ratings[0] + ratings[1]
    found = {
        "entries": len(entries),
        "of": dataset.total,
        "bad": len(dataset.bad),
        "with_answer": sum(entry.gold is not None for entry in entries),
        "functions": len({entry.function for entry in entries if entry.function is not None}),
        "candidates": spread([len(prompt.tools) for prompt in prompts]),
        "history": spread([len(prompt.history) for prompt in prompts]),
        "liked_percent": round(100 * ratings[1] / rated, 1) if rated else None,
        "history_of_candidates_providers": spread([_bearing(prompt) for prompt in prompts]),
    }
    for style in STYLES:
        layout = Layout(setting, style, _NO_LIMIT)
        found[f"tokens_{style}"] = spread([len(fitted[0]) for e in entries if (fitted := prompt_ids(chat, e, layout))])
    return found


def _bearing(prompt: Any) -> int:
    providers = {provider(tool.name) for tool in prompt.tools}
    return sum(provider(item.call.tool_name) in providers for item in prompt.history)


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


def three_prompts(chat: Chat, entry: Entry, style: str) -> Mapping[str, tuple[int, str]]:
    """For every setting that the entry has: tokens and text of its prompt."""
    decode = _decoder(chat)
    shown = {}
    for setting in SETTINGS:
        if setting in entry.prompts:
            fitted = prompt_ids(chat, entry, Layout(setting, style, _NO_LIMIT))
            if fitted:
                shown[setting] = (len(fitted[0]), decode(fitted[0]))
    return shown
