"""JSON Schema as it is found in the wild, made into what validators and grammar compilers read: other languages' types
(`dict`, `STRING`), OpenAPI's `nullable`, shapes that say nothing (`properties: []`). The rest is told with its path."""

import difflib
import json
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any

from petool_lite.errors import first_line

_SECONDS = 2.0  # of checking a value; one of the data takes a thousandth

_NAMES = {
    "object": "object dict map mapping record struct json",
    "array": "array list tuple set sequence",
    "string": "string str text char date time datetime date-time timestamp uuid uri url email enum file binary bytes "
    "path hash",
    "integer": "integer int int32 int64 long short",
    "number": "number float double decimal numeric real",
    "boolean": "boolean bool",
    "null": "null none nonetype undefined",
}
_TYPES = {name: kind for kind, names in _NAMES.items() for name in names.split()}
_ANYTHING = ("any", "mixed", "unknown", "")
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_ONES = ("items", "additionalProperties", "contains", "not", "if", "then", "else", "propertyNames")
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minLength", "maxLength",
            "minItems", "maxItems", "minProperties", "maxProperties")  # fmt: skip
Odd = Callable[[str, str, bool], None]


def parameters_schema(value: Any) -> dict[str, Any]:
    """A tool's parameters as a JSON Schema of type object; null, [] and {} are a tool without parameters."""
    if not isinstance(value, Mapping) or not value:
        return {"type": "object", "properties": {}}
    flat = all(isinstance(item, Mapping) and not key.startswith("$") for key, item in value.items())
    if flat and not {"properties", "type"} & value.keys():  # a mere map from names to schemas, as xLAM has it
        optional = {name for name, item in value.items() if "optional" in str(item.get("type", "")).lower()}
        needed = [name for name, item in value.items() if "default" not in item and name not in optional]
        return {"type": "object", "properties": dict(value), "required": needed}
    return dict(value)


def normal_schema(schema: Any, path: str = "", odd: Odd = lambda *_: None) -> Any:
    """A copy of a schema in JSON Schema's words. `odd` hears of others: where, what, whether what is meant is known."""
    if not isinstance(schema, Mapping):
        if not isinstance(schema, bool | None):
            odd(path, f"expected a schema, an object, found {json.dumps(schema, ensure_ascii=False)[:60]}", False)
        return schema is not False
    found = _known_shapes(dict(schema))
    if "type" in found:
        found |= _type(found.pop("type"), found, f"{path}.type", odd)
    for key in [key for key in _MAPS if key in found]:
        table = found[key] or {}
        if not isinstance(table, Mapping):
            odd(f"{path}.{key}", "expected an object of schemas", False)
            table = {}
        found[key] = {name: normal_schema(item, f"{path}.{key}.{name}", odd) for name, item in table.items()}
    for key in [key for key in _LISTS if key in found]:
        parts = found.pop(key) or []
        if not isinstance(parts, list):
            odd(f"{path}.{key}", "expected a list of schemas", False)
        elif parts:
            found[key] = [normal_schema(item, f"{path}.{key}[{index}]", odd) for index, item in enumerate(parts)]
    for key in [key for key in _ONES if key in found]:
        if (inner := found.pop(key)) is not None:
            found[key] = normal_schema(inner, f"{path}.{key}", odd)
    return _tidied(found, path, odd)


def _known_shapes(found: dict[str, Any]) -> dict[str, Any]:
    """A schema with what older drafts and OpenAPI say in other words said in today's."""
    listed = found["required"] if isinstance(found.get("required"), list) else []
    places = found["properties"] if isinstance(found.get("properties"), Mapping) else {}
    inside = [name for name, item in places.items() if isinstance(item, Mapping) and item.get("required") is True]
    found["required"] = list(dict.fromkeys(name for name in [*listed, *inside] if isinstance(name, str)))
    if isinstance(found.get("items"), list):
        found["prefixItems"], found["items"] = found["items"], found.pop("additionalItems", None)
    for side in ("Minimum", "Maximum"):
        if isinstance(found.get(f"exclusive{side}"), bool) and found.pop(f"exclusive{side}"):
            found[f"exclusive{side}"] = found.pop(side.lower(), None)
    return found


def _tidied(found: dict[str, Any], path: str, odd: Odd) -> dict[str, Any]:
    if not found["required"]:
        del found["required"]
    if found.pop("nullable", False) is True and isinstance(found.get("type"), str):
        found["type"] = [found["type"], "null"]
    if not isinstance(found.get("enum", []), list) or found.get("enum") == []:
        del found["enum"]
    for key in ("description", "title", "format", "pattern"):
        if not isinstance(found.get(key, ""), str):
            del found[key]
    for key in [key for key in _NUMBERS if key in found]:
        value = number = found.pop(key)
        if isinstance(value, str):
            with suppress(ValueError):
                number = float(value)
        # one that is too large cannot be held either
        if isinstance(number, int | float) and not isinstance(number, bool) and abs(number) < 1 << 62:
            found[key] = int(number) if number == int(number) else number
        elif value is not None:
            odd(f"{path}.{key}", "not held: no number", True)
    return found


def _type(word: Any, schema: Mapping[str, Any], path: str, odd: Odd) -> dict[str, Any]:
    """`type` and what goes with it for a type's name, or a list of names."""
    names: list[str] = []
    inner: dict[str, Any] | None = None
    for item in word if isinstance(word, list) else [word]:
        found = _type_names(item)
        if not found and isinstance(item, str) and (inner := _item_type(item)) is not None:
            found = ["array"]
        said = json.dumps(item, ensure_ascii=False)
        if not found:
            if item is not None and str(item).lower() not in _ANYTHING:
                near = difflib.get_close_matches(str(item).lower(), _TYPES, 1)
                odd(path, f"unknown type {said}" + (f", did you mean {_TYPES[near[0]]}?" if near else ""), False)
            return {}
        if found != [item]:
            odd(path, f"{said} is read as {' or '.join(found)}", True)
        names += found
    names = list(dict.fromkeys(names))
    items = {"items": inner} if inner and "items" not in schema else {}
    return ({"type": names[0] if len(names) == 1 else names} if names else {}) | items


def _type_names(word: Any) -> list[str]:
    """JSON's type names for one name of the wild; none for one that allows anything or that nobody knows."""
    if not isinstance(word, str):
        return []
    plain = word.lower().split("(")[0].replace(", optional", "").replace("optional[", "").strip(" ]")
    if "|" in plain:
        return [name for part in plain.split("|") for name in _type_names(part)]
    return [_TYPES[plain]] if plain in _TYPES else []


def _item_type(word: str) -> dict[str, Any] | None:
    """The items' schema of a list written as `List[str]` or `array of strings`; None for another name."""
    plain = word.lower().replace(", optional", "").strip()
    for head in ("list[", "tuple[", "set[", "array of ", "list of "):
        if plain.startswith(head):
            inner = _type_names(plain.removeprefix(head).split(",")[0].strip(" ]").removesuffix("s"))
            return {"type": inner[0]} if inner else {}
    return {} if plain in ("list", "array") else None


@lru_cache(maxsize=4096)
def _validator(text: str) -> Any:
    from jsonschema import Draft202012Validator

    return Draft202012Validator(normal_schema(json.loads(text)))


def value_faults(schema: Mapping[str, Any], value: Any) -> list[str]:
    """What is wrong with `value` by a tool's schema, as short sentences with paths; empty for a valid one."""
    from jsonschema.exceptions import SchemaError
    from referencing.exceptions import Unresolvable

    try:
        validator = _validator(json.dumps(schema, sort_keys=True))
        with _at_most(_SECONDS):
            found = sorted(([*map(str, e.absolute_path)], e.message[:200]) for e in validator.iter_errors(value))
        return [f"{'.'.join(path) or 'it'}: {message}" for path, message in found]
    except (SchemaError, Unresolvable, RecursionError, ValueError, TypeError, AttributeError, re.error) as error:
        return [f"its schema cannot be read: {first_line(error)[:200]}"]


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise ValueError once the process has computed for so long: patterns and references of a hostile schema can take
    years. Where signals are not heard, beside the main thread, there is no limit."""

    def late(*_: object) -> None:
        raise ValueError(f"it takes more than {seconds:g} s")

    heard = threading.current_thread() is threading.main_thread()
    if heard:
        signal.signal(signal.SIGVTALRM, late)
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        if heard:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
