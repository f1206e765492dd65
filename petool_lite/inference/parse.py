"""The strict reading of a reply: one call of an offered tool with its declared parameters, or a failure with a name.

`read_call` is also what the strict score of `bench` reads; the published scorer has rules of its own (scorer).
"""

import json
from collections.abc import Sequence
from typing import Any

from petool_lite.data.entries import Tool, ToolCall
from petool_lite.errors import PetoolError

NO_CALL, BAD_JSON, UNKNOWN_TOOL = "no_call", "bad_json", "unknown_tool"
MISSING_PARAMETER, EXTRA_PARAMETER, CUT_OFF = "missing_parameter", "extra_parameter", "cut_off"
ENGINE = "engine_error"
FAILURES = (NO_CALL, BAD_JSON, UNKNOWN_TOOL, MISSING_PARAMETER, EXTRA_PARAMETER, CUT_OFF, ENGINE)


class CallFailure(PetoolError):
    """A reply that is no valid call, or no reply at all; `kind` is one of FAILURES, `reply` the text as it came."""

    def __init__(self, kind: str, message: str, reply: str = "", hint: str = "") -> None:
        super().__init__(message, hint)
        self.kind = kind
        self.reply = reply


def read_call(reply: str, finish: str = "stop") -> ToolCall:
    """The call that the whole of `reply` consists of, of whatever tool; raises CallFailure for any other form."""
    if finish == "length":
        raise CallFailure(CUT_OFF, f"the reply reached its limit: ...{reply[-60:]}", reply, "allow a longer reply")
    value = _object(reply)
    name, parameters = value.get("tool_name"), value.get("parameters")
    if set(value) != {"tool_name", "parameters"} or not isinstance(name, str) or not isinstance(parameters, dict):
        raise CallFailure(NO_CALL, f"the reply is no tool call: {reply[:80]}", reply)
    return ToolCall(name, parameters)


def parse_call(reply: str, tools: Sequence[Tool], finish: str = "stop") -> ToolCall:
    """The call that `reply` consists of; raises CallFailure. `finish` is the engine's, "stop" or "length"."""
    call = read_call(reply, finish)
    name, parameters = call.tool_name, call.parameters
    tool = next((item for item in tools if item.name == name), None)
    if tool is None:
        raise CallFailure(UNKNOWN_TOOL, f"the reply calls a tool that was not offered: {name}", reply)
    missing = [item.name for item in tool.required if item.name not in parameters]
    if missing:
        raise CallFailure(MISSING_PARAMETER, f"the call of {name} lacks {', '.join(missing)}", reply)
    extra = sorted(set(parameters) - {item.name for item in tool.required + tool.optional})
    if extra:
        raise CallFailure(EXTRA_PARAMETER, f"{name} declares no {', '.join(extra)}", reply)
    return call


def failure(reply: str, tools: Sequence[Tool], finish: str) -> str | None:
    """The kind of failure of a reply, or None for a valid call."""
    try:
        parse_call(reply, tools, finish)
    except CallFailure as found:
        return found.kind
    return None


def _object(reply: str) -> dict[str, Any]:
    text = reply.strip()
    if not text.startswith("{"):
        raise CallFailure(NO_CALL, f"the reply is no tool call: {text[:80]}", reply)
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise CallFailure(BAD_JSON, f"the reply is not JSON: {error}", reply) from error
    return value if isinstance(value, dict) else {}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return found


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")
