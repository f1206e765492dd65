"""What an answer must hold, and which answers are surely wrong: for `data check` and for pairs of DPO."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random

from petool_lite.data.entries import Entry, Parameter, Tool, ToolCall, balance, provider
from petool_lite.data.splits import function_words


def answer_faults(entry: Entry, setting: str) -> list[str]:
    """What is wrong with an entry's answer against its declaration, as short sentences; empty for a sound one."""
    if entry.gold is None:
        return ["no answer"]
    named = [tool for tool in entry.prompt(setting).tools if tool.name == entry.gold.tool_name]
    if len(named) != 1:
        return [f"the answer's tool is offered {len(named)} times"]
    extra = sorted(entry.gold.parameters.keys() - _declared(named[0]).keys())
    missing = [item.name for item in named[0].required if item.name not in entry.gold.parameters]
    found = [f"the answer gives {name}, which its tool does not declare" for name in extra]
    return found + [f"the answer lacks the required {name}" for name in missing]


def equal_tools(entry: Entry, setting: str) -> tuple[str, ...] | None:
    """The offered tools that do what the right one does, itself among them; None where nothing tells.

    The entry's own list where it has one; else the tools of the same category and function words, if there are any
    besides the right one.
    """
    if entry.gold is None:
        return None
    right = entry.gold.tool_name
    if entry.equal_tools is not None:
        return (right, *(name for name in entry.equal_tools if name != right))
    words = function_words(right)
    names = [tool.name for tool in entry.prompt(setting).tools if function_words(tool.name) == words]
    return tuple(names) if len(names) > 1 else None


def wrong_providers(entry: Entry, setting: str) -> list[ToolCall]:
    """The right call made of each equal tool of another provider that the user likes less: sure to be wrong.

    Where the entry does not list its equal tools, only those of a disliked provider count. The parameters must be
    declared alike. In the chronological setting, where ratings are not told, only listed tools are taken.
    """
    prompt, gold = entry.prompt(setting), entry.gold
    right = next((tool for tool in prompt.tools if gold is not None and tool.name == gold.tool_name), None)
    if gold is None or right is None:
        return []
    listed, likes = entry.equal_tools is not None, balance(prompt.history, right.name)
    ceiling = likes if listed else min(likes, 0)
    equal = equal_tools(entry, setting) or ()
    return [
        ToolCall(tool.name, gold.parameters)
        for tool in prompt.tools
        if tool.name in equal
        and provider(tool.name) != provider(right.name)
        and _declared_alike(gold.parameters, right, tool)
        and (balance(prompt.history, tool.name) < ceiling if setting != "chronological" else listed)
    ]


def with_rejected(entries: Sequence[Entry], setting: str, seed: int) -> list[Entry]:
    """The entries that have a wrong answer to reject: their own, or one drawn from `wrong_providers`.

    Left out are entries without one, and those whose own wrong answer is the right one.
    """
    result = []
    for entry in entries:
        if entry.rejected is None and (wrong := wrong_providers(entry, setting)):
            entry = replace(entry, rejected=Random(f"{seed} {entry.id} rejected").choice(wrong).to_json())
        if entry.rejected is not None and entry.gold is not None and entry.rejected != entry.gold.to_json():
            result.append(entry)
    return result


def _declared(tool: Tool) -> dict[str, Parameter]:
    return {item.name: item for item in (*tool.required, *tool.optional)}


def _declared_alike(parameters: Mapping[str, object], old: Tool, new: Tool) -> bool:
    """Whether both tools declare each parameter with the same type and `new` requires no other."""
    before, after = _declared(old), _declared(new)
    alike = all(key in before and key in after and before[key].type == after[key].type for key in parameters)
    return alike and all(item.name in parameters for item in new.required)
