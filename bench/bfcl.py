"""BFCL's score of a single call against what it accepts ("AST"), as its Python checker has it (Patil et al. 2025). The
name is equal; every required parameter is there and none that is not declared; each value is of the declared type and
among the accepted ones; what is left out may be left out ("" among the accepted values). Texts are compared in lower
case without spaces and the marks ,./-_*^ and with ' as ". A whole number is right for a number, but not inside a list
of numbers; a flag is no whole number. What is accepted in another type than declared counts only as it stands."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from petool_lite.data.schema import normal_schema

_PYTHON = {"string": str, "integer": int, "number": float, "boolean": bool, "array": list, "object": dict}
_MARKS = re.compile(r"[ ,./\-_*^]")


def arguments_accepted(found: Mapping[str, Any], values: Mapping[str, Any], schema: Mapping[str, Any]) -> bool:
    """Whether a call's arguments are right by BFCL's rules. `values` lists what is accepted of each parameter, `schema`
    declares the parameters as JSON Schema, in its own words or BFCL's (dict, float, tuple)."""
    schema = normal_schema(schema)
    declared = schema.get("properties", {})
    needed = [*schema.get("required", []), *(name for name, accepted in values.items() if "" not in accepted)]
    if any(name not in found for name in needed) or any(name not in declared or name not in values for name in found):
        return False
    return all(_accepted(value, values[name], declared[name]) for name, value in found.items())


def _kind(schema: Any) -> type | None:
    """The Python type of a declared one; a text where nothing is declared, None where there is no schema."""
    word = schema.get("type") if isinstance(schema, Mapping) else None
    name = next((item for item in word if item != "null"), None) if isinstance(word, list) else word
    return _PYTHON.get(str(name), str) if isinstance(schema, Mapping) else None


def _accepted(value: Any, accepted: Sequence[Any], schema: Any) -> bool:
    kind = _kind(schema) or str
    inner = _kind(schema.get("items")) if kind is list and isinstance(schema, Mapping) else None
    wanted = _type_of(accepted)
    if kind is float and type(value) is int:
        value = float(value)
    if isinstance(value, list) and inner is not None and not any(_parts_fit(value, right, inner) for right in accepted):
        return False
    if type(value) is not kind and type(value) is not wanted:
        return False
    if type(value) is not kind or wanted not in (kind, None):
        return value in accepted
    if isinstance(value, dict):
        return _object_accepted(value, accepted)
    if isinstance(value, list):
        lists = [right for right in accepted if isinstance(right, list | str)]
        if inner is dict:
            pairs = (zip(value, right, strict=True) for right in lists if len(right) == len(value))
            return any(all(_object_accepted(item, [one]) for item, one in both) for both in pairs)
        return [_plain(item) for item in value] in [[_plain(item) for item in right] for right in lists]
    return _plain(value) in [_plain(right) for right in accepted]


def _type_of(accepted: Sequence[Any]) -> type | None:
    return next((type(right) for right in accepted if right != ""), None)


def _parts_fit(value: Sequence[Any], right: Any, inner: type) -> bool:
    """Whether the items of a list are of the declared type, or of that of an accepted list's items."""
    return not isinstance(right, list) or all(type(item) in (inner, _type_of(right)) for item in value)


def _object_accepted(value: Any, accepted: Sequence[Any]) -> bool:
    """Whether an object has exactly the members of an accepted one, each with one of its accepted values."""
    return isinstance(value, Mapping) and any(
        all(name in right and _plain(item) in [_plain(one) for one in right[name]] for name, item in value.items())
        and all(name in value or "" in ones for name, ones in right.items())
        for right in accepted
        if isinstance(right, Mapping)
    )


def _plain(value: Any) -> Any:
    return _MARKS.sub("", value).lower().replace("'", '"') if isinstance(value, str) else value
