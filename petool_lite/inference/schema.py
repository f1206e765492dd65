"""A tool's parameters, a JSON Schema as people write them, made into what llguidance builds a grammar of: words of the
wild become JSON Schema's (`data.schema`; https://json-schema.org/draft/2020-12), and objects take only what they
declare unless they say otherwise. What a reply cannot be held to (`not`, `uniqueItems`, a pattern with look-ahead, an
overlapping `oneOf`) is left out or widened and noted, what makes no sense is refused; both name tool and place."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from urllib.parse import unquote

from petool_lite.data.entries import Tool
from petool_lite.data.schema import normal_schema, value_faults
from petool_lite.errors import PetoolError, in_words
from petool_lite.inference import bare

Schema = dict[str, Any]

_NOT_HELD = (
    "not", "if", "uniqueItems", "contains", "propertyNames", "dependentRequired", "dependentSchemas", "dependencies",
)  # fmt: skip
# Which words speak of values of one type only; a schema that says no type is of the one that its words speak of.
_OF_TYPE = {
    "object": ("properties", "required", "additionalProperties", "patternProperties", "minProperties", "maxProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}
_HELD = {"type", "enum", "const", "$ref", "allOf", "anyOf", "oneOf", "x-published", *sum(_OF_TYPE.values(), ())}
_SHAPES = {"type", "$ref", "allOf", "anyOf", "oneOf"}
_FORMATS = ("date-time", "date", "time", "duration", "email", "ipv4", "ipv6", "uuid")  # others are no rule for a text
# Ends of the numbers that may be written: with neither, an exponent of many digits would be infinite.
ANY_NUMBER = {"type": "number", "minimum": -1e15, "maximum": 1e15}
_JOINED, _PATTERNS = 8, re.compile(r'"pattern": ("(?:[^"\\]|\\.)*")')  # llguidance takes 4 times as long for each more
_DEEPEST_ANY = 4  # levels of lists and objects in a value of no declared type, so that every reply ends


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
    if joined := '"allOf"' in text and len(set(_PATTERNS.findall(text))) > _JOINED:
        text = _PATTERNS.sub('"title": ""', text)
    # OpenAPI's `nullable` goes: a null is not valid by JSON Schema, and no reply needs one
    plain = json.loads(text, object_hook=lambda one: {k: v for k, v in one.items() if k != "nullable" or v is not True})
    reader = _Reader(name, plain)
    if joined:
        reader.notes.append(f"the tool {name}: patterns are not held: more than {_JOINED} of them beside allOf")
    with in_words(f"the tool {name}: its references lead on too far", "mend the tool's declaration", RecursionError):
        return Built(reader.root(), tuple(dict.fromkeys(reader.notes)))


class _Reader:
    """Reads places of one tool's schema; `notes` grow with what is not held as declared."""

    def __init__(self, tool: str, source: Any) -> None:
        self.tool = tool
        self.notes: list[str] = []
        self._source = normal_schema(source, "parameters", self._odd)
        self._names: dict[tuple[str, bool], str] = {}  # a reference, closed or not -> its name among our definitions
        self._definitions: dict[str, Any] = {}
        self._either: list[tuple[str, Schema]] = []  # every oneOf, to be tried when all definitions are there

    def _fault(self, path: str, message: str, hint: str = "") -> PetoolError:
        return PetoolError(f"the tool {self.tool}: {path}: {message}", hint or "mend the tool's declaration")

    def _odd(self, path: str, message: str, known: bool = True) -> None:
        """Note what is not held as declared, or refuse what nobody can know."""
        if not known:
            raise self._fault(path, message)
        self.notes.append(f"the tool {self.tool}: {path}: {message}")

    def root(self) -> Schema:
        """An object's schema, or a choice of objects'. Raises PetoolError where llguidance cannot build it."""
        source = self._source if isinstance(self._source, Mapping) else {}
        loose = "object" in source["type"] if isinstance(source.get("type"), list) else not set(source) & _SHAPES
        found = self.node({**source, "type": "object"} if loose else source, "parameters")
        if found is False:
            raise self._fault("parameters", "no arguments fit this schema")
        found = self._meant(found)
        if any(self._meant(item).get("type", "object") != "object" for item in found.get("anyOf", [found])):
            raise self._fault("parameters", "expected the schema of an object")
        found = {"type": "object", **found} | ({"$defs": self._definitions} if self._definitions else {})
        for path, choice in self._either:
            if _refusal({**choice, "$defs": self._definitions}, coerce=False):
                self._odd(path, "oneOf is read as anyOf: its choices overlap, or may")
        if reason := _refusal(found):
            for key, value in found.get("properties", {}).items():
                if value is not True and (why := _refusal({**value, "$defs": self._definitions})):
                    raise self._fault(f"parameters.properties.{key}", f"no grammar can be built: {why}")
            raise self._fault("parameters", f"no grammar can be built: {reason}")
        return found

    def _meant(self, found: Schema) -> Schema:
        name = found["$ref"].rpartition("/")[2] if set(found) == {"$ref"} else None
        return self._definitions[name] if name else found

    def node(self, value: Any, path: str, closed: bool = True) -> Any:
        """The schema `value` at `path` for llguidance, False if none fits. `closed`: objects take what they declare."""
        if value is False or (isinstance(value, Mapping) and value.get("not") in (True, {})):
            return False
        value = value if isinstance(value, Mapping) else {}
        for word in _NOT_HELD:
            if word in value and value[word] is not False:
                self._odd(path, f"{word} is not held")
        found = {key: item for key, item in value.items() if key in _HELD}
        if "allOf" in found or ("$ref" in found and len(found) > 1):
            listed = found.pop("allOf", [])
            target = [{"$ref": found.pop("$ref")}] if "$ref" in found else []
            return self._all([found, *target, *listed], path, closed)
        if "$ref" in found:
            return self._reference(found["$ref"], path, closed)
        for word in ("anyOf", "oneOf"):
            if word in found:
                return self._choice(word, found, path, closed)
        if "type" not in found:
            told = [kind for kind, words in _OF_TYPE.items() if any(word in found for word in words)]
            found |= {"type": told[0]} if len(told) == 1 else {}
        if "const" in found or "enum" in found:
            return self._listed(found, path)
        return self._typed(found, path, closed) if "type" in found else self._any(_DEEPEST_ANY)

    def _all(self, parts: Sequence[Any], path: str, closed: bool) -> Any:
        """What fits all parts: as one schema where no word is in two of them, else for llguidance to join."""
        one: Schema = {}
        others = []
        for index, part in enumerate(parts):
            if part is False:
                return False
            words = {key: part[key] for key in part if key in {*_HELD, *_NOT_HELD}} if part is not True else {}
            if set(words) & {"$ref", "allOf", *one}:
                others.append((words, f"{path}.allOf[{index}]"))
            else:
                one |= words
        if not others or (not one and len(others) == 1):
            return self.node(others[0][0] if others else one, path, closed)
        made = [self.node(part, place, closed=False) for part, place in [(one, path), *others] if part]
        names = self._declared({"allOf": parts}, set())
        closing = {"properties": names, "additionalProperties": False} if closed and names else {}
        return False if False in made else {"allOf": made, **closing}

    def _declared(self, value: Any, seen: set[Any]) -> dict[str, bool] | None:
        """The parameters that parts of a schema declare; None where one takes others. `seen`: references followed."""
        if not isinstance(value, Mapping):
            return {}
        if value.get("additionalProperties") or value.get("patternProperties"):
            return None
        names = dict.fromkeys(value.get("properties", {}), True)
        parts = [part for word in ("allOf", "anyOf", "oneOf") for part in value.get(word, [])]
        reference = value.get("$ref")
        if reference is not None and reference not in seen:
            parts.append(self._target(reference, "parameters"))
            seen.add(reference)
        for part in parts:
            more = self._declared(part, seen)
            if more is None:
                return None
            names |= more
        return names

    def _choice(self, word: str, found: Schema, path: str, closed: bool) -> Any:
        rest = {key: item for key, item in found.items() if key != word}
        made: list[Any] = []
        for index, part in enumerate(found[word]):
            item = self.node({"allOf": [rest, part]} if rest else part, f"{path}.{word}[{index}]", closed)
            if item is not False and item not in made:
                made.append(item)
        if len(made) > 1 and word == "oneOf":
            self._either.append((path, {"oneOf": made}))
        return False if not made else made[0] if len(made) == 1 else {"anyOf": made}

    def _target(self, reference: Any, path: str) -> Any:
        """What a reference inside the schema points to; see RFC 6901."""
        if not isinstance(reference, str) or not re.match(r"#(/|$)", reference):
            raise self._fault(path, f"the reference {reference} leads out of the schema", "declare it under $defs")
        found = self._source
        for part in reference.removeprefix("#").split("/")[1:]:
            part = unquote(part).replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and part.isdecimal() and int(part) < len(found):
                found = found[int(part)]
            elif isinstance(found, Mapping) and part in found:
                found = found[part]
            else:
                raise self._fault(path, f"the reference {reference} points to nothing", "declare it under $defs")
        return found

    def _reference(self, reference: Any, path: str, closed: bool) -> Schema:
        target = self._target(reference, path)
        if (reference, closed) not in self._names:
            name = self._names[reference, closed] = f"d{len(self._names)}"
            self._definitions[name] = {}
            self._definitions[name] = self.node(target, reference, closed)
        return {"$ref": f"#/$defs/{self._names[reference, closed]}"}

    def _listed(self, found: Schema, path: str) -> Any:
        values = [found["const"]] if "const" in found else found["enum"]
        kinds = {"type": found["type"]} if "type" in found else {}
        fitting = [item for item in values if not value_faults(kinds, item)]
        if not fitting:
            self._odd(path, "no value of enum is of the declared type; the values count")
        return {"enum": fitting or values}

    def _any(self, depth: int) -> Schema:
        """A value of any type, lists and objects `depth` levels deep at most."""
        name = f"any{depth}"
        if name not in self._definitions:
            plain: list[Schema] = [{"type": ["string", "boolean", "null"]}, ANY_NUMBER]
            inner = self._any(depth - 1) if depth else {}
            lists: list[Schema] = [{"type": "array", "items": inner}, {"type": "object", "additionalProperties": inner}]
            self._definitions[name] = {"anyOf": plain + (lists if depth else [])}
        return {"$ref": f"#/$defs/{name}"}

    def _typed(self, found: Schema, path: str, closed: bool) -> Any:
        kinds = found["type"] if isinstance(found["type"], list) else [found["type"]]
        words = [word for kind in kinds for word in _OF_TYPE.get("number" if kind == "integer" else kind, ())]
        made = {"type": found["type"]} | {word: found[word] for word in words if word in found}
        if "number" in kinds and not any("imum" in word for word in made):
            made |= ANY_NUMBER | {"type": found["type"]}
        if "format" in made and ("pattern" in made or made["format"] not in _FORMATS):
            del made["format"]
        if "pattern" in made and (reason := _refusal({"type": "string", "pattern": made["pattern"]})):
            self._odd(f"{path}.pattern", f"not held: {reason}")
            del made["pattern"]
        if "array" in kinds:
            heads = [self.node(item, f"{path}.items[{i}]") for i, item in enumerate(found.get("prefixItems", ()))]
            made |= {"prefixItems": heads} if heads else {}
            made["items"] = self.node(found.get("items"), f"{path}.items")
        if "object" in kinds and not self._object(made, path, closed):
            return False
        beside = found.get("x-published")
        if isinstance(beside, Mapping) and isinstance(beside.get("default"), str) and "string" not in kinds:
            return {"anyOf": [made, {"enum": [beside["default"]]}]}  # PEToolBench's answers write it as it stands
        return made

    def _object(self, made: Schema, path: str, closed: bool) -> bool:
        """Read an object's own words in place; False where no object fits."""
        declared, required = made.get("properties", {}), made.get("required", [])
        places = {name: self.node(item, f"{path}.properties.{name}") for name, item in declared.items()}
        if any(places[name] is False for name in required if name in places):
            return False
        more = made.get("additionalProperties", not declared and path != "parameters")
        if closed or "additionalProperties" in made:
            made["additionalProperties"] = self.node(more, f"{path}.additionalProperties") if more else False
        if kept := made.get("patternProperties"):
            made["patternProperties"] = {key: self.node(kept[key], f"{path}.patternProperties") for key in kept}
        for name in required if closed else ():
            if name not in places:
                self._odd(f"{path}.required", f"{name} is required and not declared: any value will do")
                places[name] = self._any(_DEEPEST_ANY)
        made["properties"] = {name: place for name, place in places.items() if place is not False}
        made["required"] = [name for name in places if name in required] if closed else required
        return True


# As json.dumps writes: the training text and a constrained reply are the same tokens.
_SPACING = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}


def options(coerce: bool = True) -> Schema:
    """llguidance's options for a schema, which stand in it under x-guidance; `coerce` reads oneOf as anyOf."""
    return {"x-guidance": {**_SPACING, "coerce_one_of": coerce}}


def guidance() -> Any:
    """llguidance's classes, whose package would import more than a short call has time for."""
    return bare("llguidance", "_lib")


def _refusal(schema: Schema, coerce: bool = True) -> str:
    """Why llguidance cannot build a schema, one line; nothing where it can."""
    matcher = guidance().LLMatcher
    text = json.dumps({**options(coerce), **schema}, ensure_ascii=False)
    try:
        reason = matcher.validate_grammar(matcher.grammar_from_json_schema(text))
    except ValueError as error:
        reason = str(error)
    return reason.strip().splitlines()[-1] if reason else ""
