"""OpenAI's requests, of chat completions and of responses, as one `Request` for the engine. Null means absent. What
is not done here is refused by the field's name; what changes nothing (decoding is greedy) is named in the answer."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from jsonschema import Draft202012Validator

from petool_lite.data.entries import Entry
from petool_lite.data.fields import Fault, kind_of
from petool_lite.data.openai import conversation, read_tools
from petool_lite.data.petoolbench import read_interaction
from petool_lite.inference.call import AUTO, CHOICES, REPLY_TOKENS, REQUIRED, CallOptions, Request

_TEXT, _NONE = {"const": "text"}, (False, "nothing, since this server has none")
_LIMIT = {"type": "integer", "minimum": -1, "maximum": (1 << 31) - 1, "not": {"const": 0}}, "a whole number or -1"
# What each field may hold, as JSON Schema and in words; the first ones would change the answer's form.
_FIELDS: dict[str, tuple[Any, str]] = {
    "n": ({"const": 1}, "1"),
    "logprobs": ({"const": False}, "false"),
    "top_logprobs": ({"const": 0}, "0"),
    "functions": ({"const": []}, "none; give tools"),
    "function_call": ({"const": "none"}, "none; give tool_choice"),
    "modalities": ({"const": ["text"]}, 'only "text"'),
    "response_format": ({"const": {"type": "text"}}, "the type text"),
    "text": ({"type": "object", "properties": {"format": {"properties": {"type": _TEXT}}}}, "the type text"),
    "background": ({"const": False}, "false"),
    **dict.fromkeys(("audio", "previous_response_id", "conversation", "prompt"), _NONE),
    **dict.fromkeys(("stream", "explain", "store"), ({"type": "boolean"}, "true or false")),
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "max_output_tokens"), _LIMIT),
    "at_least": ({"type": "number", "minimum": 0, "maximum": 1}, "a number from 0 to 1"),
    "stream_options": ({"type": "object"}, "an object"),
    "instructions": ({"type": "string"}, "a text"),
    "user": ({"type": ["string", "integer"]}, "a text"),
    "history": ({"type": "array"}, "a list of earlier calls"),
}
_READ = {*_FIELDS, "model", "messages", "input", "tools", "tool_choice"}


class Refusal(Exception):
    """A request that gets an error status; in OpenAI's form."""

    def __init__(self, status: int, what: str, field: str | None = None, kind: str = "invalid_request_error") -> None:
        super().__init__(what)
        self.status = status
        self.body = {"error": {"message": what, "type": kind, "param": field, "code": None}}


@dataclass(frozen=True)
class Asked:
    """A request as it was read."""

    request: Request
    stream: bool
    usage: bool
    unused: tuple[str, ...]  # fields that changed nothing
    remembers: bool = False  # reads what its user, who has a name, did earlier, and keeps the answer: no `store: false`


@contextmanager
def _refusing() -> Iterator[None]:
    """Refuse a field that is not as expected."""
    try:
        yield
    except Fault as fault:
        raise Refusal(400, str(fault), re.split(r"[:.[]", str(fault))[0]) from None


@_refusing()
def read_chat(body: Mapping[str, Any]) -> Asked:
    """A request of POST /v1/chat/completions; raises Refusal."""
    limit = next((name for name in ("max_completion_tokens", "max_tokens") if body.get(name) is not None), "max_tokens")
    return _read(body, body.get("messages"), limit)


@_refusing()
def read_responses(body: Mapping[str, Any]) -> Asked:
    """A request of POST /v1/responses; raises Refusal."""
    given = body.get("input")
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    if not isinstance(items, list):
        raise _wrong("input", "a text or a list of items", given)
    instructions = body.get("instructions")
    messages = [{"role": "system", "content": instructions}] if instructions else []
    for index, item in enumerate(items):
        messages += _message(item, f"input[{index}]")
    return _read(body, messages, "max_output_tokens")


def _message(item: Any, where: str) -> list[dict[str, Any]]:
    """An item of a response's input as chat messages."""
    kind = item.get("type", "message") if isinstance(item, Mapping) else None
    if kind == "message":
        return [{"role": item.get("role"), "content": item.get("content")}]
    if kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        return [{"role": "assistant", "tool_calls": [{"id": item.get("call_id"), "function": function}]}]
    if kind == "function_call_output":
        return [{"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")}]
    if kind == "reasoning":
        return []
    raise _wrong(f"{where}.type", "message, function_call or function_call_output", kind)


def _read(body: Mapping[str, Any], messages: Any, limit: str) -> Asked:
    given = {name: value for name, value in body.items() if value is not None}
    for name, (schema, expected) in _FIELDS.items():
        if name in given and not Draft202012Validator(schema).is_valid(given[name]):
            raise _wrong(name, expected, given[name])
    entry = _entry(body, messages)
    choice, only = _choice(body.get("tool_choice"), entry)
    user = None if "user" not in given else str(given["user"])
    tokens = int(given.get(limit, REPLY_TOKENS))
    asked = {"at_least": float(given.get("at_least", 0)), "explain": given.get("explain", False)}
    asked["reply_tokens"] = None if tokens < 0 else tokens  # -1 is as many as there is room for
    options = CallOptions(choice=choice, only=only, **asked)
    unused = tuple(name for name in given if name not in _READ or (name == "store" and user is None))
    usage = bool(given.get("stream_options", {}).get("include_usage"))
    remembers = user is not None and given.get("store", True)
    return Asked(Request(entry, options, user), given.get("stream", False), usage, unused, remembers)


def _entry(body: Mapping[str, Any], messages: Any) -> Entry:
    if not isinstance(messages, list) or not messages:
        raise _wrong("messages", "a list of at least one message", messages)
    listed = body.get("tools") or []
    for index, tool in enumerate(listed if isinstance(listed, list) else []):
        if isinstance(tool, Mapping) and tool.get("type", "function") not in ("function", None):
            raise _wrong(f"tools[{index}].type", "function", tool["type"])
    if not (tools := read_tools(listed)):
        raise Fault("tools", "at least one; this model calls tools and does nothing else")
    entry, rows = conversation(messages, tools, "the request"), enumerate(body.get("history") or ())
    earlier = tuple(read_interaction(row, f"history[{index}]") for index, row in rows)
    if not entry.query.strip() and not (entry.turns and entry.turns[-1]["role"] == "tool"):
        raise Fault("messages", "a text of the role user, or a tool's result, at the end")
    return replace(entry, history=earlier + entry.history)


def _choice(value: Any, entry: Entry) -> tuple[str, tuple[str, ...] | None]:
    """How tools may be chosen, and the names of those that may be called; None for all."""
    if value is None or (isinstance(value, str) and value in CHOICES):
        return value or AUTO, None
    found = value if isinstance(value, Mapping) else {}
    if found.get("type") == "function":
        found = {"mode": REQUIRED, "tools": [found]}
    found = found.get("allowed_tools", found)
    listed = found.get("tools") if isinstance(found, Mapping) and found.get("mode") in (AUTO, REQUIRED) else None
    if not isinstance(listed, list) or not listed:
        wanted = f'{", ".join(CHOICES)}, one function, or allowed_tools with a mode of "auto" or "required" and tools'
        raise _wrong("tool_choice", wanted, value)
    functions = [item.get("function", item) if isinstance(item, Mapping) else None for item in listed]
    names = [item.get("name") if isinstance(item, Mapping) else None for item in functions]
    if unknown := [name for name in names if name not in [tool.name for tool in entry.tools]]:
        raise _wrong("tool_choice", "the name of an offered tool", unknown[0])
    return str(found["mode"]), tuple(map(str, names))


def _wrong(field: str, expected: str, found: Any) -> Fault:
    said = repr(found)[:60] if isinstance(found, str | int | float) else kind_of(found)
    return Fault(field, f"{expected}, found {said}")
