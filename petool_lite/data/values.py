"""How requests tell the values of a call. Values drawn anew, in the request and in the call alike; and made calls whose
values have to be put as the declaration asks: "5 %" where it wants 0.05, "3rd of May 2024" where it wants 2024-05-03,
"ten" where it wants an integer, switches and optional parameters only where they are asked for. Public corpora have few
of these; they come from the functions in values.toml."""

import re
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, time, timedelta
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from petool_lite.data.entries import Call, Entry, Tool, properties, word_list
from petool_lite.data.openai import entry_line

_CLOSED = ("currency", "unit_mass", "unit_length")  # lists of words of which a declaration names all
COUNTED = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_NOT_FREE = {"enum", "const", "pattern", "format", "minimum", "maximum", "multipleOf"}  # of a parameter's schema


@dataclass(frozen=True)
class _Function:
    """A line of three in values.toml; a parameter is its name, "!" or "?", its kind and what is said of it."""

    field: str
    name: str
    description: str
    parameters: tuple[tuple[str, str, str, str], ...]
    asks: tuple[str, ...]


@dataclass(frozen=True)
class _Value:
    """What a call gives, what the user says for it, and how a provider declares it."""

    value: Any
    said: str
    schema: dict[str, Any]
    hint: str = ""  # behind the parameter's description
    default: str = "none"


@cache
def _data() -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))


@cache
def _functions() -> list[_Function]:
    found = []
    for field, text in _data()["functions"].items():
        lines = text.strip().splitlines()
        for head, declared, asks in zip(lines[::3], lines[1::3], lines[2::3], strict=True):
            name, description = head.split(" | ")
            parameters = re.findall(r"(\w+)([!?]) (.+?): (.*?)(?: \| |$)", declared[2:])
            found.append(_Function(field, name, description, tuple(parameters), tuple(asks[2:].split("; "))))
    return found


def _listed(words: Sequence[Any], rng: Random) -> str:
    """Words as people list them."""
    *first, last = map(str, words)
    return f"{', '.join(first)}{rng.choice((' and ', ' and ', ', and '))}{last}" if first else last


def _value(kind: str, rng: Random) -> _Value:
    """A value of a kind. Raises ValueError for an unknown one."""
    forms, words = _data()["forms"], _data()["words"]
    if kind.startswith("list:"):
        chosen = rng.sample(words[kind[5:]], rng.randint(1, 4))
        return _Value(chosen, _listed(chosen, rng), {"type": "array", "items": {"type": "string"}}, default="empty")
    if kind in words or "/" in kind:
        choices = [choice.split("~") for choice in words.get(kind) or kind.split("/")]
        chosen, names = rng.choice(choices), [choice[0] for choice in choices]
        closed, way = "/" in kind or kind in _CLOSED, rng.random()
        schema = {"type": "string"} | ({"enum": names} if closed and way < 0.6 else {})
        hint = rng.choice(forms["choice_hint"]).format(", ".join(names)) if closed and 0.4 < way < 0.85 else ""
        return _Value(chosen[0], rng.choice(chosen), schema, hint, names[0])
    if bounds := re.fullmatch(r"(\d+)-(\d+)", kind):
        number = rng.randint(int(bounds[1]), int(bounds[2]))
        said = COUNTED[number] if number < len(COUNTED) and rng.random() < 0.5 else str(number)
        return _Value(number, said, {"type": "integer"}, default=rng.choice(("1", "5", "10")))
    return _measured(kind, rng)


def _measured(kind: str, rng: Random) -> _Value:
    forms = _data()["forms"]
    match kind:
        case "flag" | "switch":
            return _Value(kind == "flag" or rng.random() < 0.5, "", {"type": "boolean"}, default="false")
        case "date":
            day = date(2019, 1, 1) + timedelta(rng.randrange(3200))
            ending = {1: "st", 2: "nd", 3: "rd"}.get(day.day % 10 if day.day // 10 != 1 else 0, "th")
            said = day.strftime(rng.choice(forms["said_day"])).format(nth=f"{day.day}{ending}")
            wanted, _, shown = rng.choice(forms["day"]).partition("|")
            shown = rng.choice((shown, shown, date(2024, 3, 9).strftime(f"e.g. {wanted}")))
            hint = rng.choice(forms["day_hint"]).format(shown) if wanted else ""
            return _Value(day.strftime(wanted) if wanted else said, said, {"type": "string"}, hint)
        case "time":
            moment, hint = time(rng.randint(6, 22), rng.choice((0, 0, 15, 30, 45))), rng.choice(forms["time_hint"])
            said = moment.strftime(rng.choice(forms["said_time"])).replace(":00 ", " ")
            return _Value(f"{moment:%H:%M}" if hint else said, said, {"type": "string"}, hint)
        case "rate":
            percent = rng.choice((rng.randint(1, 40), rng.randint(1, 10), rng.randint(1, 20) + 0.5))
            said = rng.choice(("{}%", "{}%", "{} %", "{} percent")).format(percent)
            if rng.random() < 0.4:
                return _Value(percent, said, {"type": "number"}, rng.choice(forms["percent_hint"]), "10")
            return _Value(round(percent / 100, 4), said, {"type": "number"}, rng.choice(forms["fraction_hint"]), "0.1")
        case "money":
            sum_ = rng.choice((rng.randint(5, 999), 100 * rng.randint(1, 2500), round(rng.uniform(1, 300), 2)))
            said = rng.choice(("${}", "${}", "{} dollars", "€{}")).format(rng.choice((f"{sum_:,}", str(sum_))))
            return _Value(sum_, said, {"type": "number"}, default="0")
        case "amount":
            amount = rng.choice((rng.randint(2, 500), round(rng.uniform(0.1, 90), rng.randint(1, 2))))
            return _Value(amount, str(amount), {"type": "number"}, default="1.0")
        case "numbers":
            numbers = [rng.randint(1, rng.choice((99, 99, 900))) for _ in range(rng.randint(2, 7))]
            said = rng.choice((str(numbers), ", ".join(map(str, numbers)), _listed(numbers, rng)))
            return _Value(numbers, said, {"type": "array", "items": {"type": "integer"}}, default="empty")
        case "code":
            letters = "".join(rng.choices("ABEKQXZ", k=rng.randint(0, 2)))
            code = f"{letters}{rng.choice(('', '-')) if letters else ''}{rng.randint(100, 99999)}"
            return _Value(code, code, {"type": "string"})
    raise ValueError(f"unknown kind of value: {kind}")


def _values(function: _Function, rng: Random) -> dict[str, _Value]:
    """A value for each parameter, none of which is said within another."""
    found: dict[str, _Value] = {}
    for name, _, kind, _ in function.parameters:
        drawn = [_value(kind, rng) for _ in range(30)]
        said = [one.said for one in found.values() if one.said]
        given = [one.value for one in found.values()]
        new = (one for one in drawn if one.value not in given and not any(one.said in o or o in one.said for o in said))
        found[name] = drawn[0] if kind in ("flag", "switch") else next(new, drawn[0])
    return found


def _tool(function: _Function, values: dict[str, _Value], rng: Random) -> Tool:
    properties = {}
    for name, need, _, description in function.parameters:
        one, text = values[name], description + values[name].hint
        if need == "?" and rng.random() < 0.6:
            text += rng.choice(_data()["forms"]["default_hint"]).format(one.default)
        properties[name] = {**one.schema, "description": text + rng.choice(("", "."))}
    needed = [name for name, need, _, _ in function.parameters if need == "!"]
    schema = {"type": "object", "properties": properties, "required": needed}
    return Tool(function.name, function.description, schema)


def _entry(identity: str, function: _Function, rng: Random) -> Entry:
    """A request for a function, the call that it means, and tools of the same field beside."""
    values, given = _values(function, rng), dict[str, Any]()
    ask = re.sub(r"\[(.*?)\]", lambda part: part[1] if rng.random() < 0.55 else "", rng.choice(function.asks))

    def said(part: re.Match[str]) -> str:
        given[part[1]] = values[part[1]].value
        return part[2].split("|")[given[part[1]] is False] if part[2] else values[part[1]].said

    query = re.sub(r"\{(\w+)(?::([^}]*))?\}", said, ask)
    arguments = {name: given[name] for name in values if name in given}
    beside = [one for one in _functions() if one.field == function.field and one is not function]
    others = [_tool(one, _values(one, rng), rng) for one in rng.sample(beside, 4)]
    tools = _tool(function, values, rng), *others
    return Entry(identity, query[:1].upper() + query[1:], tools, (), Call(function.name, arguments))


def generate(count: int) -> Iterator[dict[str, Any]]:
    """`count` calls of each function, as OpenAI lines, always the same ones."""
    for function in _functions():
        for number in range(count):
            identity = f"{function.name}-{number}"
            yield entry_line(_entry(identity, function, Random(identity)))


def _stated(value: Any, query: str) -> bool:
    """Whether a request states a value once, as it is written in the call, so that it can be another one."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return False
    text = str(value)
    return len(re.findall(rf"(?<![\w.]){re.escape(text)}(?![\w]|\.\d)", query)) == 1 == query.count(text)


def stated_texts(calls: Iterable[tuple[str, Mapping[str, Any]]]) -> dict[str, list[str]]:
    """The texts that requests state for their calls' arguments, by the parameter's last word: cities, names, titles."""
    found = defaultdict[str, dict[str, None]](dict)
    for query, arguments in calls:
        for name, value in arguments.items():
            if isinstance(value, str) and 0 < len(value) <= 40 and _stated(value, query):
                found[word_list(name)[-1]][value] = None
    return {word: list(texts) for word, texts in found.items()}


def with_other_values(
    query: str, arguments: Mapping[str, Any], tool: Tool, texts: Mapping[str, Sequence[str]], rng: Random
) -> tuple[str, dict[str, Any]]:
    """A request and its arguments with some of the values that it states drawn anew, in both: digits for digits, a text
    for one of `texts` of the same last word; none with choices, or with a form of its own."""
    given, declared = dict(arguments), properties(tool)
    for name, value in arguments.items():
        schema: Any = declared.get(name)
        free = isinstance(schema, Mapping) and not _NOT_FREE & schema.keys()
        if not free or rng.random() < 0.5 or not _stated(value, query) or str(value) in str(schema.get("description")):
            continue
        if isinstance(value, str):
            own = texts.get(word_list(name)[-1]) or [value]
            new: Any = value if any(map(str.isdigit, value)) else rng.choice(own)
        else:
            new = type(value)(re.sub(r"\d", lambda _: rng.choice("123456789"), str(value)))
        if str(new) not in query and len(str(new)) <= 60:
            query, given[name] = query.replace(str(value), str(new)), new
    return query, given
