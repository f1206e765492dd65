"""Requests for tools that come without any: what the tool's description says, as a user might ask for it, with values.

There are many more public tools than public calls. A request made of a description shares most of its words with the
tool, which real requests do not; it teaches to read what is offered, not how users talk.
"""

import re
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from petool_lite.data.entries import Tool, properties, required
from petool_lite.data.words import split_name

_ASKED = (
    "{what}", "{what}, please", "I need {what}", "I want {what}", "show me {what}", "I'm looking for {what}",
    "can you {all}?", "please {all}", "I want to {all}", "{all}", "could you {all} for me?", "help me {all}",
)  # fmt: skip
_STATED = ("{name} {value}", "{name}: {value}", "{name} is {value}", "with {name} {value}", "{value} as {name}")
_VERB = re.compile(r"^(?:retrieve|get|fetch|return|provide|show|find|list|display|access)s?\s+(?=\w)", re.IGNORECASE)
_DROPPED = re.compile(r"\b(?:the|a|an|given|specified|specific|certain|based on|information about|details of)\s+")
_WORDS = 20  # of a description that becomes a request


def described(tool: Tool, values: Mapping[str, Sequence[str]], rng: Random) -> tuple[str, dict[str, Any]] | None:
    """A request for `tool` and the arguments that it states; None for a tool that cannot be asked for in this way:
    with no description of a line, or a required parameter that is no plain value.

    `values` are texts by the last word of a parameter's name.
    """
    said = tool.description.split(". ")[0].strip(" .\n")
    if not 3 <= len(said.split()) <= _WORDS or not said.isascii():
        return None
    arguments: dict[str, Any] = {}
    for name, schema in properties(tool).items():
        if name in required(tool) or rng.random() < 0.25:
            value = _value(name, schema, values, rng)
            if value is not None:
                arguments[name] = value
            elif name in required(tool):
                return None
    whole = said[0].lower() + said[1:] if said[1:2].islower() else said
    what = _VERB.sub("", whole, count=1)
    forms = _ASKED[:6] if what != whole and rng.random() < 0.7 else _ASKED[6:]
    if rng.random() < 0.5:
        whole, what = _DROPPED.sub("", whole), _DROPPED.sub("", what)
    text = rng.choice(forms).format(what=what, all=whole)
    stated = [_said(name, value, rng) for name, value in arguments.items()]
    rng.shuffle(stated)
    text = ", ".join([text.rstrip("?"), *stated]) + ("?" if text.endswith("?") else rng.choice((".", ".", "")))
    return text[0].upper() + text[1:] if rng.random() < 0.8 else text, arguments


def _said(name: str, value: Any, rng: Random) -> str:
    text = {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
    return rng.choice(_STATED).format(name=" ".join(split_name(name)), value=text)


def _value(name: str, schema: Any, values: Mapping[str, Sequence[str]], rng: Random) -> Any:
    """A value that a schema allows; None where that is more than a choice, a number, a text or true or false."""
    if not isinstance(schema, Mapping) or {"pattern", "format", "$ref", "anyOf", "oneOf", "allOf"} & set(schema):
        return None
    kind = schema.get("type")
    if schema.get("enum"):
        return rng.choice(schema["enum"]) if kind == "string" else None
    if kind == "boolean":
        return rng.random() < 0.5
    if kind in ("integer", "number"):
        least, most = schema.get("minimum", 1), schema.get("maximum", 200)
        found = rng.randint(int(least), max(int(least), int(most)))
        return found if kind == "integer" or rng.random() < 0.6 or found + 0.5 > most else found + 0.5
    if kind != "string":
        return None
    own = values.get(split_name(name)[-1])
    return rng.choice(own or values[rng.choice(list(values))]) if values else None
