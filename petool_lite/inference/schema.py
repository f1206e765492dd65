"""A tool's parameters, a JSON Schema as people write them, brought to the part of JSON Schema that llguidance builds.

Type names of other languages are understood (`dict`, `float`, `STRING`), references are followed, `allOf` is merged,
objects take only the parameters that they declare unless they say otherwise. What llguidance cannot hold a reply to
(`not`, `uniqueItems`, a pattern with look-ahead, an overlapping `oneOf`) is left out or widened and said in a note;
what makes no sense is refused. Both name the tool and the place. https://json-schema.org/draft/2020-12
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from petool_lite.data.entries import Tool
from petool_lite.inference.resolve import NOT_HELD, Impossible, Resolver, Schema, as_number

_FORMATS = ("date-time", "date", "time", "duration", "email", "ipv4", "ipv6", "uuid")  # others are no rule for a text
# Ends of the numbers that may be written: with neither, an exponent of many digits would be infinite.
ANY_NUMBER = {"type": "number", "minimum": -1e15, "maximum": 1e15}
_DEEPEST_ANY = 4  # levels of lists and objects in a value of no declared type, so that every reply ends
_DEEPEST = 40  # levels of a schema, references followed in place included


@dataclass(frozen=True)
class Built:
    """`schema` is an object's, with its own $defs; `notes` say what is not held as declared, tool and place named."""

    schema: Schema
    notes: tuple[str, ...]


def buildable(tool: Tool) -> Built:
    """The schema of `tool`'s arguments for llguidance. Raises PetoolError that names the tool and the place."""
    return _built(tool.name, json.dumps(tool.parameters))


@lru_cache(maxsize=1024)
def _built(name: str, text: str) -> Built:
    reader = _Reader(name, json.loads(text))
    found = reader.root()
    return Built(found, tuple(dict.fromkeys(reader.notes)))


class _Reader(Resolver):
    def __init__(self, tool: str, schema: Any) -> None:
        super().__init__(tool, schema)
        self._names: dict[str, str] = {}  # a reference -> its name among our own definitions
        self._definitions: dict[str, Schema] = {}
        self._either: list[tuple[str, Schema]] = []  # every oneOf, to be tried when all definitions are there

    def root(self) -> Schema:
        """The whole: an object's schema, or a choice of objects'."""
        try:
            found = self.node(self.source, "parameters", "object")
        except Impossible:
            raise self.fault("parameters", "no arguments fit this schema") from None
        if set(found) == {"$ref"}:
            found = self._definitions[found["$ref"].rpartition("/")[2]]
        kinds = [
            self._definitions.get(item.get("$ref", "").rpartition("/")[2], item) for item in found.get("anyOf", [found])
        ]
        if any(item.get("type") != "object" for item in kinds):
            raise self.fault("parameters", "expected the schema of an object")
        ending = _ending(self._definitions)
        if not all(_ends(item, ending) for item in (found, *self._definitions.values())):
            raise self.fault("parameters", "a value contains itself without end")
        found = found | ({"$defs": self._definitions} if self._definitions else {})
        self._try(found)
        return found

    def _try(self, found: Schema) -> None:
        """Let llguidance build it, and note each oneOf that it cannot tell apart."""
        for path, choice in self._either:
            if _refusal({**choice, "$defs": self._definitions}, coerce=False):
                self.note(path, "oneOf is read as anyOf: its choices overlap, or may")
        if reason := _refusal(found):
            for key, value in found.get("properties", {}).items():
                if why := _refusal({**value, "$defs": self._definitions}):
                    raise self.fault(f"parameters.properties.{key}", f"no grammar can be built: {why}")
            raise self.fault("parameters", f"no grammar can be built: {reason}")

    def node(self, value: Any, path: str, default: str = "any", depth: int = 0) -> Schema:
        """The schema `value` at `path`; `default` is its type where it tells none. Raises Impossible."""
        if depth > _DEEPEST:
            raise self.fault(path, f"the schema is nested more than {_DEEPEST} levels deep")
        if value is True or value is None:
            value = {}
        if value is False:
            raise Impossible
        if not isinstance(value, Mapping):
            raise self.fault(path, f"expected a schema, an object, found {json.dumps(value)[:60]}")
        value = self.joined(value, path, depth)
        if "$ref" in value:
            return self._reference(value["$ref"], path)
        for word in ("anyOf", "oneOf"):
            if word in value:
                return self._choice(word, value, path, default, depth)
        if value.get("not") in (True, {}):
            raise Impossible
        for word in NOT_HELD:
            if word in value and value[word] is not False:
                self.note(path, f"{word} is not held")
        kinds = self.kinds(value, path, default)
        if "const" in value or "enum" in value:
            return self._listed(value, kinds, path)
        made = [self._typed(kind, value, path, depth) for kind in kinds]
        beside = value.get("x-published")
        if isinstance(beside, Mapping) and isinstance(beside.get("default"), str) and "string" not in kinds:
            made.append({"enum": [beside["default"]]})  # PEToolBench's answers write such a default as it stands
        return made[0] if len(made) == 1 else {"anyOf": made}

    def _choice(self, word: str, value: Schema, path: str, default: str, depth: int) -> Schema:
        rest = {key: item for key, item in value.items() if key != word}
        made: list[Schema] = []
        for index, part in enumerate(self.list_of(value[word], f"{path}.{word}")):
            part = {"allOf": [rest, part]} if rest else part
            try:
                found = self.node(part, f"{path}.{word}[{index}]", default, depth + 1)
            except Impossible:
                continue
            if found not in made:
                made.append(found)
        if not made:
            raise Impossible
        if len(made) > 1 and word == "oneOf":
            self._either.append((path, {"oneOf": made}))
        return made[0] if len(made) == 1 else {"anyOf": made}

    def _reference(self, reference: Any, path: str) -> Schema:
        target = self.target(reference, path)
        if reference not in self._names:
            name = self._names[reference] = f"d{len(self._names)}"
            self._definitions[name] = {}
            self._definitions[name] = self.node(target, reference)
        return {"$ref": f"#/$defs/{self._names[reference]}"}

    def _listed(self, value: Schema, kinds: list[str], path: str) -> Schema:
        values = [value["const"]] if "const" in value else self.list_of(value["enum"], f"{path}.enum")
        fitting = [item for item in values if "any" in kinds or any(_is_kind(item, kind) for kind in kinds)]
        if values and not fitting:
            self.note(path, "no value of enum is of the declared type; the values count")
            fitting = values
        if not fitting:
            raise Impossible
        return {"enum": fitting}

    def _typed(self, kind: str, value: Schema, path: str, depth: int) -> Schema:
        if kind == "object":
            return self._object(value, path, depth)
        if kind == "array":
            return self._array(value, path, depth)
        if kind == "string":
            return self._string(value, path)
        if kind in ("number", "integer"):
            return self._number(kind, value, path)
        return self._any(_DEEPEST_ANY) if kind == "any" else {"type": kind}

    def _any(self, depth: int) -> Schema:
        """A value of any type, lists and objects `depth` levels deep at most."""
        name = f"any{depth}"
        if name not in self._definitions:
            plain: list[Schema] = [{"type": ["string", "boolean", "null"]}, ANY_NUMBER]
            inner = self._any(depth - 1) if depth else {}
            lists: list[Schema] = [{"type": "array", "items": inner}, {"type": "object", "additionalProperties": inner}]
            self._definitions[name] = {"anyOf": plain + (lists if depth else [])}
        return {"$ref": f"#/$defs/{name}"}

    def _string(self, value: Schema, path: str) -> Schema:
        found: Schema = {"type": "string", **self._counts(value, path, "minLength", "maxLength")}
        if value.get("format") in _FORMATS:
            found["format"] = value["format"]
        if isinstance(pattern := value.get("pattern"), str):
            reason = _refusal({"type": "string", "pattern": pattern})
            if reason:
                self.note(f"{path}.pattern", f"not held: {reason}")
            else:
                found["pattern"] = pattern
        if set(found) >= {"format", "pattern"}:
            del found["format"]
        return found

    def _counts(self, value: Schema, path: str, *keys: str) -> Schema:
        """The lengths among `keys` that are declared, as integers."""
        found = {}
        for key in keys:
            count = as_number(value.get(key))
            if count is None and value.get(key) is not None:
                self.note(f"{path}.{key}", "not held: no number")
            elif (count is not None and 0 < count < 1 << 31) or (count == 0 and key.startswith("max")):
                found[key] = int(count)
        if len(found) == 2 and found[keys[0]] > found[keys[1]]:
            raise Impossible
        return found

    def _number(self, kind: str, value: Schema, path: str) -> Schema:
        found: Schema = {"type": kind}
        for side, round_up in (("Minimum", True), ("Maximum", False)):
            for key in (side.lower(), f"exclusive{side}"):
                limit = value.get(key)
                if key.startswith("exclusive") and limit is True:  # as draft 4 says it: of the other limit
                    limit = found.pop(side.lower(), None)
                if (number := as_number(limit)) is None:
                    if not isinstance(limit, bool | None):
                        self.note(f"{path}.{key}", "not held: no number")
                    continue
                if abs(number) >= 1 << 62:
                    continue
                if kind == "integer" and number != int(number):
                    key, number = side.lower(), math.ceil(number) if round_up else math.floor(number)
                found[key] = int(number) if number == int(number) else number
        if (step := as_number(value.get("multipleOf"))) and step > 0:
            found["multipleOf"] = int(step) if step == int(step) else step
        return ANY_NUMBER if found == {"type": "number"} else found

    def _array(self, value: Schema, path: str, depth: int) -> Schema:
        found: Schema = {"type": "array", **self._counts(value, path, "minItems", "maxItems")}
        items, heads = value.get("items"), value.get("prefixItems")
        if isinstance(items, list):  # as older drafts say it
            heads, items = items, value.get("additionalItems")
        if isinstance(heads, list):
            places = [self.node(item, f"{path}.items[{index}]", depth=depth + 1) for index, item in enumerate(heads)]
            found["prefixItems"] = places
        try:
            found["items"] = self.node(items, f"{path}.items", depth=depth + 1)
        except Impossible:
            found["items"] = False
        return found

    def _object(self, value: Schema, path: str, depth: int) -> Schema:
        declared = value.get("properties") or {}
        if not isinstance(declared, Mapping):
            raise self.fault(f"{path}.properties", "expected an object of schemas")
        named = value.get("required")
        required = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
        required += [
            name for name, item in declared.items() if isinstance(item, Mapping) and item.get("required") is True
        ]
        places: Schema = {}
        for name, item in declared.items():
            try:
                places[name] = self.node(item, f"{path}.properties.{name}", depth=depth + 1)
            except Impossible:
                if name in required:
                    raise
        more = value.get("additionalProperties")
        if more is None and not declared and path != "parameters":
            more = True
        found: Schema = {"type": "object", **self._counts(value, path, "minProperties", "maxProperties")}
        found["additionalProperties"] = self._more(more, f"{path}.additionalProperties", depth)
        patterns = value.get("patternProperties")
        if isinstance(patterns, Mapping) and patterns:
            found["patternProperties"] = {
                key: self.node(item, f"{path}.patternProperties.{key}", depth=depth + 1)
                for key, item in patterns.items()
            }
        for name in required:
            if name not in places:
                self.note(f"{path}.required", f"{name} is required and not declared: any value will do")
                places[name] = self._any(_DEEPEST_ANY)
        required = [name for name in places if name in required]
        return found | {"properties": places, "required": required}

    def _more(self, value: Any, path: str, depth: int) -> Any:
        try:
            return False if value is None else self.node(value, path, depth=depth + 1)
        except Impossible:
            return False


def _is_kind(value: Any, kind: str) -> bool:
    if isinstance(value, bool) or kind == "boolean":
        return isinstance(value, bool) and kind == "boolean"
    if kind == "integer":
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    kinds = {"string": str, "number": int | float, "array": list, "object": dict, "null": type(None)}
    return isinstance(value, kinds[kind])


def _ends(schema: Any, ending: frozenset[str]) -> bool:
    """Whether a value of the schema can be written to its end, given the definitions for which that is known."""
    if not isinstance(schema, Mapping):
        return True
    if "$ref" in schema:
        return schema["$ref"].rpartition("/")[2] in ending
    if "anyOf" in schema:
        return any(_ends(item, ending) for item in schema["anyOf"])
    if schema.get("minItems") and not _ends(schema.get("items"), ending):
        return False
    return all(_ends(schema["properties"][name], ending) for name in schema.get("required", ()))


def _ending(definitions: Mapping[str, Schema]) -> frozenset[str]:
    found: frozenset[str] = frozenset()
    while (more := frozenset(name for name, schema in definitions.items() if _ends(schema, found))) != found:
        found = more
    return found


# As json.dumps writes: the training text and a constrained reply are the same tokens.
_SPACING = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}


def options(coerce: bool = True) -> Schema:
    """llguidance's options for a schema, which stand in it under x-guidance; `coerce` reads oneOf as anyOf."""
    return {"x-guidance": {**_SPACING, "coerce_one_of": coerce}}


def _refusal(schema: Schema, coerce: bool = True) -> str:
    """Why llguidance cannot build a schema, one line; nothing where it can."""
    from llguidance import LLMatcher

    text = json.dumps({**options(coerce), **schema}, ensure_ascii=False)
    try:
        reason = LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(text))
    except ValueError as error:
        reason = str(error)
    return reason.strip().splitlines()[-1] if reason else ""
