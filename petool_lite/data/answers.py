"""What an answer must hold, which tools would do as well, and which answers are surely wrong."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import Any

from petool_lite.data.entries import Call, Entry, Tool, balance, name_words, properties, providers, required
from petool_lite.data.schema import value_faults


def answer_faults(entry: Entry) -> list[str]:
    """What is wrong with an entry's answer against its declaration, as short sentences; empty for a sound one.
    PEToolBench's answers are held to names of parameters only: its types are loose."""
    if entry.answer is None:
        return ["there is no answer"]
    if not isinstance(entry.answer, Call):
        return []
    named = [tool for tool in entry.tools if tool.name == entry.answer.name]
    if len(named) != 1:
        return [f"the called tool {entry.answer.name} is offered {len(named)} times"]
    given, declared = entry.answer.arguments, properties(named[0])
    loose = entry.published is None and named[0].parameters.get("additionalProperties", False) is not False
    undeclared = [] if loose else [name for name in given if name not in declared]
    found = [f"it gives {name}, which its tool does not declare" for name in undeclared]
    found += [f"it lacks the required {name}" for name in required(named[0]) if name not in given]
    return found if found or entry.published is not None else schema_faults(entry)


def schema_faults(entry: Entry) -> list[str]:
    """Where an entry's call is not of its tool's schema, as short sentences."""
    if not isinstance(made := entry.answer, Call):
        return []
    called = (tool for tool in entry.tools if tool.name == made.name)
    return next((value_faults(tool.parameters, dict(made.arguments)) for tool in called), [])


def function_words(tool_name: str) -> str:
    """Words that stand for a tool's function where none is numbered: its category, if any, and its name's words."""
    category = f"{tool_name.split('>.<')[0].lstrip('<')}: " if tool_name.startswith("<") and ">.<" in tool_name else ""
    return f"{category}{' '.join(sorted(name_words(tool_name)))}"


def equal_tools(entry: Entry) -> tuple[str, ...] | None:
    """The offered tools that do what the right one does, itself first; None where nothing tells. The entry's own list
    where it has one; else the tools of the same function words, if there are any."""
    if not isinstance(entry.answer, Call):
        return None
    right = entry.answer.name
    if entry.equal_tools is not None:
        return (right, *(name for name in entry.equal_tools if name != right))
    words = function_words(right)
    others = [tool.name for tool in entry.tools if tool.name != right and function_words(tool.name) == words]
    return (right, *others) if others else None


def wrong_providers(entry: Entry) -> list[Call]:
    """The right call made of each equal tool, declared alike, of another provider that the user likes less: sure to be
    wrong. Unless they are listed as equal, only those of disliked providers, and none in the chronological setting."""
    answer, equal = entry.answer, equal_tools(entry) or ()
    right = next((tool for tool in entry.tools if tool.name in equal[:1]), None)
    if not isinstance(answer, Call) or right is None:
        return []
    given, known = answer.arguments, providers(entry)
    listed, likes = entry.equal_tools is not None, balance(entry, right.name)
    ceiling = likes if listed else min(likes, 0)

    def types(tool: Tool) -> dict[str, Any]:
        declared = ((name, item) for name, item in properties(tool).items() if name in given)
        return {name: item.get("type") if isinstance(item, Mapping) else item for name, item in declared}

    return [
        Call(tool.name, given)
        for tool in entry.tools
        if tool.name in equal
        and known[tool.name] != known[right.name]
        and types(right) == types(tool)  # each argument is declared alike, and no other is required
        and {*required(tool)} <= given.keys() == types(tool).keys()
        and (balance(entry, tool.name) < ceiling if entry.setting != "chronological" else listed)
    ]


def with_rejected(entries: Sequence[Entry], seed: int) -> list[Entry]:
    """The entries with an answer and a wrong one to reject: their own, or one of `wrong_providers`."""
    result = []
    for entry in entries:
        if entry.rejected is None and (wrong := wrong_providers(entry)):
            entry = replace(entry, rejected=Random(f"{seed} {entry.id} rejected").choice(wrong))
        if entry.rejected not in (None, entry.answer) and entry.answer is not None:
            result.append(entry)
    return result
