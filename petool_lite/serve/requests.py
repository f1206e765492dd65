"""OpenAI's requests, of chat completions and of responses, as one `Request` for the engine.

Null means absent. What this server does not do is refused by the field's name; what changes nothing, since decoding is
greedy, is accepted and named in the answer.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from petool_lite.data.entries import Entry
from petool_lite.data.fields import Fault, kind_of
from petool_lite.data.openai import conversation, read_tools
from petool_lite.data.petoolbench import read_interaction
from petool_lite.errors import PetoolError
from petool_lite.inference.call import AUTO, CHOICES, REPLY_TOKENS, REQUIRED, CallOptions
from petool_lite.inference.parse import check_names
from petool_lite.inference.worker import Request

# Fields that would change the answer's form: a value other than these is refused.
_ONLY: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "functions": ([],),
    "function_call": ("none",),
    "audio": (),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "background": (False,),
    "previous_response_id": (),
    "conversation": (),
    "prompt": (),
}
_KNOWN = ("model", "messages", "input", "instructions", "tools", "tool_choice", "stream", "stream_options", "user",
          "history", "at_least", "explain", "max_tokens", "max_completion_tokens", "max_output_tokens", "text", "store",
          *_ONLY)  # fmt: skip


class Refusal(Exception):
    """A request that gets an error status; in OpenAI's form."""

    def __init__(
        self, status: int, message: str, field: str | None = None, kind: str = "invalid_request_error"
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": field, "code": None}}


@dataclass(frozen=True)
class Asked:
    """A request as it was read; `unused` names the fields that changed nothing. It `remembers` where it is of a user
    with a name and does not say `store: false`: what was done earlier is read, and the answer kept."""

    request: Request
    stream: bool
    usage: bool
    unused: tuple[str, ...]
    remembers: bool = False


def read_chat(body: Mapping[str, Any]) -> Asked:
    """A request of POST /v1/chat/completions; raises Refusal."""
    limit = next((name for name in ("max_completion_tokens", "max_tokens") if body.get(name) is not None), "max_tokens")
    return _read(body, body.get("messages"), limit)


def read_responses(body: Mapping[str, Any]) -> Asked:
    """A request of POST /v1/responses; raises Refusal."""
    given = body.get("input")
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    if not isinstance(items, list):
        raise _wrong("input", "a text or a list of items", given)
    form = (_get(body, "text", Mapping, "an object") or {}).get("format")
    if not isinstance(form, Mapping | None) or (form or {"type": "text"}).get("type") != "text":
        raise Refusal(400, "text.format: this server answers with a call or a plain text", "text")
    instructions = _get(body, "instructions", str, "a text")
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
    for name, allowed in _ONLY.items():
        value = body.get(name)
        if value is not None and value not in allowed:
            wanted = f"expected {_short(allowed[0])}, found {_short(value)}" if allowed else "this server has none"
            raise Refusal(400, f"{name}: {wanted}; leave it out", name)
    entry = _entry(body, messages)
    choice, only = _choice(body.get("tool_choice"), entry)
    usage = (_get(body, "stream_options", Mapping, "an object") or {}).get("include_usage")
    user = _get(body, "user", str | int, "a text")
    asked = CallOptions(choice=choice, only=only, reply_tokens=_limit(body, limit), at_least=_at_least(body))
    asked = replace(asked, explain=bool(_get(body, "explain", bool, "true or false")))
    request = Request(entry, asked, None if user is None else str(user))
    known = _KNOWN if user is not None else [name for name in _KNOWN if name != "store"]
    unused = tuple(name for name, value in body.items() if name not in known and value is not None)
    remembers = user is not None and _get(body, "store", bool, "true or false") is not False
    return Asked(request, bool(_get(body, "stream", bool, "true or false")), bool(usage), unused, remembers)


def _get(body: Mapping[str, Any], name: str, kind: Any, expected: str) -> Any:
    """A field that may be absent or null; raises Refusal for a value of another kind."""
    value = body.get(name)
    if value is not None and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
        raise _wrong(name, expected, value)
    return value


def _entry(body: Mapping[str, Any], messages: Any) -> Entry:
    if not isinstance(messages, list) or not messages:
        raise _wrong("messages", "a list of at least one message", messages)
    listed = body.get("tools")
    if listed in (None, []):
        raise Refusal(400, "tools: expected at least one; this model calls tools and does nothing else", "tools")
    history = _get(body, "history", list, "a list of earlier calls")
    try:
        for index, tool in enumerate(listed if isinstance(listed, list) else []):
            if isinstance(tool, Mapping) and tool.get("type", "function") not in ("function", None):
                raise Fault(f"tools[{index}].type", f"function, found {tool['type']}")
        tools = read_tools(listed)
        check_names(tools)
        entry = conversation(messages, tools, "the request")
        earlier = tuple(read_interaction(row, f"history[{index}]") for index, row in enumerate(history or []))
    except Fault as fault:
        raise Refusal(400, str(fault), str(fault).partition(":")[0].partition("[")[0]) from None
    except PetoolError as error:
        raise Refusal(400, f"tools: {error.message}", "tools") from error
    if not entry.query.strip() and not (entry.turns and entry.turns[-1]["role"] == "tool"):
        raise Refusal(400, "messages: expected a text of the role user, or a tool's result, at the end", "messages")
    return replace(entry, history=earlier + entry.history)


def _choice(value: Any, entry: Entry) -> tuple[str, tuple[str, ...] | None]:
    """How tools may be chosen, and the names of those that may be called; None for all."""
    if value is None:
        return AUTO, None
    if isinstance(value, str) and value in CHOICES:
        return value, None
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind == "allowed_tools":
        inner = value.get("allowed_tools", value)
        listed = inner.get("tools") if isinstance(inner, Mapping) else None
        if not isinstance(listed, list) or not listed or inner.get("mode") not in (AUTO, REQUIRED):
            raise _wrong("tool_choice.allowed_tools", 'a mode of "auto" or "required", and a list of tools', inner)
        return str(inner["mode"]), tuple(_named(item, entry) for item in listed)
    if kind == "function":
        return REQUIRED, (_named(value, entry),)
    wanted = f"{', '.join(CHOICES)}, one function, or allowed_tools"
    raise Refusal(400, f"tool_choice: expected {wanted}, found {_short(value)}", "tool_choice")


def _named(value: Any, entry: Entry) -> str:
    function = value.get("function", value) if isinstance(value, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if name not in {tool.name for tool in entry.tools}:
        raise Refusal(400, f"tool_choice: the tool to call was not offered: {_short(name)}", "tool_choice")
    return str(name)


def _limit(body: Mapping[str, Any], name: str) -> int | None:
    """The most tokens of the reply; None where -1 asks for as many as there is room for."""
    value = body.get(name)
    if value is None:
        return REPLY_TOKENS
    number = int(value) if isinstance(value, float) and value.is_integer() else value
    if number == -1 and not isinstance(value, bool):
        return None
    if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number < 1 << 31:
        raise _wrong(name, "a whole number from 1 to 2,147,483,647, or -1 for no limit", value)
    return number


def _at_least(body: Mapping[str, Any]) -> float:
    """Under which probability of the chosen tool the user is asked which one is meant; 0 asks never."""
    value = body.get("at_least") or 0.0
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        raise _wrong("at_least", "a number from 0 to 1", value)
    return float(value)


def _wrong(field: str, expected: str, found: Any) -> Refusal:
    said = _short(found) if isinstance(found, str | int | float) else kind_of(found)
    return Refusal(400, f"{field}: expected {expected}, found {said}", field.partition(".")[0].partition("[")[0])


def _short(value: Any) -> str:
    return repr(value)[:60]
