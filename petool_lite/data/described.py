"""Training entries that ask for a tool by its own description: more functions than the queries of a file cover.

The user, the providers and what the user thinks of them come from a real entry; the job comes from the catalog. The
right tool and its equals become that job's tool under their own providers, so the label follows from the history as
before, and the query is written from the tool's description and made-up values of its parameters.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from petool_lite.data.entries import Entry, Parameter, Tool, ToolCall, provider
from petool_lite.data.rename import respelled, scrambled
from petool_lite.data.splits import api_words, function_words

_MOST_WORDS = 24  # of a description that becomes a query
_LEADS = re.compile(
    r"^(this|the) (endpoint|api|call|operation|method|function)('s)?( is used to| allows you to| lets you| will| can)? ",
    re.IGNORECASE,
)
_THIRD_PERSON = {"gets": "get", "fetches": "fetch", "lists": "list", "searches": "search", "finds": "find"}
_TO_GET = ("returns", "return", "provides", "provide", "retrieves", "gives", "shows", "displays", "grabs", "retuns")
_VERBS = frozenset(
    ["get", "fetch", "list", "search", "find", "retrieve", "show", "check", "create", "delete", "update", "add", "remove", "convert", "generate", "send", "download", "upload", "calculate", "compute", "translate", "validate", "verify", "query", "know", "see", "look", "read", "detect", "analyze", "extract", "log"]
)
_ASKED = ("I want to {}", "I want to {}", "I want to {}", "I need to {}", "{}", "Please {}", "Can you {}?", "to {}")
_NAMED = ("with {} {}", "for {} {}", "with the {} '{}'", "{} {}", "with {} = {}", "using {} {}")
_NUMBERS = ("NUMBER", "INTEGER")


@dataclass(frozen=True)
class Words:
    """Values to make up parameters from: texts that real requests named."""

    values: Sequence[str]


def spoken_values(entries: Sequence[Entry], setting: str) -> Words:
    """The string values of real calls that stand in their own requests, sorted."""
    found = set()
    for entry in entries:
        calls = [(item.instruction, item.call) for item in entry.prompt(setting).history]
        if entry.gold is not None:
            calls.append((entry.query, entry.gold))
        for query, call in calls:
            values = (value for value in call.parameters.values() if isinstance(value, str))
            found |= {value for value in values if len(value) > 1 and value in query}
    return Words(sorted(found))


def described(entry: Entry, setting: str, tools: Sequence[tuple[Tool, str]], words: Words, rng: Random) -> Entry | None:
    """`entry` with the job of one of `tools` in place of its own; None where a draw does not fit.

    `tools`: candidates with their JSON texts; leave out those whose function is tested elsewhere. Some of the other
    candidates are exchanged too. The label is unchecked: see `augment.validate`.
    """
    if entry.gold is None:
        return None
    prompt = entry.prompt(setting)
    gold, job = entry.gold.tool_name, rng.choice(tools)
    family = {gold, *(entry.equal_tools or ())}
    if entry.equal_tools is None:
        family |= {tool.name for tool in prompt.tools if function_words(tool.name) == function_words(gold)}
    made = {name: _as_offered_by(name, job, rng) for name in family}
    kept: list[tuple[Tool, str]] = []
    used = {provider(item.call.tool_name) for item in prompt.history}
    for tool, text in zip(prompt.tools, prompt.tool_texts, strict=True):
        other = rng.choice(tools) if rng.random() < 0.5 and provider(tool.name) not in used else (tool, text)
        kept.append(made[tool.name] if tool.name in family else other)
    names = [tool.name for tool, _ in kept]
    words_of_job = api_words(job[0].name)
    strangers = [tool for tool, _ in kept if tool.name not in {tool.name for tool, _ in made.values()}]
    if len(set(names)) < len(names) or any(api_words(tool.name) == words_of_job for tool in strangers):
        return None
    asked = _request(made[gold][0], words, rng)
    if asked is None:
        return None
    query, parameters = asked
    history = [item for item in prompt.history if item.call.tool_name not in names]
    return Entry(
        id=entry.id,
        query=query,
        prompts={setting: prompt.with_history(history).with_tools(kept)},
        gold=ToolCall(made[gold][0].name, parameters),
        function=f"described {function_words(job[0].name)}",
        equal_tools=tuple(
            made[name][0].name for name in family if name != gold and name in {t.name for t in prompt.tools}
        ),
    )


def _as_offered_by(name: str, job: tuple[Tool, str], rng: Random) -> tuple[Tool, str]:
    """The job's tool under the provider of tool `name`, its api spelled anew and its description whole or not."""
    tool, text = job
    category, api = tool.name.split(">.<")[0], tool.name.split(">.<")[-1].rstrip(">")
    fresh = f"{category}>.<{provider(name)}>.<{respelled(api, rng) if rng.random() < 0.5 else api}>"
    description = tool.description
    if rng.random() < 0.25:
        description = " ".join(sorted(api_words(tool.name), key=api.lower().find)).capitalize() + "."
    value = {**json.loads(text), "tool_name": fresh, "tool_description": description}
    return replace(tool, name=fresh, description=description), json.dumps(value, ensure_ascii=False)


def _request(tool: Tool, words: Words, rng: Random) -> tuple[str, dict[str, Any]] | None:
    """A query for the tool and the parameters it names; None where a value of an uncommon type would be needed."""
    said: list[str] = []
    parameters: dict[str, Any] = {}
    wanted = [(item, True) for item in tool.required] + [(item, False) for item in tool.optional]
    for item, required in wanted:
        if not required and (rng.random() < 0.5 or len(said) > 3):
            continue
        value = _value(item, words, rng)
        if value is None:
            if required:
                return None
            continue
        default = str(value) == str(item.default)
        parameters[item.name] = value
        if not (required and default and rng.random() < 0.5):  # what the query leaves out is the default
            said.append(rng.choice(_NAMED).format(" ".join(_split(item.name)), value))
    if len(said) > 6:
        return None
    rng.shuffle(said)
    joined = (" and " if rng.random() < 0.5 else ", ").join(said)
    asked = rng.choice(_ASKED).format(f"{_task(tool, rng)} {joined}".strip())
    asked = asked[0].upper() + asked[1:]
    return (asked if asked.endswith("?") or rng.random() < 0.2 else asked + "."), parameters


def _value(item: Parameter, words: Words, rng: Random) -> Any:
    """A value of the parameter's type: its default, one like it or one that a real request named."""
    kind, default = item.type.upper(), "" if item.default is None else str(item.default)
    if kind in _NUMBERS:
        if re.fullmatch(r"[0-9]{1,12}", default):
            return int(default if rng.random() < 0.3 else scrambled(default, rng))
        return rng.randrange(1, 10 ** rng.randrange(1, 6))
    if kind == "STRING":
        if default and len(default) <= 40 and rng.random() < 0.6:
            return default if rng.random() < 0.5 else scrambled(default, rng)
        return rng.choice(words.values) if words.values else None
    return default or None


def _split(name: str) -> list[str]:
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+", name)] or [name]


def _task(tool: Tool, rng: Random) -> str:
    """What the tool does, to stand after "I want to": from its description, or from its name where that says more."""
    api = tool.name.split(">.<")[-1].rstrip(">")
    sentence = re.split(r"(?<=[a-z0-9)])\. |\n|  ", tool.description.strip())[0].strip(" .#*_-")
    if not 2 < len(sentence.split()) <= _MOST_WORDS or rng.random() < 0.15:
        sentence = " ".join(_split(api))
    sentence = _LEADS.sub("", sentence)
    first, _, rest = sentence.partition(" ")
    plain = first.lower().strip(",.:")
    if plain in _TO_GET:
        return f"{rng.choice(('get', 'know', 'retrieve'))} {rest}"
    if plain in _THIRD_PERSON or plain in _VERBS:
        return f"{_THIRD_PERSON.get(plain, plain)} {rest}".strip()
    return f"{rng.choice(('get', 'know', 'see'))} {first.lower() if first.istitle() else first} {rest}".strip()
