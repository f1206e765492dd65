"""The published scorer: pure functions over one reply.

It looks in the reply, on one line, for an opening brace, anything, the key "tool_name" with a quoted string, a comma,
the key "parameters" and an object that ends at the first two closing braces. It parses the whole match as JSON; no
match or bad JSON is wrong on both counts. Its quirks (nested objects at the end, swapped keys, two braces inside a
string) are kept, so that figures compare with published ones.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

_CALL = re.compile(r'\{.*"tool_name":\s*".*?",\s*"parameters":\s*\{.*?\}\}')


def published_call(reply: str) -> dict[str, Any] | None:
    """The call that the published scorer sees in a reply, or None."""
    match = _CALL.search(reply)
    if match is None:
        return None
    try:
        call = json.loads(match.group())
    except (ValueError, RecursionError):
        return None
    return call if isinstance(call, dict) and "tool_name" in call and "parameters" in call else None


def score_reply(reply: str, gold: Mapping[str, Any]) -> tuple[bool, bool]:
    """Published scorer: (tool right, parameters right); parameters count whether or not the tool is right."""
    call = published_call(reply)
    if call is None:
        return False, False
    return call["tool_name"] == gold["tool_name"], call["parameters"] == gold["parameters"]
