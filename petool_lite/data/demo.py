"""A deterministic generator of short conversations, for a CPU that trains in minutes. Each entry (OpenAI's `messages`
and `tools`) is what the user asked before with a verdict on every call, what the user asks now, and the right call.
Several providers offer the asked function, or one, or none. The request tells the function, in other words than the
tools do, and the history the provider: neither alone is enough. The two splits share no function, name or provider."""

import json
import random
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from petool_lite.data.entries import NO_TOOL, Tool
from petool_lite.data.openai import tool_json

_TYPES = {"number": "integer", "switch": "boolean"}  # of a parameter; any other kind of value is a string
_FORMS = (
    "{provider}.{name}", "{provider}__{name}", "{provider}_{name}", "{provider}/{name}",
    "<{domain}>.<{provider}>.<{name}>", "mcp__{provider}__{name}",
)  # fmt: skip
_KINDS = {"rivals": 62, "known": 16, "alone": 12, "none": 10}  # how many of a hundred entries
_MOST_TOOLS, _MOST_CALLS = 7, 5
_PLAINLY = 0.6  # how often a request has the word for the thing that the tools have


@dataclass(frozen=True)
class Function:
    """What several providers can do: words for it, its parameters as name and kind of value, how users ask for it."""

    domain: str
    verbs: tuple[str, ...]
    things: tuple[str, ...]
    parameters: Mapping[str, str]
    asks: tuple[str, ...]


def _parts(text: str, mark: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(mark) if part.strip())


@cache
def _words() -> dict[str, Any]:
    return tomllib.loads((Path(__file__).parent / "demo_words.toml").read_text(encoding="utf-8"))


@cache
def values(kind: str) -> Sequence[Any]:
    """What a parameter of this kind may be."""
    days = [f"{day} {month}" for day in range(2, 29, 3) for month in ("March", "May", "July", "October")]
    made: dict[str, Sequence[Any]] = {"date": days, "number": range(11, 99), "switch": (True, False)}
    return made.get(kind) or list(_words()["values"][kind])


@cache
def domains(split: str) -> dict[str, list[Function]]:
    """The functions of "train" or "test" by domain."""
    found: dict[str, list[Function]] = {}
    domain, head = "", ["", "", ""]
    for line in _words()[split]["functions"].splitlines():
        if line.startswith(" "):
            kinds = dict(part.split(":") for part in _parts(head[2], ","))
            function = Function(domain, _parts(head[0], ","), _parts(head[1], ","), kinds, _parts(line, ";"))
            found.setdefault(domain, []).append(function)
        elif "|" in line:
            head = line.split("|")
        else:
            domain = line
    return found


@dataclass(frozen=True)
class _Provider:
    """A provider in one entry, with its way to name functions; all of an entry call a thing by the same word."""

    name: str
    variant: int
    form: str
    word: int

    def words(self, function: Function, variant: int) -> str:
        return f"{function.verbs[variant % len(function.verbs)].replace('_', ' ')} {self.thing(function)}"

    def thing(self, function: Function) -> str:
        return function.things[self.word % len(function.things)]

    def tool_name(self, function: Function) -> str:
        name = re.sub(r"\W", "_", self.words(function, self.variant))
        return self.form.format(domain=function.domain, provider=self.name, name=name)

    def tool(self, function: Function) -> dict[str, Any]:
        types = {name: {"type": _TYPES.get(kind, "string")} for name, kind in function.parameters.items()}
        schema = {"type": "object", "properties": types, "required": list(function.parameters)}
        description = self.words(function, self.variant + 1).capitalize()
        return tool_json(Tool(self.tool_name(function), description, schema))


def _request(function: Function, thing: str, rng: random.Random) -> tuple[str, dict[str, Any]]:
    """How a user asks for `function`, mostly by the word that the tools have, and the arguments that this means."""
    given: dict[str, Any] = {}
    for name, kind in function.parameters.items():
        given[name] = rng.choice([value for value in values(kind) if value not in given.values()])
    said = {name: ("off", "on")[value] if isinstance(value, bool) else value for name, value in given.items()}
    plain = [ask for ask in function.asks if "{it}" in ask]
    ask = rng.choice(plain if plain and rng.random() < _PLAINLY else function.asks)
    text = ask.format(it=thing if rng.random() < _PLAINLY else rng.choice(function.things), **said)
    return text[0].upper() + text[1:], given


def _turns(provider: _Provider, function: Function, verdict: str | None, rng: random.Random) -> list[dict[str, Any]]:
    """A request, the call that answers it, and the user's verdict on it where there is one."""
    text, given = _request(function, provider.thing(function), rng)
    call = {"name": provider.tool_name(function), "arguments": json.dumps(given)}
    identity = f"call_{rng.randrange(16**6):06x}"
    made = {"role": "assistant", "tool_calls": [{"id": identity, "type": "function", "function": call}]}
    said = [{"role": "tool", "tool_call_id": identity, "content": verdict}] if verdict else []
    return [{"role": "user", "content": text}, made, *said]


def _verdicts(kind: str, count: int, rng: random.Random) -> list[list[str]]:
    """What the user said of the calls of each provider of the asked function; the wanted one comes first."""
    if kind == "alone":
        return [rng.choice([[], [], ["liked"], ["disliked"], ["disliked"]])]
    good = "used" if rng.random() < 0.1 else "liked"
    wanted = [good] * (1 if kind == "known" else rng.choice([0, 1, 1, 1, 1, 2]))
    return [wanted] + [["disliked"] * (1 if not wanted else rng.choice([0, 1, 1, 1])) for _ in range(count - 1)]


class _Scene:
    """The providers, tools and earlier calls of one entry as they come together."""

    def __init__(self, split: str, rng: random.Random) -> None:
        self.rng, self.domains = rng, domains(split)
        names, form, first = _words()[split]["providers"], rng.choice(_FORMS), rng.randrange(9)
        chosen, word = rng.sample(names, len(names)), rng.randrange(12)
        self.providers = [_Provider(name, first + index, form, word) for index, name in enumerate(chosen)]
        self.tools: list[dict[str, Any]] = []
        self.calls: list[list[dict[str, Any]]] = []

    def add(self, provider: _Provider, offered: Sequence[Function], asked: Sequence[Function], said: list[str]) -> None:
        """A provider with the functions that it offers, and earlier calls of some that were `asked`, by verdict."""
        self.tools += [provider.tool(function) for function in offered]
        self.calls += [_turns(provider, self.rng.choice(asked), verdict, self.rng) for verdict in said]

    def distract(self, names: Sequence[str]) -> None:
        """Fill the list with tools of other domains, by providers that the user likes, dislikes or does not know."""
        rng = self.rng
        most = max(len(self.tools) + 1, rng.randint(4, _MOST_TOOLS))
        for name in names:
            offered = rng.sample(self.domains[name], rng.choice([1, 2]))
            for _ in range(rng.choice([1, 2])):
                if len(self.tools) + len(offered) <= most:
                    opinion = rng.choice([["liked"], ["disliked"], ["disliked"], [], [], [], []])
                    said = opinion[: _MOST_CALLS - len(self.calls)]
                    self.add(self.providers.pop(), offered, self.domains[name], said)


def _entry(split: str, rng: random.Random) -> dict[str, Any]:
    scene = _Scene(split, rng)
    kind = rng.choices(list(_KINDS), list(_KINDS.values()))[0]
    names = rng.sample(list(scene.domains), len(scene.domains))
    absent, home = scene.domains[names.pop()], scene.domains[names.pop()]
    asked, other = rng.sample(home, 2)
    strange = rng.choice(scene.domains[rng.choice(names)])
    beside = rng.choice([other, strange])
    rivals = [scene.providers.pop() for _ in range(1 if kind == "alone" else rng.choice([2, 2, 2, 3]))]
    for provider, verdicts in zip(rivals, _verdicts(kind, len(rivals), rng), strict=True):
        # two, as `acorn_track_parcel` tells its provider only beside another one of it
        scene.add(provider, [asked, beside], [asked] if kind == "known" else [other, strange], verdicts)
    scene.distract(names)
    rng.shuffle(scene.tools)
    rng.shuffle(scene.calls)
    last = _turns(rivals[0], asked, None, rng)
    if kind == "none":
        small_talk, unknown = rng.choice(_words()[split]["small_talk"]), rng.choice(absent)
        query = small_talk if rng.random() < 0.5 else _request(unknown, rng.choice(unknown.things), rng)[0]
        last = [{"role": "user", "content": query}, {"role": "assistant", "content": NO_TOOL}]
    return {"messages": [turn for call in scene.calls for turn in call] + last, "tools": scene.tools}


def generate(split: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """`count` entries of `split` ("train" or "test") as OpenAI lines, always the same ones for a seed."""
    rng = random.Random(f"{split}-{seed}")
    return [_entry(split, rng) for _ in range(count)]
