"""Rules without a model, which say what an accuracy means: what chance, the first place or the likes alone reach.

They answer with a call of a candidate: its required parameters, each with its declared default, so their parameter
accuracy says how often defaults are the answer. Only rule-likely takes the query's values: it answers with what the
compact prompt repeats after the query, so a model trained on that prompt is worth what it adds to this rule.
"""

import hashlib
import json
import random
from collections.abc import Callable
from typing import Any

from petool_lite.data.entries import Entry, Parameter, Tool, ToolCall, balance
from petool_lite.data.jobs import jobs, likeliest
from petool_lite.data.values import drafted

Rule = Callable[[Entry, str], Tool]
Reading = Callable[[Tool, str], dict[str, Any]]


def _random(entry: Entry, setting: str) -> Tool:
    """A candidate drawn by the entry's id, so that every shard and every run draws the same."""
    seed = hashlib.sha256(entry.id.encode()).hexdigest()
    return random.Random(seed).choice(entry.prompt(setting).tools)


def _first(entry: Entry, setting: str) -> Tool:
    return entry.prompt(setting).tools[0]


def _liked(entry: Entry, setting: str) -> Tool:
    """The first candidate of the provider with the most likes less dislikes in the history."""
    prompt = entry.prompt(setting)
    return max(prompt.tools, key=lambda tool: balance(prompt.history, tool.name))


def _history(entry: Entry, setting: str) -> Tool:
    """The first candidate of the first job, as the compact prompt lists them; the query is not read."""
    return jobs(entry.prompt(setting), setting)[0].tools[0]


def _likely(entry: Entry, setting: str) -> Tool:
    """The candidate that the compact prompt repeats after the query: history and query speak for it."""
    return likeliest(entry.prompt(setting), entry.query, setting)


def _silent(tool: Tool, query: str) -> dict[str, Any]:
    """Of the query nothing is read."""
    return {}


# How a rule chooses the tool, and what it takes from the query for the parameters.
RULES: dict[str, tuple[Rule, Reading]] = {
    "rule-random": (_random, _silent),
    "rule-first": (_first, _silent),
    "rule-liked": (_liked, _silent),
    "rule-history": (_history, _silent),
    "rule-likely": (_likely, drafted),
}


def rule_call(name: str, entry: Entry, setting: str) -> ToolCall:
    """What the rule of that name answers."""
    choose, read = RULES[name]
    tool = choose(entry, setting)
    return ToolCall(tool.name, {item.name: _default(item) for item in tool.required} | read(tool, entry.query))


def _default(parameter: Parameter) -> object:
    """A default as a call writes it; the data declares those of numbers and booleans as text."""
    if isinstance(parameter.default, str) and parameter.type.upper() in ("NUMBER", "BOOLEAN"):
        try:
            value: object = json.loads(parameter.default.lower())
        except ValueError:
            return parameter.default
        return value if isinstance(value, bool | int | float) else parameter.default
    return parameter.default
