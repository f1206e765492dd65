"""The generated conversations: fixed, told by what is written in them, and not to be had without reading both parts."""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest

from petool_lite.data.answers import answer_faults
from petool_lite.data.demo import Function, domains, generate, values
from petool_lite.data.entries import NO_TOOL, Call, Entry, Tool, balance, providers, words
from petool_lite.data.openai import parse


def said_of(value: object) -> str:
    return ("off", "on")[value] if isinstance(value, bool) else str(value)


@cache
def functions(split: str) -> list[Function]:
    return [function for offered in domains(split).values() for function in offered]


@cache
def requests(split: str) -> list[tuple[re.Pattern[str], Function]]:
    """Every way to ask for every function, with the values that it may name."""
    found = []
    for function in functions(split):
        said = {name: map(said_of, values(kind)) for name, kind in function.parameters.items()}
        slots = {name: f"({'|'.join(words)})" for name, words in (said | {"it": function.things}).items()}
        asks = (ask.replace("?", "[?]").format(**slots) for ask in function.asks)
        found += [(re.compile(ask, re.IGNORECASE), function) for ask in asks]
    return found


def does(tool: Tool, function: Function) -> bool:
    said, verbs = tool.description.lower(), tuple(verb.replace("_", " ") for verb in function.verbs)
    return said.endswith(function.things) and said.startswith(verbs)


@dataclass(frozen=True)
class Read:
    """An entry, the function that it asks for, and the names of the tools that do it."""

    entry: Entry
    function: Function | None
    able: tuple[str, ...]

    @property
    def answer(self) -> str:
        return self.entry.answer.name if isinstance(self.entry.answer, Call) else str(self.entry.answer)


@cache
def read(split: str, count: int, seed: int = 0) -> list[Read]:
    found = []
    for index, row in enumerate(generate(split, count, seed)):
        entry = parse(row, str(index))
        named = [function for pattern, function in requests(split) if pattern.fullmatch(entry.query)]
        assert len(named) <= 1
        able = [tool.name for tool in entry.tools if named and does(tool, named[0])]
        found.append(Read(entry, named[0] if named else None, tuple(able)))
    return found


def test_no_function_name_or_provider_of_the_test_split_occurs_in_training() -> None:
    def seen(split: str) -> tuple[set[str], ...]:
        listed = functions(split)
        return (
            {who for row in read(split, 800) for who in providers(row.entry).values()},
            {name for row in read(split, 800) for name in providers(row.entry)},
            {thing for function in listed for thing in function.things},
        )

    for train, test in zip(seen("train"), seen("test"), strict=True):
        assert train.isdisjoint(test)
    assert len(functions("train")) >= 50
    assert len(functions("test")) >= 20


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("split", ["train", "test"])
def test_the_answer_follows_from_what_is_written(split: str, seed: int) -> None:
    """The request tells the function and the values; of those who offer it, one has the best verdicts."""
    for row in read(split, 400, seed):
        assert answer_faults(row.entry) == []
        if not row.able:
            assert row.entry.answer == NO_TOOL
            continue
        best, *others = sorted(row.able, key=lambda name: balance(row.entry, name), reverse=True)
        assert row.answer == best
        assert all(balance(row.entry, name) < balance(row.entry, best) for name in others)
        assert isinstance(row.entry.answer, Call)
        assert row.function
        assert row.entry.answer.arguments.keys() == row.function.parameters.keys()
        for value in row.entry.answer.arguments.values():
            assert said_of(value).lower() in row.entry.query.lower()


def test_neither_the_request_nor_the_history_alone_is_enough() -> None:
    draw = random.Random(1)

    def overlap(row: Read, tool: Tool) -> int:
        return len(words(row.entry.query) & words(f"{tool.name} {tool.description}"))

    def best(key: Callable[[Read, Tool], object]) -> Callable[[Read], str]:
        return lambda row: max(row.entry.tools, key=lambda tool: key(row, tool)).name

    rules: dict[str, tuple[Callable[[Read], str], float]] = {
        "best-liked": (best(lambda row, tool: balance(row.entry, tool.name)), 0.6),
        "shared words, then liked": (best(lambda row, tool: (overlap(row, tool), balance(row.entry, tool.name))), 0.8),
        "knows the function": (lambda row: draw.choice(row.able or [NO_TOOL]), 0.6),
    }
    rows = read("test", 1500)
    scores = {name: sum(rule(row) == row.answer for row in rows) / len(rows) for name, (rule, _) in rules.items()}
    over = {name: score for name, score in scores.items() if score > rules[name][1]}
    assert not over
