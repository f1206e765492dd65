"""Typed PEToolBench entries and the parser of the published forms; nothing here touches a file.

A published prompt is kept as its own text, cut into head, history, middle, tools and tail. The two JSON
arrays are found by decoding, not by matching sentences, so a reworded prompt parses just as well, and
joining the pieces gives back the text byte for byte.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from petool_lite.errors import USAGE, PetoolError

SETTINGS = ("rating", "preferred", "chronological")
PROMPT_FIELD = {
    "rating": "instruction_ratings",
    "preferred": "instruction_preferred",
    "chronological": "instruction_chronological",
}
_DECODER = json.JSONDecoder()
_DEEPEST = 32  # nesting of parameters and defaults; the published ones have 3 levels
_STRAY = 200  # brackets in a prompt that open no JSON array, before it is given up: each costs a reading of the rest


@dataclass(frozen=True)
class Parameter:
    """One declared parameter of a tool; `type` is the published word, such as STRING or NUMBER."""

    name: str
    type: str
    description: str
    default: Any


@dataclass(frozen=True)
class Tool:
    """A candidate tool; `name` is `<category>.<provider>.<api>`."""

    name: str
    description: str
    required: tuple[Parameter, ...]
    optional: tuple[Parameter, ...]


@dataclass(frozen=True)
class ToolCall:
    """A call of one tool, as the model is to write it."""

    tool_name: str
    parameters: Mapping[str, Any]

    def to_json(self) -> str:
        """The one-line JSON reply in the published key order."""
        return json.dumps({"tool_name": self.tool_name, "parameters": dict(self.parameters)}, ensure_ascii=False)


@dataclass(frozen=True)
class Interaction:
    """One earlier call of the user; `rating` is 1, 0 or None (settings without ratings); `text` its JSON as found."""

    instruction: str
    call: ToolCall
    rating: int | None
    text: str


@dataclass(frozen=True)
class Prompt:
    """A published system prompt in pieces; `history_text` and `tools_text` are the arrays as they stand there."""

    head: str
    history: tuple[Interaction, ...]
    history_text: str
    middle: str
    tools: tuple[Tool, ...]
    tools_text: str
    tail: str

    @property
    def text(self) -> str:
        """The whole prompt."""
        return f"{self.head}{self.history_text}{self.middle}{self.tools_text}{self.tail}"

    def with_history(self, kept: Sequence[Interaction]) -> "Prompt":
        """The same prompt with only the `kept` interactions, each in its original text."""
        text = "[" + ", ".join(item.text for item in kept) + "]"
        return replace(self, history=tuple(kept), history_text=text)

    @property
    def tool_texts(self) -> tuple[str, ...]:
        """The JSON text of each candidate, as found; decoded anew at every call."""
        return tuple(_item_texts(self.tools_text))

    def with_tools(self, kept: Sequence[tuple[Tool, str]]) -> "Prompt":
        """The same prompt with these candidates in this order, each with its JSON text."""
        text = "[" + ", ".join(item_text for _, item_text in kept) + "]"
        return replace(self, tools=tuple(tool for tool, _ in kept), tools_text=text)


@dataclass(frozen=True)
class Entry:
    """One user request: the query, a system prompt for each setting at hand, and the right call if known.

    `equal_tools` names the other candidates that do the right tool's function; None where the file does not tell.
    `rejected` is the wrong answer of a preference row: one that is a call in the form of `ToolCall.to_json`, like the
    right one, any other as it stands.
    """

    id: str
    query: str
    prompts: Mapping[str, Prompt]
    gold: ToolCall | None
    function: str | None
    equal_tools: tuple[str, ...] | None = None
    rejected: str | None = None

    def prompt(self, setting: str) -> Prompt:
        """The prompt of `setting`; raises PetoolError if this entry has none."""
        if setting not in self.prompts:
            have = ", ".join(self.prompts)
            raise PetoolError(f"entry {self.id} has no prompt for the setting {setting}", f"it has: {have}")
        return self.prompts[setting]


def check_setting(setting: str) -> None:
    """Raise PetoolError for a word that is none of SETTINGS."""
    if setting not in SETTINGS:
        raise PetoolError(f"unknown setting: {setting}", f"one of: {', '.join(SETTINGS)}", USAGE)


def provider(tool_name: str) -> str:
    """`<category>.<provider>.<api>` -> provider; the name itself where it has another form."""
    parts = tool_name.split(">.<")
    return parts[1] if len(parts) >= 3 else tool_name


def call_default(parameter: Parameter) -> Any:
    """A parameter's default as a call writes it: the data declares those of numbers and booleans as text, too."""
    if isinstance(parameter.default, str) and parameter.type.upper() in ("NUMBER", "BOOLEAN"):
        try:
            value = json.loads(parameter.default.lower())
        except (ValueError, RecursionError):
            return parameter.default
        return value if isinstance(value, bool | int | float) else parameter.default
    return parameter.default


def balance(history: Sequence[Interaction], name: str) -> int:
    """Likes minus dislikes of the calls of the provider of tool `name`; a call without a rating counts as liked."""
    own = provider(name)
    return sum(-1 if item.rating == 0 else 1 for item in history if provider(item.call.tool_name) == own)


class _Fault(Exception):
    """A field that is not as expected; carries the field's path inside the entry."""

    def __init__(self, field: str, expected: str) -> None:
        super().__init__(f"{field}: expected {expected}")


def _get(value: Any, key: str, kind: type | tuple[type, ...], where: str, expected: str) -> Any:
    field = f"{where}.{key}" if where else key
    if not isinstance(value, Mapping) or key not in value:
        raise _Fault(field, f"{expected}, found nothing")
    found = value[key]
    if not isinstance(found, kind) or (isinstance(found, bool) and kind is int):
        raise _Fault(field, f"{expected}, found {type(found).__name__}")
    return found


def nested_beyond(value: Any, levels: int) -> bool:
    """Whether dicts and lists in `value` are nested more than `levels` deep; deep ones cannot be written as JSON."""
    level = [value]
    for _ in range(levels):
        level = [
            inner
            for item in level
            if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
    return bool(level)


def _shallow(value: Any, where: str) -> Any:
    """`value`, unless it is nested so deep that it cannot be written as JSON again."""
    if nested_beyond(value, _DEEPEST):
        raise _Fault(where, f"at most {_DEEPEST} levels of nesting")
    return value


def _call(value: Any, where: str) -> ToolCall:
    name = _get(value, "tool_name", str, where, "a tool name")
    parameters = _get(value, "parameters", dict, where, "an object of parameters")
    return ToolCall(name, _shallow(parameters, f"{where}.parameters"))


def _parameters(value: Any, key: str, where: str) -> tuple[Parameter, ...]:
    rows = _get(value, key, list, where, "a list of parameters")
    return tuple(
        Parameter(
            name=_get(row, "name", str, f"{where}.{key}[{index}]", "a parameter name"),
            type=_get(row, "type", str, f"{where}.{key}[{index}]", "a parameter type"),
            description=str(row.get("description", "")),
            default=_shallow(row.get("default", ""), f"{where}.{key}[{index}].default"),
        )
        for index, row in enumerate(rows)
    )


def _tool(value: Any, where: str) -> Tool:
    return Tool(
        name=_get(value, "tool_name", str, where, "a tool name"),
        description=str(value.get("tool_description", "")),
        required=_parameters(value, "required_parameters", where),
        optional=_parameters(value, "optional_parameters", where),
    )


def _arrays(text: str) -> Iterator[tuple[int, int, list[Any]]]:
    """Every outermost JSON array of objects (or empty array) in `text`: start, end, value."""
    position, stray = text.find("["), 0
    while position >= 0 and stray < _STRAY:
        try:
            value, end = _DECODER.raw_decode(text, position)
        except (ValueError, RecursionError):
            end, stray = position + 1, stray + 1
        else:
            if isinstance(value, list) and all(isinstance(item, dict) for item in value):
                yield position, end, value
        position = text.find("[", end)


def _item_texts(text: str) -> list[str]:
    """The texts of the items of a JSON array, as they stand in it."""
    texts: list[str] = []
    position = 1
    while True:
        while text[position] in " \t\r\n,":
            position += 1
        if text[position] == "]":
            return texts
        _, end = _DECODER.raw_decode(text, position)
        texts.append(text[position:end])
        position = end


def _parse_prompt(text: str, where: str) -> Prompt:
    history: tuple[int, int, list[Any]] | None = None
    tools: tuple[int, int, list[Any]] | None = None
    for start, end, value in _arrays(text):
        if value and all("required_parameters" in item for item in value):
            tools = start, end, value
            break
        if history is None and all("tool_call" in item for item in value):
            history = start, end, value
    if history is None:
        raise _Fault(where, "a JSON array of earlier calls before the tools")
    if tools is None:
        raise _Fault(where, "a JSON array of tools after the earlier calls")
    history_text = text[history[0] : history[1]]
    interactions = []
    for index, (row, row_text) in enumerate(zip(history[2], _item_texts(history_text), strict=True)):
        spot = f"{where}.history[{index}]"
        call = _call(_get(row, "tool_call", dict, spot, "an object"), f"{spot}.tool_call")
        rating = _get(row, "rating", int, spot, "0 or 1") if "rating" in row else None
        if rating not in (0, 1, None):
            raise _Fault(f"{spot}.rating", f"0 or 1, found {rating}")
        interactions.append(Interaction(_get(row, "instruction", str, spot, "a text"), call, rating, row_text))
    return Prompt(
        head=text[: history[0]],
        history=tuple(interactions),
        history_text=history_text,
        middle=text[history[1] : tools[0]],
        tools=tuple(_tool(row, f"{where}.tools[{index}]") for index, row in enumerate(tools[2])),
        tools_text=text[tools[0] : tools[1]],
        tail=text[tools[1] :],
    )


def _output_call(row: Mapping[str, Any], key: str) -> ToolCall:
    text = _get(row, key, str, "", "the answer, a JSON tool call")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _Fault(key, f"a JSON tool call ({error})") from error
    return _call(value, key)


def _rejected(row: Mapping[str, Any]) -> str | None:
    if "rejected" not in row:
        return None
    text = _get(row, "rejected", str, "", "the wrong answer, a text").strip()
    try:
        return _call(json.loads(text), "rejected").to_json()
    except (ValueError, RecursionError, _Fault):
        return str(text)


def _equal_tools(row: Mapping[str, Any], prompt: Prompt, gold: ToolCall | None) -> tuple[str, ...] | None:
    """The candidates among `apis_same_func`; None where that extra field is absent or has another form."""
    listed = row.get("apis_same_func")
    if gold is None or not isinstance(listed, list):
        return None
    parts = ("category_name", "tool_name", "api_name")
    if not all(isinstance(item, Mapping) and all(part in item for part in parts) for item in listed):
        return None
    same = {"<{category_name}>.<{tool_name}>.<{api_name}>".format_map(item) for item in listed} - {gold.tool_name}
    return tuple(tool.name for tool in prompt.tools if tool.name in same)


def _parse(row: Any, setting: str, index: int) -> Entry:
    if not isinstance(row, Mapping):
        raise _Fault("the entry", "an object")
    if "input" in row:  # a training row (output) or a preference row (chosen)
        prompt = _parse_prompt(_get(row, "instruction", str, "", "the system prompt"), "instruction")
        gold = _output_call(row, "chosen" if "chosen" in row else "output")
        return Entry(
            id=str(row.get("entry_id", index)),
            query=_get(row, "input", str, "", "a text"),
            prompts={setting: prompt},
            gold=gold,
            function=None,
            rejected=_rejected(row),
        )
    prompts = {
        name: _parse_prompt(_get(row, field, str, "", "the system prompt"), field)
        for name, field in PROMPT_FIELD.items()
        if field in row
    }
    if not prompts:
        raise _Fault(PROMPT_FIELD[setting], "the system prompt, found nothing")
    answer = _call(row["api_call_ground_truth"], "api_call_ground_truth") if "api_call_ground_truth" in row else None
    function = row.get("func")
    return Entry(
        id=str(row.get("entry_id", index)),
        query=_get(row, "query", str, "", "a text"),
        prompts=prompts,
        gold=answer,
        function=None if function is None else str(function),
        equal_tools=_equal_tools(row, next(iter(prompts.values())), answer),
    )


def parse_entry(row: Any, setting: str, source: str, index: int) -> Entry:
    """Parse one published test entry, training row or preference row.

    `setting` says which prompt a training row holds, and which one a test entry must hold. Raises PetoolError that
    names `source`, the entry and the field.
    """
    try:
        entry = _parse(row, setting, index)
    except _Fault as fault:
        identity = row.get("entry_id") if isinstance(row, Mapping) else None
        label = f"entry {index}" + (f" (entry_id {identity})" if identity is not None else "")
        raise PetoolError(f"{source}, {label}, {fault}", "the file is not in a PEToolBench format") from None
    entry.prompt(setting)
    return entry
