"""The strict reading of a reply: a call of an offered tool with its declared parameters, a plain text, or a failure.
Both forms of a call are read: petool's, {"name": ..., "arguments": {...}} between <tool_call> and </tool_call>, and the
published line {"tool_name": ..., "parameters": {...}}. The published scorer has rules of its own (bench)."""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from petool_lite.data.entries import Answer, Call, Tool, properties, required
from petool_lite.data.fields import Fault, sound
from petool_lite.errors import PetoolError
from petool_lite.prompt.render import CALL_END, CALL_START

NO_CALL, BAD_JSON, UNKNOWN_TOOL = "no_call", "bad_json", "unknown_tool"
MISSING_PARAMETER, EXTRA_PARAMETER, CUT_OFF = "missing_parameter", "extra_parameter", "cut_off"
ENGINE = "engine_error"
_FORMS = ({"name", "arguments"}, {"tool_name", "parameters"}, {"name", "parameters"})
OPEN, CLOSE = CALL_START.strip(), CALL_END.strip()  # one token each in some vocabularies
_BY_SCHEMA = ("additionalProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref")


class CallFailure(PetoolError):
    """A reply that is no valid answer, or none at all; `kind` is one of the words above, `reply` the text."""

    def __init__(self, kind: str, message: str, reply: str = "", hint: str = "") -> None:
        super().__init__(message, hint)
        self.kind, self.reply = kind, reply


def check_names(tools: Sequence[Tool]) -> None:
    """Raise PetoolError where no tool is offered, or two of one name: which one a reply calls could not be told."""
    if not tools:
        raise PetoolError("no tool is offered, so there is nothing to call", "give at least one tool")
    double = [name for name, count in Counter(tool.name for tool in tools).items() if count > 1]
    if double:
        raise PetoolError(f"two tools have the name {double[0]}", "give each tool a name of its own")


def read_answer(reply: str, finish: str = "stop") -> Answer:
    """The answer that the whole of `reply` is: a call of whatever tool, or a plain text; raises CallFailure."""
    text = reply.strip()
    if not text.startswith(("{", OPEN)) and OPEN not in text and text:
        return text
    if finish == "length":
        hint = "allow a longer one, --reply-tokens; one that repeats itself is of a model that never learned such tools"
        raise CallFailure(CUT_OFF, f"the reply reached its limit: ...{reply[-60:]}", reply, hint)
    if text.startswith(OPEN):
        text, closed, after = text.removeprefix(OPEN).strip().rpartition(CLOSE)
        if not closed or after:
            raise CallFailure(BAD_JSON, f"the reply's call does not end with {CLOSE}", reply)
    text, value = text.strip(), None
    if text.startswith("{"):
        try:
            value = sound(json.loads(text, object_pairs_hook=_once), "")
        except (ValueError, RecursionError, Fault) as error:
            raise CallFailure(BAD_JSON, f"the reply is not JSON: {error}", reply) from error
    value = value if isinstance(value, dict) else {}
    name = value.get("name", value.get("tool_name"))
    arguments = value.get("arguments", value.get("parameters"))
    if set(value) not in _FORMS or not isinstance(name, str) or not isinstance(arguments, dict):
        raise CallFailure(NO_CALL, f"the reply is no tool call: {reply[:80]}", reply)
    return Call(name, arguments)


def parse_call(reply: str, tools: Sequence[Tool], finish: str = "stop", text: bool = False) -> Answer:
    """The answer that `reply` is: a call of one of `tools`, or where `text` is allowed a text that says no tool fits.
    `finish` is the engine's, "stop" or "length". Raises CallFailure for anything else."""
    call = read_answer(reply, finish)
    if isinstance(call, str):
        if text:
            return call
        kind, what = (CUT_OFF, "reached its limit") if finish == "length" else (NO_CALL, "is no tool call")
        raise CallFailure(kind, f"the reply {what}: {reply[:80]}", reply)
    tool = next((item for item in tools if item.name == call.name), None)
    if tool is None:
        raise CallFailure(UNKNOWN_TOOL, f"the reply calls a tool that was not offered: {call.name}", reply)
    missing = [name for name in required(tool) if name not in call.arguments and name in properties(tool)]
    if missing:
        raise CallFailure(MISSING_PARAMETER, f"the call of {call.name} lacks {', '.join(missing)}", reply)
    extra = sorted(set(call.arguments) - set(properties(tool)) - set(required(tool)))
    if extra and not any(tool.parameters.get(word) for word in _BY_SCHEMA):
        raise CallFailure(EXTRA_PARAMETER, f"{call.name} declares no {', '.join(extra)}", reply)
    return call


def failure(reply: str, tools: Sequence[Tool], finish: str, text: bool = False) -> str | None:
    """The kind of failure of a reply, or None for a valid answer."""
    try:
        parse_call(reply, tools, finish, text)
    except CallFailure as found:
        return found.kind
    return None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in an object")
    return found
