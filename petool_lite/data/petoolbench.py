"""PEToolBench's published forms: prompts with two JSON arrays in them, found by decoding, so that a reworded one parses
as well. A published type such as STRING becomes JSON Schema; what that cannot say stays under `x-published`."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from petool_lite.data.entries import DISLIKED, LIKED, Call, Entry, Interaction, Published, Tool, properties, required
from petool_lite.data.fields import Fault, call, get, json_text, json_values, sound, text

PROMPT_FIELD = {
    "rating": "instruction_ratings", "preferred": "instruction_preferred", "chronological": "instruction_chronological",
}  # fmt: skip
_DECODER, _line = json.JSONDecoder(), partial(json.dumps, ensure_ascii=False)
_STRAY = 200  # brackets in a prompt that open no JSON array, before it is given up: each costs a reading of the rest
_TYPES = {"STRING": "string", "NUMBER": "number", "BOOLEAN": "boolean", "OBJECT": "object", "ARRAY": "array"}
_WORDS = {kind: word for word, kind in _TYPES.items()} | {"integer": "NUMBER"}
_BESIDE = "x-published"  # what a published parameter says that its schema does not: {"type", "default"}


def is_row(row: Mapping[str, Any]) -> bool:
    """Whether a row is a published test entry, training row or preference row."""
    return ("instruction" in row and "input" in row) or any(field in row for field in PROMPT_FIELD.values())


def settings_of(row: Any) -> tuple[str, ...]:
    """The settings that a test entry has a prompt for."""
    return tuple(name for name, field in PROMPT_FIELD.items() if isinstance(row, Mapping) and field in row)


def parse(row: Mapping[str, Any], setting: str, identity: str) -> Entry:
    """One published row in one setting; `identity` is its id where it has none. Raises Fault."""
    trains = "input" in row  # a training row (output) or a preference row (chosen, rejected)
    field, asked = ("instruction", "input") if trains else (PROMPT_FIELD[setting], "query")
    prompt = get(row, field, str, "", "the system prompt")
    calls = list[tuple[int, int, list[Any]]]()
    for first, last, listed in _arrays(prompt):
        if listed and all("required_parameters" in item for item in listed):
            break
        calls += [(first, last, listed)] if all("tool_call" in item for item in listed) else []
    else:
        raise Fault(field, "a JSON array of tools after the earlier calls")
    if not calls:
        raise Fault(field, "a JSON array of earlier calls before the tools")
    start, end, made = calls[0]
    texts = [tuple(prompt[a:b] for a, b, _ in json_values(prompt, array + 1)) for array in (start, first)]
    history = tuple(read_interaction(item, f"{field}.history[{index}]", setting) for index, item in enumerate(made))
    tools = tuple(read_tool(item, f"{field}.tools[{index}]") for index, item in enumerate(listed))
    answer, function = _answer(row, trains), row.get("func")
    rejected: Call | str | None = None
    if "rejected" in row:
        rejected = str(get(row, "rejected", str, "", "the wrong answer, a text")).strip()
        with suppress(Fault):  # a text that is no call
            rejected = call(json_text(rejected, "rejected", ""), "rejected", "tool_name", "parameters")
    name, query = str(sound(row.get("entry_id", identity), "entry_id")), get(row, asked, str, "", "a text")
    function = None if function is None else str(sound(function, "func"))
    known: dict[str, Any] = {"equal_tools": _equal_tools(row, tools, answer), "rejected": rejected}
    pieces = Published(prompt[:start], texts[0], prompt[end:first], texts[1], prompt[last:])
    return Entry(name, query, tools, history, answer, function=function, **known, published=pieces, setting=setting)


def prompt_of(pieces: Published) -> str:
    """The published prompt."""
    return f"{pieces.head}[{', '.join(pieces.history)}]{pieces.middle}[{', '.join(pieces.tools)}]{pieces.tail}"


def published_entry(entry: Entry, wording: Sequence[str], setting: str) -> Entry:
    """Any entry with a published prompt of its own: `wording` is the text before, between and after the two arrays."""
    head, middle, tail = wording
    calls = [interaction_row(item, rated=setting == "rating") for item in entry.history]
    tools = [published_tool(tool) for tool in entry.tools]
    pieces = Published(head, tuple(map(_line, calls)), middle, tuple(map(_line, tools)), tail)
    return replace(entry, published=pieces, setting=setting)


def published_call(answer: Call | str | None) -> dict[str, Any] | None:
    """A call in the form that the published scorers compare; None for an answer without a call."""
    return {"tool_name": answer.name, "parameters": dict(answer.arguments)} if isinstance(answer, Call) else None


def interaction_row(item: Interaction, rated: bool) -> dict[str, Any]:
    """An earlier call in the published form; unrated use counts as liked where ratings are asked for."""
    row = {"instruction": item.query, "tool_call": published_call(item.call)}
    return row | ({"rating": int(item.verdict != DISLIKED)} if rated else {})


def read_tool(value: Any, where: str) -> Tool:
    """A tool in the published form. Raises Fault."""
    schemas, needed, again = dict[str, Any](), dict[str, None](), list[tuple[str, Any]]()
    for key in ("required_parameters", "optional_parameters"):
        for index, row in enumerate(get(value, key, list, where, "a list of parameters")):
            spot = f"{where}.{key}[{index}]"
            name = get(row, "name", str, spot, "a parameter name")
            schema = _schema(sound(row, spot), spot)
            again += [] if schemas.setdefault(name, schema) is schema else [(name, schema)]
            needed |= {name: None} if key == "required_parameters" else {}
    name, about = get(value, "tool_name", str, where, "a tool name"), text(value, "tool_description", where)
    declared = {"type": "object", "properties": schemas, "required": list(needed)}
    return Tool(name, about, declared | ({_BESIDE: again} if again else {}))


def published_tool(tool: Tool) -> dict[str, Any]:
    """A tool in the published form; for one that was read from it, what stood there."""
    rows = {name: _published_parameter(name, schema) for name, schema in properties(tool).items()}
    needed = required(tool)
    return {
        "tool_name": tool.name,
        "tool_description": tool.description,
        "required_parameters": [row for name, row in rows.items() if name in needed],
        "optional_parameters": [row for name, row in rows.items() if name not in needed]
        + [_published_parameter(*declared) for declared in tool.parameters.get(_BESIDE, ())],
    }


def _schema(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A published parameter as JSON Schema. A default declared as text becomes the value that a call would have."""
    word = text(row, "type", where) or "STRING"
    schema: dict[str, Any] = {"type": _TYPES.get(word.upper(), "string")}
    if about := text(row, "description", where):
        schema["description"] = about
    if (default := row.get("default", "")) not in ("", None):
        schema["default"] = default
        if isinstance(default, str) and schema["type"] in ("number", "boolean"):  # declared as text, called as a value
            with suppress(ValueError, RecursionError):
                value = json.loads(default.lower())
                schema["default"] = value if isinstance(value, bool | int | float) and value == value else default
    back = _published_parameter("", schema)
    beside = {key: row[key] for key in ("type", "default") if key in row and _line(back[key]) != _line(row[key])}
    if schema["type"] in ("number", "boolean") and isinstance(schema.get("default", default), str):
        beside["default"] = default  # answers write it as it stands, though it is of another type
    return schema | ({_BESIDE: beside} if beside else {})


def _published_parameter(name: str, schema: Any) -> dict[str, Any]:
    schema = schema if isinstance(schema, Mapping) else {}
    kind, default = schema.get("type"), schema.get("default")
    default = "" if default is None else default  # null is no default
    about = str(schema.get("description") or "")
    if choices := schema.get("enum"):
        about = f"{about} One of {_line(choices)}.".strip()
    told = kind in ("number", "boolean", "integer") and not isinstance(default, str)
    shown = {"type": _WORDS.get(str(kind), "STRING"), "description": about}
    return {"name": name, **shown, "default": _line(default) if told else default} | dict(schema.get(_BESIDE) or {})


def _arrays(prompt: str) -> Iterator[tuple[int, int, list[Any]]]:
    """Every outermost JSON array of objects (or empty array) in `prompt`: start, end, value."""
    position, stray = prompt.find("["), 0
    while position >= 0 and stray < _STRAY:
        try:
            value, end = _DECODER.raw_decode(prompt, position)
        except (ValueError, RecursionError):
            end, stray = position + 1, stray + 1
        else:
            if isinstance(value, list) and all(isinstance(item, dict) for item in value):
                yield position, end, value
        position = prompt.find("[", end)


def read_interaction(row: Any, where: str, setting: str = "rating") -> Interaction:
    """An earlier call in the published form; in the preferred setting each was liked. Raises Fault."""
    made = call(get(row, "tool_call", dict, where, "an object"), f"{where}.tool_call", "tool_name", "parameters")
    rating = get(row, "rating", int, where, "0 or 1") if "rating" in row else None
    if rating not in (0, 1, None):
        raise Fault(f"{where}.rating", f"0 or 1, found {rating}")
    verdict = {1: LIKED, 0: DISLIKED, None: LIKED if setting == "preferred" else None}[rating]
    return Interaction(get(row, "instruction", str, where, "a text"), made, verdict)


def _answer(row: Mapping[str, Any], trains: bool) -> Call | None:
    key = ("chosen" if "chosen" in row else "output") if trains else "api_call_ground_truth"
    if not trains and key not in row:
        return None
    told = "a JSON tool call"
    value = json_text(get(row, key, str, "", f"the answer, {told}"), key, told) if trains else row[key]
    return call(value, key, "tool_name", "parameters")


def _equal_tools(row: Mapping[str, Any], tools: Sequence[Tool], answer: Call | str | None) -> tuple[str, ...] | None:
    """The tools among `apis_same_func`; None where that extra field is absent or has another form."""
    with suppress(KeyError, TypeError):
        listed = [(one["category_name"], one["tool_name"], one["api_name"]) for one in row["apis_same_func"]]
        same = {f"<{category}>.<{provider}>.<{api}>" for category, provider, api in listed}
        others = (tool.name for tool in tools if tool.name in same)
        return tuple(name for name in others if name != answer.name) if isinstance(answer, Call) else None
    return None
