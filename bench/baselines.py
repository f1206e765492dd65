"""Baselines without a model, which say what an accuracy means: what chance, the first place or the likes alone reach.

They answer with a call of a candidate: its required parameters, each with its declared default, so their parameter
accuracy says how often defaults are the answer.
"""

import hashlib
import random
from collections.abc import Callable

from petool_lite.data.entries import Call, Entry, Tool, balance, properties, required, words


def _random(entry: Entry) -> Tool:
    """A candidate drawn by the entry's id, so that every shard and every run draws the same."""
    return random.Random(hashlib.sha256(entry.id.encode()).hexdigest()).choice(entry.tools)


def _words(entry: Entry) -> Tool:
    asked = words(entry.query)
    shared = {tool.name: len(asked & words(f"{tool.name} {tool.description}")) for tool in entry.tools}
    return max(entry.tools, key=lambda tool: (shared[tool.name], balance(entry, tool.name)))


_RULES: dict[str, tuple[Callable[[Entry], Tool], str]] = {
    "rule-random": (_random, "a tool drawn by lot"),
    "rule-first": (lambda entry: entry.tools[0], "the first tool of the list"),
    "rule-liked": (
        lambda entry: max(entry.tools, key=lambda tool: balance(entry, tool.name)),
        "the first tool of the provider with the most likes",
    ),
    "rule-words": (_words, "the tool that shares most words with the request, of equals the better-liked provider's"),
}
RULES = {name: f"no model: {about}" for name, (_, about) in _RULES.items()}  # with what each one is


def rule_call(name: str, entry: Entry) -> Call:
    """What the baseline of that name answers."""
    tool = _RULES[name][0](entry)
    schemas = properties(tool)
    return Call(tool.name, {key: schemas[key].get("default", "") for key in required(tool) if key in schemas})
