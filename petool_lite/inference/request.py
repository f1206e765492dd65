"""Requests in the published JSON shapes, or in OpenAI's, as an Entry for the one renderer."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from petool_lite.data.entries import PROMPT_FIELD, SETTINGS, Entry, check_setting, parse_entry, provider
from petool_lite.errors import PetoolError

# JSON schema's words for types as the published data has them; the data knows no integers apart from numbers.
_TYPES = {
    "string": "STRING",
    "number": "NUMBER",
    "integer": "INTEGER",
    "boolean": "BOOLEAN",
    "array": "ARRAY",
    "object": "OBJECT",
}


def request_entry(query: str, tools: Any, history: Any, setting: str) -> Entry:
    """An entry from a query, a list of tools and a list of earlier calls in the published shapes.

    Its prompt has the structure of a published one but not its wording, so it suits the compact style only.
    Raises PetoolError that names the field that is not as expected.
    """
    check_setting(setting)
    if not isinstance(tools, list) or not tools:
        raise PetoolError("tools: expected a list of at least one tool", "objects with tool_name, ...")
    if not isinstance(history, list):
        raise PetoolError("history: expected a list of earlier calls", "objects with instruction, tool_call, rating")
    for name, items, key in (("tools", tools, "required_parameters"), ("history", history, "tool_call")):
        for index, item in enumerate(items):
            if not isinstance(item, Mapping) or key not in item:
                raise PetoolError(
                    f"{name}[{index}]: expected an object with {key}",
                    "the README shows both lists; a whole published entry goes to --request",
                )
    text = f"{json.dumps(history)}\n{json.dumps(tools)}"
    return parse_entry({"query": query, PROMPT_FIELD[setting]: text}, setting, "the request", 0)


def published_entry(row: Mapping[str, Any], setting: str | None) -> Entry:
    """An entry from a published test entry, or from a training row with or without its answer. Raises PetoolError.

    Without a `setting` a test entry needs any prompt, and the history of a training row says which setting it is of.
    """
    if "instruction" not in row:
        held = [name for name, field in PROMPT_FIELD.items() if field in row]
        return parse_entry(row, setting or (held or SETTINGS)[0], "the request", 0)
    query, first = row.get("query", row.get("input")), setting or SETTINGS[0]
    entry = parse_entry({"query": query, PROMPT_FIELD[first]: row["instruction"]}, first, "the request", 0)
    prompt = entry.prompt(first)
    told = choose_setting([{"rating": item.rating} for item in prompt.history], setting, None)
    return replace(entry, prompts={told: prompt})


def choose_setting(history: Sequence[Any], chosen: str | None, trained: str | None) -> str:
    """The chosen setting, else the one that the model was trained in, else what the history's ratings suggest."""
    rated = any(isinstance(item, Mapping) and item.get("rating") is not None for item in history)
    return chosen or trained or ("rating" if rated or not history else "preferred")


def tools_from_openai(tools: Any) -> list[dict[str, Any]]:
    """OpenAI's `tools` in the published shape; a tool in the published shape stays as it is.

    Raises PetoolError for what is neither.
    """
    if not isinstance(tools, list) or not tools:
        raise PetoolError("tools: expected a list of at least one tool", "this model answers with a call and only that")
    return [_from_openai(tool, index) for index, tool in enumerate(tools)]


def _from_openai(tool: Any, index: int) -> dict[str, Any]:
    if isinstance(tool, Mapping) and "required_parameters" in tool:
        return dict(tool)
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise PetoolError(f"tools[{index}].function.name: expected a name", 'a tool is {"type": "function", ...}')
    schema = function.get("parameters") or {}
    properties = schema.get("properties", {}) if isinstance(schema, Mapping) else None
    if not isinstance(properties, Mapping) or not all(isinstance(item, Mapping) for item in properties.values()):
        raise PetoolError(f"tools[{index}].function.parameters.properties: expected an object of schemas")
    required = schema.get("required") or []
    if not isinstance(required, list):
        raise PetoolError(f"tools[{index}].function.parameters.required: expected a list of names")
    rows = {name: _parameter(name, item) for name, item in properties.items()}
    return {
        "tool_name": function["name"],
        "tool_description": str(function.get("description") or ""),
        "required_parameters": [row for name, row in rows.items() if name in required],
        "optional_parameters": [row for name, row in rows.items() if name not in required],
    }


def _parameter(name: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    kind = schema.get("type", "string")
    choices = schema.get("enum")
    about = str(schema.get("description") or "") + (f" One of {json.dumps(choices)}." if choices else "")
    default = schema.get("default", "")
    return {
        "name": name,
        "type": _TYPES.get(kind if isinstance(kind, str) else "string", "STRING"),
        "description": about.strip(),
        "default": default if isinstance(default, str) else json.dumps(default),
    }


def ratings_of(entry: Entry, setting: str, tool_name: str) -> dict[str, Any]:
    """What the history says of a tool's provider: counts of ratings and the earlier calls, the latest last."""
    calls = [item for item in entry.prompt(setting).history if provider(item.call.tool_name) == provider(tool_name)]
    ratings = [item.rating for item in calls]
    return {
        "liked": ratings.count(1),
        "disliked": ratings.count(0),
        "unrated": ratings.count(None),
        "calls": [
            {"instruction": item.instruction, "tool_name": item.call.tool_name, "rating": item.rating} for item in calls
        ],
    }
