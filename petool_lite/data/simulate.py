"""Simulated users over any corpus of calls: entries whose right provider follows from what the user did before. A call
is offered by one to four made-up providers under names of their own, among other tools. What the user thought of them
is drawn first and written into the history; so the answer follows from it: by likes and dislikes, by the latest use
where nobody rates (settings but "rating"), or because one alone does it. In an eighth of the requests nobody does."""

import json
import re
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import count as counter
from pathlib import Path
from random import Random
from typing import Any

from petool_lite.data import entries
from petool_lite.data.answers import answer_faults
from petool_lite.data.entries import DISLIKED, LIKED, NO_TOOL, Call, Entry, Interaction, Tool, properties, required
from petool_lite.data.openai import learned_turns
from petool_lite.data.values import COUNTED, stated_texts, with_other_values
from petool_lite.errors import PetoolError

_PUBLISHED = "<{area}>.<{owner}>.<{name}>"
_FORMS = ("{owner}.{name}", "{owner}__{name}", "{owner}/{name}", "{owner}_{name}", "mcp__{owner}__{name}", _PUBLISHED)
_A_PASS = 12  # calls of one tool
_LONGEST = 1500  # characters of a request; longer ones are documents
WITHOUT = 0.12  # share of the requests that no offered tool fits
_OFFERED, _ASKED = 16, 11  # tools of an entry, at most, and of these such as do what is asked for
_ALONE = 0.08  # share of entries with one request and few tools, which four times as often do something else

# What the user thought of a provider, in order of time: verdicts, None for plain use.
_UP, _DOWN, _USED = (LIKED,), (DISLIKED,), (None,)
_Verdicts = Sequence[str | None]
_RATED: Sequence[_Verdicts] = (
    *((), (), (), (), (), (), _USED, _USED * 2, _UP, _UP, _UP, _UP * 2, _UP * 2, _UP * 3, _UP + _USED),
    *(_DOWN, _DOWN, _DOWN, _DOWN * 2, _DOWN * 2, _DOWN * 3, _DOWN * 5, _DOWN + _USED),
    *(_UP + _DOWN, _UP + _DOWN + _UP, _DOWN + _UP + _DOWN, _DOWN + _UP + _UP),
)
_PLAIN: Sequence[_Verdicts] = ((), (), _USED, _USED, _USED * 2, _USED * 3)


@dataclass(frozen=True)
class Example:
    """A call of the corpus: what was asked, the called tool, its arguments, and the tools that were offered beside."""

    query: str
    tool: Tool
    arguments: Mapping[str, Any]
    others: tuple[Tool, ...]


def examples_of(entries: Sequence[Entry], made: bool = False) -> list[Example]:
    """The entries' calls, and earlier ones of tools that any of them offers, each once: none with a very long request,
    disliked, against its declaration, or of a test (a line that says what it accepts). Unless `made`, a value that
    nothing tells goes, and a call that needs it."""
    offers = {tool.name: entry for entry in reversed(entries) for tool in entry.tools}
    found: dict[str, Example] = {}
    for entry in entries:
        if entry.accepted:
            continue
        calls = [(entry.query, entry.answer, entry)] if isinstance(entry.answer, Call) else []
        calls += [(one.query, one.call, offers[one.call.name]) for one in entry.history
                  if one.verdict != DISLIKED and one.call.name in offers]  # fmt: skip
        for query, call, offer in calls:
            tools = [tool for tool in offer.tools if tool.name == call.name]
            if len(tools) != 1 or not 0 < len(query) <= _LONGEST:
                continue
            given = {key: one for key, one in call.arguments.items() if made or _told(key, call, query, tools[0])}
            call = Call(call.name, given)
            if not answer_faults(Entry("", query, (tools[0],), (), call)):
                others = tuple(tool for tool in offer.tools if tool is not tools[0])
                found.setdefault(f"{query}\n{call.to_json()}", Example(query, tools[0], given, others))
    return list(found.values())


def _told(name: str, call: Call, query: str, tool: Tool) -> bool:
    """Whether the request or the declaration tells what a call gives for a parameter; true and false are choices. In
    half of some public corpora neither does, and who learns from them invents values."""
    said = f"{query} {json.dumps(properties(tool).get(name), ensure_ascii=False)}"
    plain, digits = f" {_plain(said)} ", said.replace(",", "")

    def told(value: Any) -> bool:
        if isinstance(value, Mapping | list):
            return all(map(told, value.values() if isinstance(value, Mapping) else value))
        if isinstance(value, str):
            return not _plain(value) or f" {_plain(value)} " in plain
        if isinstance(value, bool) or not isinstance(value, int | float):
            return True
        number = str(value).removesuffix(".0")
        if number in list("0123456789") and f" {COUNTED[int(number)]} " in plain:
            return True
        return re.search(rf"(?<![\d.]){re.escape(number)}(?!\d|\.\d)", digits) is not None

    return told(call.arguments[name])


def _plain(text: str) -> str:
    return re.sub(r"[\W_]+", " ", text.lower()).strip()


@cache
def _words(kind: str) -> list[str]:
    found = tomllib.loads(Path(__file__).with_name("simulated_words.toml").read_text(encoding="utf-8"))[kind]
    return found if isinstance(found, list) else str(found).split()


@cache
def _synonyms() -> dict[str, list[str]]:
    """Words of the same meaning, by each of them; they say nothing of what is done to what."""
    return {word: words.split() for words in _words("same") for word in words.split()}


def _small_talk(rng: Random) -> str:
    """Something that a user says and no tool is for."""
    if rng.random() < 0.3:
        return rng.choice(_words("talk"))
    return rng.choice(_words("wondered")).format(rng.choice(_words("things")))


@dataclass(frozen=True)
class _Owner:
    """A made-up provider: how its tools are named, and in which style words are joined."""

    form: str
    style: int

    def named(self, tool: Tool, rng: Random) -> str:
        """This provider's name for a tool of the corpus: other words of the same meaning, joined in its own style."""
        same = _synonyms()
        words = [
            rng.choice(same.get(word, [word])) if rng.random() < 0.5 else word for word in entries.word_list(tool.name)
        ]
        return self.form.format(name=_joined([part for word in words for part in word.split("_")], self.style))


def _joined(words: Sequence[str], style: int) -> str:
    titles = [word.title() for word in words]
    ways = ("_".join(words), words[0] + "".join(titles[1:]), "-".join(words), "".join(titles))
    return (*ways, " ".join(words).title(), " ".join(words), "/".join(words))[style]


def _owners(count: int, rng: Random) -> list[_Owner]:
    """Providers with names of their own; most write their tools' names in the same form."""
    common, found = rng.choice(_FORMS), dict[str, _Owner]()
    while len(found) < count:
        first, last = rng.choice(_words("first")), rng.choice(("", *_words("last")))
        form = common if rng.random() < 0.9 else rng.choice(_FORMS)
        name = f"{first} {last}".strip() if form == _PUBLISHED else f"{first}{last}"
        name = name if form == _PUBLISHED or rng.random() < 0.3 else name.lower()
        style = rng.randrange(7 if form == _PUBLISHED else 4)
        found[first] = _Owner(form.replace("{owner}", name).replace("{area}", rng.choice(_words("areas"))), style)
    return list(found.values())


@dataclass(frozen=True)
class _Corpus:
    """Calls, also by tool, the texts they state (see `values`), tools to offer beside, `simulate`'s last arguments."""

    examples: Sequence[Example]
    calls: Mapping[str, Sequence[Example]]
    beside: Sequence[Tool]
    values: Mapping[str, Sequence[str]]
    without: float
    setting: str


def simulate(
    examples: Sequence[Example],
    pool: Sequence[Tool],
    count: int,
    seed: int,
    setting: str = "rating",
    without: float = WITHOUT,
    requests: int = 6,
) -> Iterator[Entry]:
    """`count` entries, one at a time, the same for a seed. A pass over the corpus takes every tool, and of the calls of
    one at most `_A_PASS`, others each time, or a few would drown the rest. An entry asks for up to `requests` things of
    the same tools; all but the last are among its `turns`, their answers marked to be learned. `pool` are more tools to
    offer; the share `without` of requests fits none, four times as many where a tool or two are offered alone. Raises
    PetoolError for fewer than two functions."""
    if len({example.tool.name for example in examples}) < 2:
        raise PetoolError("the corpus has calls of fewer than two tools", "give several; a test's do not count")
    named = {tool.name: tool for tool in [*pool, *(tool for one in examples for tool in (one.tool, *one.others))]}
    # each description once: some public lists have hundreds that say the same of themselves
    beside = list({tool.description or tool.name: tool for tool in named.values()}.values())
    named_calls = defaultdict[str, list[Example]](list)
    for example in examples:
        named_calls[example.tool.name].append(example)
    stated = stated_texts((one.query, one.arguments) for one in examples)
    corpus = _Corpus(examples, named_calls, beside, stated, without, setting)
    order: list[int] = []
    for number in range(count):
        wanted = list[Example]()
        for _ in range(Random(f"{seed} {number}").randint(1, requests)):
            if not order:
                order, calls = list(range(len(examples))), defaultdict[str, Iterator[int]](counter)
                Random(f"{seed} order {number}").shuffle(order)
                order = [index for index in order if next(calls[examples[index].tool.name]) < _A_PASS]
            wanted.append(examples[order.pop()])
        draws = (Random(f"{seed} {number} {attempt}") for attempt in range(200))
        entry = next(filter(None, (_entry(f"{seed}-{number}", wanted, corpus, rng) for rng in draws)), None)
        if entry is None:
            raise PetoolError(f"no user can be simulated for a call of {wanted[0].tool.name}", "leave that call out")
        yield entry


_Asked = tuple[str, Call | str, Sequence[str]]  # a request, its answer, and the names of all tools that do it


@dataclass(frozen=True)
class _Offer:
    """A tool that does what is asked for, as one provider offers it."""

    owner: _Owner
    tool: Tool
    example: Example
    renaming: Mapping[str, str]

    def call(self, example: Example) -> Call:
        """The call that this provider takes for an example of the same tool, in its declaration's order."""
        named = {self.renaming.get(name, name): value for name, value in example.arguments.items()}
        return Call(self.tool.name, _in_order(named, self.tool.parameters))


def _in_order(value: Any, schema: Any) -> Any:
    """Arguments, and the objects in them, with their members as a JSON Schema lists them, others last: where a server
    holds a reply to the schema they come in this order, and one that is passed over cannot follow."""
    if not isinstance(schema, Mapping) or not isinstance(value, Mapping | list):
        return value
    if isinstance(value, list):
        return [_in_order(item, schema.get("items")) for item in value]
    declared = schema.get("properties")
    declared = declared if isinstance(declared, Mapping) else {}
    return {name: _in_order(value[name], declared.get(name)) for name in [*declared, *value] if name in value}


def _entry(identity: str, wanted: Sequence[Example], corpus: _Corpus, rng: Random) -> Entry | None:
    """One draw; None where names clash or no answer would follow from what is written."""
    owners = _owners(rng.randint(4, 8), rng)
    thought = _RATED if rng.random() < 0.75 and corpus.setting == "rating" else _PLAIN
    opinions = {owner: rng.choice(thought) for owner in owners}
    alone = rng.random() < _ALONE
    events = _merged(opinions, rng) if rng.random() < (0.5 if alone else 0.92) else []
    if corpus.setting == "chronological" and rng.random() < 0.8:  # one provider was used before all others
        first = rng.choice(owners)
        events.sort(key=lambda event: event[0] != first)
    offers, asked = list[_Offer](), list[_Asked]()
    taken, near = list[frozenset[str]](), list[Tool]()
    for example in wanted[:1] if alone else wanted:
        own = entries.name_words(example.tool.name) - frozenset(_synonyms())
        if own in taken or any(own & other for other in taken):  # two tools of like names may do the same
            continue
        query, arguments = with_other_values(example.query, example.arguments, example.tool, corpus.values, rng)
        example = replace(example, query=query, arguments=arguments)
        fits = rng.random() >= corpus.without * (4 if alone else 1)
        rivals = _rivals(owners, events, corpus.setting, rng)
        if fits and len(offers) + len(rivals) > _ASKED:
            continue
        taken.append(own)
        near += rng.sample(example.others, min(len(example.others), rng.randint(0, 6 if len(wanted) == 1 else 3)))
        if not fits:
            asked.append((example.query if rng.random() < 0.7 else _small_talk(rng), NO_TOOL, ()))
            continue
        equal = list[_Offer]()
        for owner in rivals:
            renaming = _renaming(example.tool, rng)
            equal.append(_Offer(owner, _offered(owner, example.tool, renaming, rng), example, renaming))
        asked.append((example.query, equal[0].call(example), tuple(offer.tool.name for offer in equal)))
        offers += equal
    tools = [offer.tool for offer in offers]
    room, others = _OFFERED - len(tools), list[Tool]()
    count = rng.choice((0, 0, 1, 2)) if alone else rng.randint(rng.choice((0, room // 2)), room)
    count = count or int(not tools)
    for tool in _distractors(near, taken, corpus.beside, count, rng):  # now and then two providers offer the same
        others += [_offered(owner, tool, {}, rng) for owner in rng.sample(owners, 2 if rng.random() < 0.15 else 1)]
    tools += others[:count]
    rng.shuffle(tools)
    rng.shuffle(asked)
    if not tools or len({tool.name for tool in tools}) < len(tools):
        return None
    history = tuple(_earlier(owner, said, [one for one in offers if one.owner == owner], corpus, rng)
                    for owner, said in events)  # fmt: skip
    made = [Entry(identity, query, tuple(tools), history, answer) for query, answer, _ in asked]
    pairs = zip(made, asked, strict=True)
    good = [entry for entry, (_, _, equal) in pairs if not equal or follows(entry, equal, corpus.setting)]
    turns = tuple(turn for entry in good[:-1] for turn in learned_turns(entry))
    return replace(good[-1], turns=turns) if good else None


def _merged(opinions: Mapping[_Owner, _Verdicts], rng: Random) -> list[tuple[_Owner, str | None]]:
    """All verdicts with whom they are of, those of each in their own order."""
    turns = [owner for owner, verdicts in opinions.items() for _ in verdicts]
    rng.shuffle(turns)
    queues = {owner: iter(verdicts) for owner, verdicts in opinions.items()}
    return [(owner, next(queues[owner])) for owner in turns]


def _rivals(owners: Sequence[_Owner], events: Sequence[tuple[_Owner, Any]], setting: str, rng: Random) -> list[_Owner]:
    """One to four providers whom the user does not like alike, the preferred first."""
    chosen: list[_Owner] = []
    for _ in range(20):
        chosen = rng.sample(owners, min(len(owners), rng.choice((1, 1, 1, 2, 2, 2, 3, 3, 4))))
        standing = _standings(events, chosen, setting)
        chosen.sort(key=lambda owner: standing[owner], reverse=True)
        if len(chosen) == 1 or standing[chosen[0]] > standing[chosen[1]]:
            return chosen
    return chosen[:1]


def _standings(events: Sequence[tuple[Any, Any]], shown: Sequence[Any], setting: str) -> dict[Any, tuple[int, int]]:
    """For each provider shown: likes minus dislikes, and where none was rated, when it was last used; chronological: in
    the first half is worse than never, for the user has left it."""
    rated, found = any(verdict for owner, verdict in events if owner in shown), dict.fromkeys(shown, (0, 0))
    for at, (owner, verdict) in enumerate(events, 1):
        when = -1 if setting == "chronological" and 2 * at <= len(events) else at
        if owner in found:
            found[owner] = found[owner][0] + {LIKED: 1, DISLIKED: -1}.get(verdict or "", 0), 0 if rated else when
    return found


def follows(entry: Entry, equal: Sequence[str], setting: str = "rating") -> bool:
    """Whether of the tools `equal` the user prefers the answer's: its provider has the best balance of verdicts, or,
    where none of them was rated, was used last. One tool alone needs no history."""
    if len(equal) == 1:
        return True
    known = entries.providers(entry)
    events = [(known[item.call.name], item.verdict) for item in entry.history]
    standing = _standings(events, [known[name] for name in equal], setting)
    right = known[entry.answer.name] if isinstance(entry.answer, Call) else ""
    apart = right in standing and len(standing) == len(equal)  # of a provider each
    return apart and all(standing[right] > other for owner, other in standing.items() if owner != right)


def _renaming(tool: Tool, rng: Random) -> dict[str, str]:
    """Other names for a tool's parameters, now and then ones that say nothing, so that declarations have to be read."""
    names = list(properties(tool))
    if rng.random() < 0.5 or any(key.startswith("$") for key in tool.parameters):
        return {}
    style, made = rng.randrange(4), {}
    for number, name in enumerate(names, 1):
        made[name] = _joined(entries.word_list(name), style) if rng.random() < 0.8 else f"arg{number}"
    return made if len(set(made.values())) == len(names) else {}


def _described(tool: Tool, rng: Random) -> str:
    """A provider's description: the same, in other words or, where the name tells it, too, its beginning or none."""
    text, way = tool.description.strip(), rng.random()
    if not text or way < 0.3:
        return text
    if way < 0.6 and entries.name_words(tool.name) & entries.words(text):
        return "" if way < 0.45 else " ".join(re.split(r"(?<=[.!?])\s", text)[0].split()[: rng.randint(4, 12)])
    text = re.sub(r"[a-z]+", lambda one: rng.choice(_synonyms().get(one[0], [one[0]])).replace("_", " "), text)
    text = text[:1].lower() + text[1:] if text[1:2].islower() else text
    return rng.choice(_words("described")).format(text)


def _offered(owner: _Owner, tool: Tool, renaming: Mapping[str, str], rng: Random) -> Tool:
    """A tool of the corpus as a provider offers it."""
    described = {}
    for name, schema in properties(tool).items():
        new = renaming.get(name, name)
        silent = new.startswith("arg") and new != name and isinstance(schema, Mapping) and not schema.get("description")
        described[new] = {**schema, "description": " ".join(entries.word_list(name))} if silent else schema
    needed = {"required": [renaming.get(name, name) for name in required(tool)]} if required(tool) else {}
    schema = {**tool.parameters, "properties": described, **needed}
    return Tool(owner.named(tool, rng), _described(tool, rng), schema)


def _distractors(
    near: Sequence[Tool], taken: Sequence[frozenset[str]], beside: Sequence[Tool], count: int, rng: Random
) -> list[Tool]:
    """`count` other tools: of those that came with a call, `near`, all whose names differ by more than light words from
    the names `taken`, and others from anywhere without a word of these, so that none does what is asked for."""
    found = {tool.name: tool for tool in near if entries.name_words(tool.name) - frozenset(_synonyms()) not in taken}
    words = frozenset[str]().union(*taken)
    for _ in range(1000):
        if len(found) >= count:
            break
        tool = rng.choice(beside)
        if not words & entries.name_words(tool.name):
            found.setdefault(tool.name, tool)
    return list(found.values())[:count]


def _earlier(owner: _Owner, verdict: str | None, own: Sequence[_Offer], corpus: _Corpus, rng: Random) -> Interaction:
    """An earlier call of a provider: now and then of a tool that it offers now, one of its `own`, else of another."""
    if own and rng.random() < 0.35:
        offer = rng.choice(own)
        other = rng.choice(corpus.calls[offer.example.tool.name])
        return Interaction(other.query[:300], offer.call(other), verdict)
    other = rng.choice(corpus.examples)
    return Interaction(other.query[:300], Call(owner.named(other.tool, rng), other.arguments), verdict)
