"""The published scorer: pure functions over one reply. It looks, on one line, for an opening brace, anything, the key
"tool_name" with a quoted string, a comma, the key "parameters" and an object that ends at the first two closing braces,
and parses the match as JSON; else both are wrong. Its quirks are kept, so that figures compare with published ones."""

import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from petool_lite.data.petoolbench import published_call
from petool_lite.inference.parse import CallFailure, read_answer

Pair = tuple[bool, bool]  # tool right, parameters right
_PATTERN = r'\{.*"tool_name":\s*".*?",\s*"parameters":\s*\{.*?\}\}'
_CALL = {False: re.compile(_PATTERN), True: re.compile(_PATTERN, re.DOTALL)}  # whether a match may span lines
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?|\.\d+")
_WRAPPED = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


def published_form(reply: str) -> str:
    """A reply of the petool style as the published scorers read one: its call, if it can be read, as their JSON."""
    wrapped = _WRAPPED.search(reply[: reply.rfind("</tool_call>") + 12])  # so every start has an end
    try:
        call = published_call(read_answer(wrapped[1] if wrapped else reply))
    except (CallFailure, RecursionError):
        return reply
    return reply if call is None else json.dumps(call, ensure_ascii=False)


def read_published(reply: str, spanning: bool = False) -> dict[str, Any] | None:
    """The call that the published scorer sees in a reply, or None; with `spanning` the one of the 3B result."""
    # A reply that runs in circles must not take seconds: skip one without the parts in their order, and try the first
    # brace of each line only, because a match from a later brace of the line is one from the first as well.
    name = reply.find('"tool_name":')
    parameters = reply.find('"parameters":', name)
    start = reply.find("{") if name >= 0 and 0 <= parameters < reply.rfind("}}") else -1
    while start >= 0:
        match = _CALL[spanning].match(reply, start)
        if match is not None:
            with suppress(ValueError, RecursionError):
                call: dict[str, Any] = json.loads(match.group())
                return call if {"tool_name", "parameters"} <= call.keys() else None
            return None
        line_end = -1 if spanning else reply.find("\n", start)
        start = reply.find("{", line_end) if line_end >= 0 else -1
    return None


def score_reply(reply: str, gold: Mapping[str, Any], spanning: bool = False, request: str | None = None) -> Pair:
    """Published scorer: (tool right, parameters right), each by itself; 1, 1.0 and true are equal. Where `gold` is
    {"no_call": ...}, any text without a call is right on both. `as_asked` compares where there is a `request`."""
    call = read_published(reply, spanning)
    try:
        if "no_call" in gold:
            return (call is None and isinstance(read_answer(reply), str),) * 2
        if call is None:
            return False, False
        found, right = call["parameters"], gold["parameters"]
        same = found == right if request is None else as_asked(found, right, request)
        return call["tool_name"] == gold["tool_name"], same
    except (CallFailure, RecursionError):  # the latter from comparing what the parser just managed to nest
        return False, False


def as_asked(found: Any, right: Any, request: str) -> bool:
    """Whether a value is right, or the request's number that the data cut to a whole one, as PEToolBench cut 46.046."""
    if isinstance(found, dict) and isinstance(right, dict):
        return found.keys() == right.keys() and all(as_asked(found[key], right[key], request) for key in right)
    if isinstance(found, list) and isinstance(right, list):
        return len(found) == len(right) and all(map(as_asked, found, right, [request] * len(right)))
    if found == right or type(found) is not float or type(right) is not int or not math.isfinite(found):
        return bool(found == right)
    said = (float(number.replace(",", "")) for number in _NUMBER.findall(request))
    return right in (math.trunc(found), round(found), math.floor(found + 0.5)) and abs(found) in said
