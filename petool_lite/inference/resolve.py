"""What a place of a tool's schema says: references followed, allOf merged, types read."""

import difflib
import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from petool_lite.data.schema import ANYTHING, TYPES, item_type, type_names
from petool_lite.errors import PetoolError

Schema = dict[str, Any]

NOT_HELD = (
    "not", "if", "uniqueItems", "contains", "propertyNames", "dependentRequired", "dependentSchemas", "dependencies",
)  # fmt: skip
# Which words speak of values of one type only; a schema that says no type is of the one that its words speak of.
_OF_TYPE = {
    "object": ("properties", "required", "additionalProperties", "patternProperties", "minProperties", "maxProperties"),
    "array": ("items", "prefixItems", "additionalItems", "minItems", "maxItems", "uniqueItems", "contains"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}
_LIMITS = {
    word for words in _OF_TYPE.values() for word in words if re.match("(exclusive)?(min|max)", word, re.IGNORECASE)
}
_CONSTRAINING = {"type", "enum", "const", "$ref", "allOf", "anyOf", "oneOf", "x-published", *NOT_HELD}
_CONSTRAINING |= {word for words in _OF_TYPE.values() for word in words}
_DEEPEST = 40  # levels of allOf and of references that are followed in place


class Impossible(Exception):
    """No value fits the schema; a choice goes on without it."""


class Resolver:
    """Reads places of one tool's schema; `notes` grow with what is not held as declared."""

    def __init__(self, tool: str, schema: Any) -> None:
        self.tool, self.source = tool, {} if schema is None else schema
        self.notes: list[str] = []

    def fault(self, path: str, message: str, hint: str = "") -> PetoolError:
        """An error that names the tool and the place."""
        return PetoolError(f"the tool {self.tool}: {path}: {message}", hint or "mend the tool's declaration")

    def note(self, path: str, message: str) -> None:
        """Say what is not held as declared."""
        self.notes.append(f"the tool {self.tool}: {path}: {message}")

    def list_of(self, value: Any, path: str) -> list[Any]:
        """`value`, unless it is no list."""
        if not isinstance(value, list):
            raise self.fault(path, "expected a list of schemas")
        return value

    def target(self, reference: Any, path: str) -> Any:
        """What a reference inside the schema points to; see RFC 6901."""
        if not isinstance(reference, str) or not re.match(r"#(/|$)", reference):
            raise self.fault(path, f"the reference {reference} leads out of the schema", "declare it under $defs")
        found = self.source
        for part in reference.removeprefix("#").split("/")[1:]:
            part = unquote(part).replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and part.isdecimal() and int(part) < len(found):
                found = found[int(part)]
            elif isinstance(found, Mapping) and part in found:
                found = found[part]
            else:
                raise self.fault(path, f"the reference {reference} points to nothing", "declare it under $defs")
        return found

    def joined(self, given: Mapping[str, Any], path: str, depth: int) -> Schema:
        """What of a schema constrains, with the schemas of its allOf, and of a $ref beside other words, merged into it.

        Raises Impossible where nothing fits all of them.
        """
        value = {key: item for key, item in given.items() if key in _CONSTRAINING}
        parts = self.list_of(value.pop("allOf", []), f"{path}.allOf")
        if "$ref" in value and (parts or len(value) > 1):
            parts = [{"$ref": value.pop("$ref")}, *parts]
        if len(parts) == 1 and not value and isinstance(parts[0], Mapping) and set(parts[0]) == {"$ref"}:
            return dict(parts[0])
        for index, part in enumerate(parts):
            if depth + index > _DEEPEST:
                raise self.fault(path, "allOf is nested too deep")
            while isinstance(part, Mapping) and "$ref" in part:
                rest = {key: item for key, item in part.items() if key != "$ref"}
                target = self.target(part["$ref"], path)
                depth += 1
                if depth > _DEEPEST:
                    raise self.fault(path, "a reference leads back to itself")
                part = {"allOf": [target, rest]} if set(rest) & _CONSTRAINING else target
            if part is False:
                raise Impossible
            if isinstance(part, Mapping):
                value = self._merged(value, self.joined(part, path, depth + 1), path)
        return value

    def _merged(self, one: Schema, other: Schema, path: str) -> Schema:
        """A schema of what fits both."""
        found = dict(one)
        for key, item in other.items():
            mine = found.get(key)
            if key not in found or mine == item:
                found[key] = item
            elif key == "properties" and isinstance(mine, Mapping) and isinstance(item, Mapping):
                both = {name: {"allOf": [mine[name], item[name]]} for name in item if name in mine}
                found[key] = {**mine, **item, **both}
            elif key == "required" and isinstance(mine, list) and isinstance(item, list):
                found[key] = [*mine, *(name for name in item if name not in mine)]
            elif key in _LIMITS and (limits := [n for n in map(as_number, (mine, item)) if n is not None]):
                found[key] = max(limits) if "min" in key.lower() else min(limits)
            elif key == "type":
                found[key] = self._common_kinds(mine, item, path)
            elif key == "enum" and isinstance(mine, list) and isinstance(item, list):
                found[key] = [value for value in mine if value in item]
            elif key == "items":
                found[key] = {"allOf": [mine, item]}
            elif key in ("anyOf", "oneOf") and isinstance(mine, list) and isinstance(item, list):
                found[key] = [{"allOf": [left, right]} for left in mine for right in item]
            elif key == "additionalProperties":
                found[key] = False if False in (mine, item) else {"allOf": [mine, item]}
            else:
                self.note(path, f"of two declarations of {key} only the first is held")
        return found

    def _common_kinds(self, one: Any, other: Any, path: str) -> list[str]:
        mine, theirs = (self.kinds({"type": word}, path, "any") for word in (one, other))
        if "any" in mine + theirs:
            return theirs if "any" in mine else mine
        common = [kind for kind in mine if kind in theirs]
        both = mine + theirs
        common += ["integer"] if "integer" in both and "number" in both and "integer" not in common else []
        if not common:
            raise Impossible
        return common

    def kinds(self, value: Schema, path: str, default: str) -> list[str]:
        """The JSON types that the schema allows."""
        words = value.get("type")
        if words in (None, "", []):
            told = [kind for kind, keys in _OF_TYPE.items() if any(key in value for key in keys)]
            return told if len(told) == 1 else [default]
        found: list[str] = []
        for word in words if isinstance(words, list) else [words]:
            names = ["any"] if str(word).lower() in ANYTHING else type_names(word)
            if not names and isinstance(word, str) and (inner := item_type(word)) is not None:
                names = ["array"]
                value.setdefault("items", inner)
            if not names:
                near = difflib.get_close_matches(str(word).lower(), TYPES, 1)
                hint = f"did you mean {TYPES[near[0]]}?" if near else "the types of JSON are string, number, ..."
                raise self.fault(f"{path}.type", f"unknown type {json.dumps(word, ensure_ascii=False)}", hint)
            if names != [word]:
                self.note(f"{path}.type", f"{json.dumps(word, ensure_ascii=False)} is read as {' or '.join(names)}")
            found += names
        found = list(dict.fromkeys(found))
        return ["any"] if "any" in found else [kind for kind in found if kind != "integer" or "number" not in found]


def as_number(value: Any) -> float | None:
    """A finite number as it is, also where it stands as text; None for anything else."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        return None
    return value
