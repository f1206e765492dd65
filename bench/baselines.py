"""Baselines without a model, which say what an accuracy means: what chance, the first place or the likes alone reach.

They answer with a call of a candidate: its required parameters, each with its declared default, so their parameter
accuracy says how often defaults are the answer.
"""

import hashlib
import random
import re
from collections.abc import Callable

from petool_lite.data.entries import Entry, Tool, ToolCall, balance, call_default

Rule = Callable[[Entry, str], Tool]


def _random(entry: Entry, setting: str) -> Tool:
    """A candidate drawn by the entry's id, so that every shard and every run draws the same."""
    seed = hashlib.sha256(entry.id.encode()).hexdigest()
    return random.Random(seed).choice(entry.prompt(setting).tools)


def _first(entry: Entry, setting: str) -> Tool:
    return entry.prompt(setting).tools[0]


def _liked(entry: Entry, setting: str) -> Tool:
    prompt = entry.prompt(setting)
    return max(prompt.tools, key=lambda tool: balance(prompt.history, tool.name))


def _words(entry: Entry, setting: str) -> Tool:
    prompt, asked = entry.prompt(setting), _split(entry.query)
    return max(
        prompt.tools,
        key=lambda tool: (
            len(asked & _split(f"{tool.name} {tool.description}")),
            balance(prompt.history, tool.name),
        ),
    )


def _split(text: str) -> set[str]:
    """The words of a text in lower case, also those inside names such as getWeather_today."""
    parts = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text)
    return set(re.findall(r"[^\W_]+", parts.lower()))


RULES: dict[str, Rule] = {"rule-random": _random, "rule-first": _first, "rule-liked": _liked, "rule-words": _words}
ABOUT = {
    "rule-random": "no model: a tool drawn by lot",
    "rule-first": "no model: the first tool of the list",
    "rule-liked": "no model: the first tool of the provider with the most likes",
    "rule-words": "no model: the tool that shares most words with the request, of equals the better-liked provider's",
}


def rule_call(name: str, entry: Entry, setting: str) -> ToolCall:
    """What the baseline of that name answers."""
    tool = RULES[name](entry, setting)
    return ToolCall(tool.name, {item.name: call_default(item) for item in tool.required})
