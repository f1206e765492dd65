"""Reading fields of JSON values: what is wrong with one is told with its path, never with a traceback."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from petool_lite.data.entries import Call, nested_beyond


class Fault(Exception):
    """A field that is not as expected; its text has the field's path inside the entry."""

    def __init__(self, field: str, expected: str) -> None:
        super().__init__(f"{field}: expected {expected}" if field else f"expected {expected}")


def get(value: Any, key: str, kind: type | tuple[type, ...], where: str, expected: str) -> Any:
    """`value[key]` if it is of that type and, a text, `sound`; raises Fault with the path and what was `expected`."""
    field = f"{where}.{key}" if where else key
    if not isinstance(value, Mapping) or key not in value:
        raise Fault(field, f"{expected}, found nothing")
    found = value[key]
    if not isinstance(found, kind) or (isinstance(found, bool) and kind is int):
        raise Fault(field, f"{expected}, found {kind_of(found)}")
    return sound(found, field) if isinstance(found, str) else found


def text(value: Any, key: str, where: str) -> str:
    """A text that may be absent or null: then it is empty, never the word None."""
    given = isinstance(value, Mapping) and value.get(key) is not None
    return str(get(value, key, str, where, "a text")) if given else ""


def kind_of(value: Any) -> str:
    """What a JSON value is, in JSON's own words."""
    names = {str: "a text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return (names | {bool: "true or false", type(None): "null"}).get(type(value), type(value).__name__)


def sound(value: Any, where: str) -> Any:
    """`value`, unless it cannot be written as JSON in UTF-8 again: too deep, half a surrogate pair, NaN or infinite."""
    if not isinstance(value, str) and nested_beyond(value):
        raise Fault(where, "fewer levels of nesting")
    _check_leaves(value, where)
    return value


def is_unicode(text: str) -> bool:
    """Whether a text has no half of a surrogate pair in it."""
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def _check_leaves(value: Any, where: str) -> None:
    if isinstance(value, str):
        if not is_unicode(value):
            raise Fault(where, "text in Unicode, found half a surrogate pair")
    elif isinstance(value, float) and not math.isfinite(value):
        raise Fault(where, "a finite number")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _check_leaves(key, f"a name in {where}" if where else "a name of a field")
            _check_leaves(item, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_leaves(item, f"{where}[{index}]")


def json_text(value: str, where: str, expected: str) -> Any:
    """The value of a JSON text; raises Fault."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise Fault(where, f"{expected} ({error})") from error


def json_values(text: str, start: int = 0) -> Iterator[tuple[int, int, Any]]:
    """Start, end and value of JSON values in a row, or in a list open at `start`. Raises ValueError, RecursionError."""
    decoder, rest = json.JSONDecoder(), re.compile(r"[\s,]*")
    while (start := rest.match(text, start).end()) < len(text) and text[start] != "]":  # type: ignore[union-attr]
        value, end = decoder.raw_decode(text, start)
        yield start, end, value
        start = end


def arguments(value: Any, where: str) -> Mapping[str, Any]:
    """A call's arguments: an object, or one as JSON text, as OpenAI writes it. Null and an empty text are none."""
    if isinstance(value, str):
        value = json_text(value, where, "the arguments as JSON") if value.strip() else {}
    if not isinstance(value, dict | None):
        raise Fault(where, f"an object of arguments, found {kind_of(value)}")
    found: Mapping[str, Any] = sound(value or {}, where)
    return found


def call(value: Any, where: str, name: str = "name", given: str = "arguments") -> Call:
    """A call from an object with the keys `name` and `given`."""
    return Call(get(value, name, str, where, "a tool name"), arguments(value.get(given), f"{where}.{given}"))
