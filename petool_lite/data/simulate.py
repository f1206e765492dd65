"""Simulated users over any corpus of calls: entries whose right provider follows from what the user did before.

A call of the corpus is offered by one to four made-up providers under names of their own, among other tools. What the
user thought of the providers is drawn first and written into the history; so the answer follows from what is written,
by likes and dislikes, by the latest use where nothing was rated, or because one provider alone does it. In a tenth of
the entries nobody does.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from petool_lite.data.answers import answer_faults
from petool_lite.data.entries import (
    DISLIKED,
    LIKED,
    NO_TOOL,
    Call,
    Entry,
    Interaction,
    Tool,
    name_words,
    properties,
    providers,
    required,
)
from petool_lite.data.words import AREAS, FIRST, LAST, SAME, SYNONYMS, small_talk, split_name
from petool_lite.errors import PetoolError

_LIGHT = frozenset(word for words in SAME for word in words.split())  # words that say nothing of what is done to what
_PUBLISHED = "<{area}>.<{owner}>.<{name}>"
_FORMS = ("{owner}.{name}", "{owner}__{name}", "{owner}/{name}", "{owner}_{name}", "mcp__{owner}__{name}", _PUBLISHED)
_LONGEST = 1500  # characters of a request; longer ones are documents
_NOT_FREE = {"enum", "const", "pattern", "format", "minimum", "maximum", "multipleOf"}  # of a parameter's schema
_COUNTED = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_A_PASS = 12  # calls of one tool
_OFFERED = 16  # tools of an entry, at most

# What the user thought of the wanted provider and of each rival: two lists of verdicts, in order of time.
_UP, _DOWN = (LIKED,), (DISLIKED,)
_Verdicts = Sequence[str | None]
_KINDS: dict[str, Sequence[tuple[_Verdicts, _Verdicts]]] = {
    "liked": ((_UP, ()), (_UP, _DOWN), (_UP * 2, _DOWN), (_UP * 3, ())),
    "disliked": (((), _DOWN), ((), _DOWN * 2), ((), _DOWN * 3)),
    "mixed": ((_UP + _DOWN + _UP, _DOWN + _UP + _DOWN), (_UP, _UP + _DOWN)),
    "moved": ((_UP, _UP + _DOWN), (_UP * 2, _UP + _DOWN * 2)),
    "more": ((_UP * 2, _UP), (_UP * 3, _UP), (_UP * 2 + _DOWN, _DOWN), (_DOWN, _DOWN * 2)),
    "used": (((None,), ()), ((None,), (None,)), ((None,) * 2, (None,)), ((None,), (None,) * 2)),
}
_OFTEN = ("liked", "disliked", "disliked", "disliked", "used", "used", "mixed", "moved", "more")
# And of whoever offers other tools, or alone does what is asked. It says nothing of what a tool does, so others are
# liked as often as who is right: a model that had seen the right one liked more often called whatever was liked.
_ANYHOW = ((), (), _UP, _UP, _UP, _UP * 2, _UP * 2, _UP * 3, _DOWN, _UP + _DOWN, _DOWN + _UP + _UP)
_ALONE = ((), (), (), _DOWN, _DOWN * 2, _UP, _UP + _DOWN)
_PLAIN: Sequence[_Verdicts] = ((), (), (None,), (None,) * 2)
_IN_ORDER = ("moved", "used")  # here the rivals' calls come before the wanted one's


@dataclass(frozen=True)
class Example:
    """A call of the corpus: what was asked, the called tool, its arguments, and the tools that were offered beside."""

    query: str
    tool: Tool
    arguments: Mapping[str, Any]
    others: tuple[Tool, ...]


@dataclass(frozen=True)
class _Owner:
    """A made-up provider: how its tools are named, and in which style words are joined."""

    form: str
    style: int

    def named(self, tool: Tool, rng: Random) -> str:
        """This provider's name for a tool of the corpus: other words of the same meaning, joined in its own style."""
        words = [
            rng.choice(SYNONYMS.get(word, (word,))) if rng.random() < 0.5 else word for word in split_name(tool.name)
        ]
        return self.form.format(name=_joined([part for word in words for part in word.split("_")], self.style))


def _joined(words: Sequence[str], style: int) -> str:
    if style == 0:
        return "_".join(words)
    if style == 1:
        return words[0] + "".join(word.title() for word in words[1:])
    if style >= 4:
        return " ".join(words).title() if style == 4 else (" " if style == 5 else "/").join(words)
    return "-".join(words) if style == 2 else "".join(word.title() for word in words)


def _owners(count: int, rng: Random) -> list[_Owner]:
    """Providers with names of their own; most write their tools' names in the same form."""
    common, found = rng.choice(_FORMS), dict[str, _Owner]()
    while len(found) < count:
        first, last = rng.choice(FIRST.split()), rng.choice(("", *LAST.split()))
        form = common if rng.random() < 0.9 else rng.choice(_FORMS)
        name = f"{first} {last}".strip() if form == _PUBLISHED else f"{first}{last}"
        name = name if form == _PUBLISHED or rng.random() < 0.3 else name.lower()
        style = rng.randrange(7 if form == _PUBLISHED else 4)
        found[first] = _Owner(form.replace("{owner}", name).replace("{area}", rng.choice(AREAS.split())), style)
    return list(found.values())


def examples_of(entries: Sequence[Entry]) -> list[Example]:
    """The entries' calls, and earlier ones of tools that any of the entries offers, each once.

    Those without a call, with a very long request, disliked, or against their own declaration are no examples. Where
    nothing tells a value (see `_told`) it is left out, and so is the call where its tool needs that value.
    """
    offers = {tool.name: entry for entry in reversed(entries) for tool in entry.tools}
    found: dict[str, Example] = {}
    for entry in entries:
        calls: list[tuple[str, Call, Entry | None]] = []
        if isinstance(entry.answer, Call):
            calls.append((entry.query, entry.answer, entry))
        calls += [(one.query, one.call, offers.get(one.call.name)) for one in entry.history if one.verdict != DISLIKED]
        for query, call, offer in calls:
            tools = [tool for tool in offer.tools if tool.name == call.name] if offer else []
            if len(tools) != 1 or not 0 < len(query) <= _LONGEST:
                continue
            given = {name: call.arguments[name] for name in call.arguments if _told(name, call, query, tools[0])}
            call = Call(call.name, given)
            known = f"{query}\n{call.to_json()}"
            if known in found or answer_faults(Entry("", query, (tools[0],), (), call)):
                continue
            others = tuple(tool for tool in offer.tools if tool is not tools[0]) if offer else ()
            found[known] = Example(query, tools[0], given, others)
    return list(found.values())


def _told(name: str, call: Call, query: str, tool: Tool) -> bool:
    """Whether the request or the parameter's declaration tells what a call gives for it; true and false are choices.

    In half of some public corpora it does not, and who learns from them invents values.
    """
    said = f"{query} {json.dumps(properties(tool).get(name), ensure_ascii=False)}"
    plain, digits = f" {_plain(said)} ", said.replace(",", "")

    def told(value: Any) -> bool:
        if isinstance(value, Mapping):
            return all(map(told, value.values()))
        if isinstance(value, list):
            return all(map(told, value))
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            return True
        if isinstance(value, str):
            return f" {_plain(value)} " in plain if _plain(value) else True
        number = str(value).removesuffix(".0")
        spelled = number in list("0123456789") and f" {_COUNTED[int(number)]} " in plain
        return spelled or re.search(rf"(?<![\d.]){re.escape(number)}(?!\d|\.\d)", digits) is not None

    return told(call.arguments[name])


def _plain(text: str) -> str:
    return re.sub(r"[\W_]+", " ", text.lower()).strip()


def simulate(
    examples: Sequence[Example],
    pool: Sequence[Tool],
    count: int,
    seed: int,
    without_call: float = 0.1,
) -> Iterator[Entry]:
    """`count` entries, one at a time. The same seed gives the same. A pass over the corpus takes every tool, and of the
    calls of one at most 12, others each time: seven tools with 200 calls each would else drown 200 with seven.

    `pool` are more tools to offer beside; `without_call` is the share of entries in which no tool fits. Raises
    PetoolError where the corpus has fewer than two functions.
    """
    if len({example.tool.name for example in examples}) < 2:
        raise PetoolError("the corpus has calls of fewer than two tools", "give calls of several tools")
    beside = _once([*pool, *(tool for example in examples for tool in (example.tool, *example.others))])
    values = _values(examples)
    order: list[int] = []
    for number in range(count):
        if not order:
            order = _pass(examples, Random(f"{seed} order {number}"))
        example = examples[order.pop()]
        draws = (Random(f"{seed} {number} {attempt}") for attempt in range(200))
        changed = ((_with_other_values(example, values, rng), rng) for rng in draws)
        made = (_entry(f"{seed}-{number}", one, examples, beside, rng, without_call) for one, rng in changed)
        entry = next((entry for entry in made if entry is not None), None)
        if entry is None:
            raise PetoolError(f"no user can be simulated for a call of {example.tool.name}", "leave that call out")
        yield entry


def _pass(examples: Sequence[Example], rng: Random) -> list[int]:
    """Indices of one pass over the examples in random order."""
    order = list(range(len(examples)))
    rng.shuffle(order)
    taken = Counter[str]()
    found = []
    for index in order:
        taken[examples[index].tool.name] += 1
        if taken[examples[index].tool.name] <= _A_PASS:
            found.append(index)
    return found


def _entry(
    identity: str,
    example: Example,
    examples: Sequence[Example],
    beside: Sequence[Tool],
    rng: Random,
    without_call: float,
) -> Entry | None:
    """One draw; None where names clash or the answer would not follow from what is written."""
    fits = rng.random() >= without_call
    query = example.query if fits or rng.random() < 0.6 else small_talk(rng)
    owners = _owners(rng.randint(4, 8), rng)
    rivals = owners[: rng.choice((1, 1, 1, 1, 2, 2, 2, 3, 3, 4))]
    renaming = _renaming(example.tool, rng)
    equal = [_offered(owner, example.tool, renaming, rng) for owner in rivals]
    room = _OFFERED - len(rivals) if fits else _OFFERED
    least = rng.choice((int(not fits), room // 2))
    distractors = _distractors(example, beside, rng.randint(least, room), rng)
    tools = [*(equal if fits else ()), *_with_owners(distractors, rivals, owners[len(rivals) :], rng)]
    rng.shuffle(tools)
    if len({tool.name for tool in tools}) < len(tools):
        return None
    history = _history(rng.choice(_OFTEN), rivals, equal, owners[len(rivals) :], examples, rng)
    arguments = {renaming.get(name, name): value for name, value in example.arguments.items()}
    answer = Call(equal[0].name, arguments) if fits else NO_TOOL
    entry = Entry(identity, query, tuple(tools), tuple(history), answer)
    return entry if not fits or follows(entry, [tool.name for tool in equal]) else None


def follows(entry: Entry, equal: Sequence[str]) -> bool:
    """Whether of the tools `equal` the user prefers the answer's: its provider has the best balance of verdicts, or,
    where none of them was rated, was used last. One tool alone needs no history."""
    if len(equal) == 1:
        return True
    known = providers(entry)
    if len({known[name] for name in equal}) < len(equal):
        return False

    def standing(name: str) -> tuple[int, int]:
        events = [(at, item.verdict) for at, item in enumerate(entry.history) if known[item.call.name] == known[name]]
        rated = sum({LIKED: 1, DISLIKED: -1}.get(verdict or "", 0) for _, verdict in events)
        return rated, 0 if any_rated else max((at + 1 for at, _ in events), default=0)

    shown = {known[name] for name in equal}
    any_rated = any(item.verdict for item in entry.history if known[item.call.name] in shown)
    ranked = sorted(equal, key=standing, reverse=True)
    return (
        isinstance(entry.answer, Call) and ranked[0] == entry.answer.name and standing(ranked[0]) > standing(ranked[1])
    )


def _stated(value: Any, query: str) -> bool:
    """Whether a request states a value once, as it is written in the call, so that it can be another one."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return False
    text = str(value)
    return len(re.findall(rf"(?<![\w.]){re.escape(text)}(?![\w]|\.\d)", query)) == 1 == query.count(text)


def _values(examples: Sequence[Example]) -> dict[str, list[str]]:
    """The texts that the corpus's requests state, by the parameter's last word: cities, names, titles."""
    found: dict[str, dict[str, None]] = {}
    for example in examples:
        for name, value in example.arguments.items():
            if isinstance(value, str) and 0 < len(value) <= 40 and _stated(value, example.query):
                found.setdefault(split_name(name)[-1], {})[value] = None
    return {word: list(values) for word, values in found.items()}


def _with_other_values(example: Example, values: Mapping[str, Sequence[str]], rng: Random) -> Example:
    """The example with some of the values that its request states drawn anew, in the request and in the call: digits
    for digits, and a text for a text that another request states for a parameter of the same last word. A value with
    choices, or with a form of its own, stays."""
    query, arguments, declared = example.query, dict(example.arguments), properties(example.tool)
    for name, value in example.arguments.items():
        schema = declared.get(name)
        free = isinstance(schema, Mapping) and not _NOT_FREE & set(schema)
        if not free or rng.random() < 0.5 or not _stated(value, query):
            continue
        if isinstance(value, str):
            new: Any = (
                value if any(map(str.isdigit, value)) else rng.choice(values.get(split_name(name)[-1]) or [value])
            )
        else:
            new = type(value)(re.sub(r"\d", lambda _: rng.choice("123456789"), str(value)))
        if str(new) not in query and len(str(new)) <= 60:
            query, arguments[name] = query.replace(str(value), str(new)), new
    return Example(query, example.tool, arguments, example.others)


def _renaming(tool: Tool, rng: Random) -> dict[str, str]:
    """Other names for a tool's parameters, now and then ones that say nothing, so that declarations have to be read."""
    names = list(properties(tool))
    if rng.random() < 0.5 or any(key.startswith("$") for key in tool.parameters):
        return {}
    style = rng.randrange(4)
    made = {
        name: _joined(split_name(name), style) if rng.random() < 0.8 else f"arg{index + 1}"
        for index, name in enumerate(names)
    }
    return made if len(set(made.values())) == len(names) else {}


def _offered(owner: _Owner, tool: Tool, renaming: Mapping[str, str], rng: Random) -> Tool:
    """A tool of the corpus as a provider offers it."""
    described = {}
    for name, schema in properties(tool).items():
        new = renaming.get(name, name)
        silent = new.startswith("arg") and new != name and isinstance(schema, Mapping) and not schema.get("description")
        described[new] = {**schema, "description": " ".join(split_name(name))} if silent else schema
    needed = {"required": [renaming.get(name, name) for name in required(tool)]} if required(tool) else {}
    return Tool(owner.named(tool, rng), tool.description, {**tool.parameters, "properties": described, **needed})


def _once(tools: Sequence[Tool]) -> list[Tool]:
    """Each name and each description once: some public lists have hundreds that say the same of themselves."""
    named = {tool.name: tool for tool in tools}.values()
    return list({tool.description or tool.name: tool for tool in named}.values())


def _distractors(example: Example, beside: Sequence[Tool], count: int, rng: Random) -> list[Tool]:
    """`count` other tools: some of those that came with the call, the rest from anywhere.

    The latter have no word of the called tool's name in common with it, so that none does the same.
    """
    words = name_words(example.tool.name) - _LIGHT
    near = [tool for tool in example.others if name_words(tool.name) - _LIGHT != words]
    rng.shuffle(near)
    found = {tool.name: tool for tool in near[: rng.randint(0, 6)]}
    for _ in range(1000):
        if len(found) >= count:
            break
        tool = rng.choice(beside)
        if not words & name_words(tool.name):
            found.setdefault(tool.name, tool)
    found.pop(example.tool.name, None)
    return list(found.values())[:count]


def _with_owners(tools: Sequence[Tool], rivals: Sequence[_Owner], others: Sequence[_Owner], rng: Random) -> list[Tool]:
    """Other tools as somebody offers them: a third of them the rivals, now and then each of them the same."""
    found: list[Tool] = []
    for tool in tools:
        both = len(rivals) > 1 and rng.random() < 0.2
        mine = rivals[: 1 + rng.randrange(2)] if rng.random() < 0.35 else others or rivals
        found += [_offered(owner, tool, {}, rng) for owner in (rivals[:2] if both else [rng.choice(mine)])]
    return found[: len(tools)]


def _history(
    kind: str,
    rivals: Sequence[_Owner],
    equal: Sequence[Tool],
    others: Sequence[_Owner],
    examples: Sequence[Example],
    rng: Random,
) -> list[Interaction]:
    """Calls of the rivals as `kind` says, and anything of the others."""
    if len(rivals) == 1 and rng.random() < 0.2:
        return []
    anyhow = _PLAIN if kind == "used" else _ANYHOW
    alone = _PLAIN if kind == "used" else _ALONE
    good, bad = rng.choice(_KINDS[kind]) if len(rivals) > 1 else (rng.choice(alone), ())
    plans = [
        (rivals[0], equal[0], good),
        *((owner, tool, bad) for owner, tool in zip(rivals[1:], equal[1:], strict=True)),
    ]
    calls: list[list[Interaction]] = []
    for owner, tool, verdicts in plans:
        calls.append([_earlier(owner, tool, verdict, examples, rng) for verdict in verdicts])
    made = [*_merged(calls[1:], rng), *calls[0]] if kind in _IN_ORDER else _merged(calls, rng)
    rest = [[_earlier(owner, None, verdict, examples, rng) for verdict in rng.choice(anyhow)] for owner in others]
    return _merged([made, *rest], rng)


def _merged(parts: Sequence[Sequence[Any]], rng: Random) -> list[Any]:
    """All items, each part in its own order."""
    turns = [index for index, part in enumerate(parts) for _ in part]
    rng.shuffle(turns)
    queues = [iter(part) for part in parts]
    return [next(queues[index]) for index in turns]


def _earlier(
    owner: _Owner, tool: Tool | None, verdict: str | None, examples: Sequence[Example], rng: Random
) -> Interaction:
    """An earlier call of a provider: now and then of the very tool that it offers, else of another tool."""
    other = rng.choice(examples)
    if tool is not None and rng.random() < 0.3:
        return Interaction(other.query[:300], Call(tool.name, {}), verdict)
    return Interaction(other.query[:300], Call(owner.named(other.tool, rng), other.arguments), verdict)
