"""JSON Schema as it is found in the wild, made into what validators and grammar compilers read.

Type names of other languages (`dict`, `float`, `STRING`) become JSON's, OpenAPI's `nullable` becomes a type, and shapes
that say nothing (`properties: []`, `required: true`) go. What cannot be understood is told with its path.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

TYPES = {
    "object": "object", "dict": "object", "map": "object", "mapping": "object", "record": "object", "struct": "object",
    "json": "object", "array": "array", "list": "array", "tuple": "array", "set": "array", "sequence": "array",
    "string": "string", "str": "string", "text": "string", "char": "string", "date": "string", "time": "string",
    "datetime": "string", "date-time": "string", "timestamp": "string", "uuid": "string", "uri": "string",
    "url": "string", "email": "string", "enum": "string", "file": "string", "binary": "string", "bytes": "string",
    "path": "string", "hash": "string", "integer": "integer", "int": "integer", "int32": "integer",
    "int64": "integer", "long": "integer", "short": "integer", "number": "number", "float": "number",
    "double": "number", "decimal": "number", "numeric": "number", "real": "number", "boolean": "boolean",
    "bool": "boolean", "null": "null", "none": "null", "nonetype": "null", "undefined": "null",
}  # fmt: skip
ANYTHING = ("any", "mixed", "unknown", "")
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_ONES = ("items", "additionalProperties", "contains", "not", "if", "then", "else", "propertyNames")


def parameters_schema(value: Any) -> dict[str, Any]:
    """A tool's parameters as a JSON Schema of type object; null, [] and {} are a tool without parameters."""
    if not isinstance(value, Mapping) or not value:
        return {"type": "object", "properties": {}}
    if "properties" not in value and "type" not in value and _flat(value):
        needed = [name for name, item in value.items() if "default" not in item and not _optional(item)]
        return {"type": "object", "properties": dict(value), "required": needed}
    return dict(value)


def _flat(value: Mapping[str, Any]) -> bool:
    """Whether this is a mere map from names to schemas, as xLAM declares parameters."""
    return all(isinstance(item, Mapping) and not key.startswith("$") for key, item in value.items())


def _optional(schema: Mapping[str, Any]) -> bool:
    return "optional" in str(schema.get("type", "")).lower()


def normal_schema(schema: Any) -> Any:
    """A copy of a schema with JSON's type names and without shapes that say nothing. Values are not touched."""
    if not isinstance(schema, Mapping):
        return schema if isinstance(schema, bool) else True
    found = dict(schema)
    if "type" in found:
        found |= _type(found.pop("type"), found)
    for key in _MAPS:
        if key in found:
            table = found[key] if isinstance(found[key], Mapping) else {}
            found[key] = {name: normal_schema(item) for name, item in table.items()}
    for key in _LISTS:
        if key in found:
            parts = found[key] if isinstance(found[key], list) else []
            found[key] = [normal_schema(item) for item in parts]
            if not parts:
                del found[key]
    for key in _ONES:
        if key in found and found[key] is not None:
            found[key] = normal_schema(found[key])
        elif key in found:
            del found[key]
    return _tidied(found)


def _tidied(found: dict[str, Any]) -> dict[str, Any]:
    if "required" in found:
        names = found["required"] if isinstance(found["required"], list) else []
        found["required"] = list(dict.fromkeys(name for name in names if isinstance(name, str)))
        if not found["required"]:
            del found["required"]
    if found.pop("nullable", False) is True and isinstance(found.get("type"), str):
        found["type"] = [found["type"], "null"]
    if not isinstance(found.get("enum", []), list) or found.get("enum") == []:
        del found["enum"]
    for key in ("description", "title", "format", "pattern"):
        if key in found and not isinstance(found[key], str):
            del found[key]
    return found


def _type(word: Any, schema: Mapping[str, Any]) -> dict[str, Any]:
    """`type` and what goes with it for a type's name, or a list of names."""
    if isinstance(word, list):
        names = [name for item in word for name in type_names(item)]
        return {"type": list(dict.fromkeys(names))} if names and len(names) >= len(word) else {}
    names = type_names(word)
    if isinstance(word, str) and not names and (inner := item_type(word)) and "items" not in schema:
        return {"type": "array", "items": inner}
    return {"type": names[0] if len(names) == 1 else names} if names else {}


def type_names(word: Any) -> list[str]:
    """JSON's type names for one name of the wild; none for one that allows anything or that nobody knows."""
    if not isinstance(word, str):
        return []
    plain = word.lower().split("(")[0].replace(", optional", "").replace("optional[", "").strip(" ]")
    if "|" in plain:
        return [name for part in plain.split("|") for name in type_names(part)]
    return [TYPES[plain]] if plain in TYPES else []


def item_type(word: str) -> dict[str, Any] | None:
    """The items' schema of a list written as `List[str]` or `array of strings`; None for another name."""
    plain = word.lower().replace(", optional", "").strip()
    for head in ("list[", "tuple[", "set[", "array of ", "list of "):
        if plain.startswith(head):
            inner = type_names(plain.removeprefix(head).split(",")[0].strip(" ]").removesuffix("s"))
            return {"type": inner[0]} if inner else {}
    return {} if plain in ("list", "array") else None


@lru_cache(maxsize=4096)
def _validator(text: str) -> Any:
    import json

    from jsonschema import Draft202012Validator

    return Draft202012Validator(normal_schema(json.loads(text)))


def value_faults(schema: Mapping[str, Any], value: Any) -> list[str]:
    """What is wrong with `value` by a tool's schema, as short sentences with paths; empty for a valid one."""
    import json

    from jsonschema.exceptions import SchemaError
    from referencing.exceptions import Unresolvable

    validator = _validator(json.dumps(schema, sort_keys=True))
    try:
        return [
            f"{'.'.join(map(str, found.absolute_path)) or 'it'}: {found.message[:200]}"
            for found in sorted(validator.iter_errors(value), key=lambda found: list(map(str, found.absolute_path)))
        ]
    except (SchemaError, Unresolvable, RecursionError, ValueError, TypeError, AttributeError) as error:
        return [f"its schema cannot be read: {str(error).splitlines()[0][:200]}"]
