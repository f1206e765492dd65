"""Examples of calls that entries hold, which users are simulated from: a request, the called tool and its arguments."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from petool_lite.data.answers import answer_faults
from petool_lite.data.entries import DISLIKED, Call, Entry, Tool, properties

_LONGEST = 1500  # characters of a request; longer ones are documents
_COUNTED = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Example:
    """A call of the corpus: what was asked, the called tool, its arguments, and the tools that were offered beside."""

    query: str
    tool: Tool
    arguments: Mapping[str, Any]
    others: tuple[Tool, ...]


def examples_of(entries: Sequence[Entry]) -> list[Example]:
    """The entries' calls, and earlier ones of tools that any of the entries offers, each once.

    Those without a call, with a very long request, disliked, or against their own declaration are no examples. Where
    nothing tells a value (see `_told`) it is left out, and so is the call where its tool needs that value.
    """
    offers = {tool.name: entry for entry in reversed(entries) for tool in entry.tools}
    found: dict[str, Example] = {}
    for entry in entries:
        answer: Any = entry.answer
        calls = [(entry.query, answer, entry)] if isinstance(answer, Call) else []
        calls += [(one.query, one.call, offers[one.call.name]) for one in entry.history
                  if one.verdict != DISLIKED and one.call.name in offers]  # fmt: skip
        for query, call, offer in calls:
            tools = [tool for tool in offer.tools if tool.name == call.name]
            if len(tools) != 1 or not 0 < len(query) <= _LONGEST:
                continue
            given = {name: call.arguments[name] for name in call.arguments if _told(name, call, query, tools[0])}
            call = Call(call.name, given)
            known = f"{query}\n{call.to_json()}"
            if known in found or answer_faults(Entry("", query, (tools[0],), (), call)):
                continue
            others = tuple(tool for tool in offer.tools if tool is not tools[0])
            found[known] = Example(query, tools[0], given, others)
    return list(found.values())


def _told(name: str, call: Call, query: str, tool: Tool) -> bool:
    """Whether the request or the parameter's declaration tells what a call gives for it; true and false are choices.

    In half of some public corpora it does not, and who learns from them invents values.
    """
    said = f"{query} {json.dumps(properties(tool).get(name), ensure_ascii=False)}"
    plain, digits = f" {_plain(said)} ", said.replace(",", "")

    def told(value: Any) -> bool:
        if isinstance(value, Mapping):
            return all(map(told, value.values()))
        if isinstance(value, list):
            return all(map(told, value))
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            return True
        if isinstance(value, str):
            return f" {_plain(value)} " in plain if _plain(value) else True
        number = str(value).removesuffix(".0")
        if number in list("0123456789") and f" {_COUNTED[int(number)]} " in plain:
            return True
        return f"{value * 100:g}%" in digits or bool(re.search(rf"(?<![\d.]){re.escape(number)}(?!\d|\.\d)", digits))

    return told(call.arguments[name])


def _plain(text: str) -> str:
    return re.sub(r"[\W_]+", " ", text.lower()).strip()
