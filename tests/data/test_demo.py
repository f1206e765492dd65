"""The generated conversations: fixed, told by what is written in them, and not to be had without reading both parts."""

import json
import random
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from petool_lite.data.demo import NO_TOOL, Function, domains, generate

SCORE = {"liked": 1, "used": 1, "disliked": -1}


@cache
def functions(split: str) -> list[Function]:
    return [function for offered in domains(split).values() for function in offered]


@cache
def asked(split: str) -> list[tuple[re.Pattern[str], Function]]:
    return [
        (re.compile(re.sub(r"\\\{\w+\\\}", "(.+)", re.escape(ask)) + "$"), function)
        for function in functions(split)
        for ask in function.asks
    ]


class Read:
    """An entry as somebody reads it who has only the generator's list of functions beside it."""

    def __init__(self, row: dict[str, Any], split: str) -> None:
        self.query = row["messages"][-2]["content"]
        self.tools = [tool["function"] for tool in row["tools"]]
        said = {text: function for function in functions(split) for text in function.descriptions}
        self.does = {tool["name"]: said[tool["description"]] for tool in self.tools}
        self.wanted = next((function for pattern, function in asked(split) if pattern.match(self.query)), None)
        self.able = [name for name, function in self.does.items() if function == self.wanted]
        self.rated: list[tuple[str, int]] = []
        for turn, verdict in zip(row["messages"], row["messages"][1:], strict=False):
            if verdict["role"] == "tool":
                self.rated.append((turn["tool_calls"][0]["function"]["name"], SCORE[verdict["content"]]))
        last = row["messages"][-1]
        self.call = last["tool_calls"][0]["function"] if "tool_calls" in last else None
        self.answer = self.call["name"] if self.call else last["content"]

    def balance(self, name: str) -> int:
        return sum(score for called, score in self.rated if provider(called) == provider(name))


def provider(name: str) -> str:
    plain = name.removeprefix("mcp__")
    return plain.split(">.<")[1] if plain.startswith("<") else re.split(r"__|[._/]", plain)[0]


def read(split: str, count: int, seed: int = 0) -> list[Read]:
    return [Read(row, split) for row in generate(split, count, seed)]


def test_the_same_seed_gives_the_same_entries() -> None:
    assert generate("train", 9) == generate("train", 9)
    assert generate("train", 9)[:5] == generate("train", 5)
    assert generate("train", 9) != generate("train", 9, seed=1)


def test_no_function_name_or_provider_of_the_test_split_occurs_in_training() -> None:
    def seen(split: str) -> tuple[set[str], ...]:
        names = {tool["function"]["name"] for row in generate(split, 800) for tool in row["tools"]}
        listed = functions(split)
        return (
            {provider(name) for name in names},
            {name for function in listed for name in function.names},
            {text for function in listed for text in (*function.descriptions, *function.asks)},
        )

    for train, test in zip(seen("train"), seen("test"), strict=True):
        assert train.isdisjoint(test)
    assert len(functions("train")) >= 36
    assert len(functions("test")) >= 20


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("split", ["train", "test"])
def test_the_answer_follows_from_what_is_written(split: str, seed: int) -> None:
    """The request tells the function and the values; of those who offer it, one has the best verdicts."""
    for row in read(split, 400, seed):
        if not row.able:
            assert row.answer == NO_TOOL
            continue
        best, *others = sorted(row.able, key=row.balance, reverse=True)
        assert row.answer == best
        assert all(row.balance(name) < row.balance(best) for name in others)
        values = json.loads(row.call["arguments"])
        assert values.keys() == row.wanted.parameters.keys()
        for value in values.values():
            said = {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
            assert said in row.query


def test_neither_the_request_nor_the_history_alone_is_enough() -> None:
    def words(text: str) -> set[str]:
        return set(re.findall(r"[^\W_]+", text.lower()))

    def overlap(row: Read, tool: dict[str, Any]) -> int:
        return len(words(row.query) & words(f"{tool['name']} {tool['description']}"))

    def by(key: Callable[[Read, dict[str, Any]], Any]) -> Callable[[Read], str]:
        return lambda row: max(row.tools, key=lambda tool: key(row, tool))["name"]

    draw = random.Random(1)
    rules: dict[str, tuple[Callable[[Read], str], float]] = {
        "random": (lambda row: draw.choice(row.tools)["name"], 0.25),
        "first": (lambda row: row.tools[0]["name"], 0.25),
        "best-liked": (by(lambda row, tool: row.balance(tool["name"])), 0.6),
        "shared words": (by(overlap), 0.6),
        "shared words, then liked": (by(lambda row, tool: (overlap(row, tool), row.balance(tool["name"]))), 0.6),
        "knows the function": (lambda row: draw.choice(row.able or [NO_TOOL]), 0.6),
        "knows the provider": (
            lambda row: draw.choice([name for name in row.does if provider(name) == provider(row.answer)] or [NO_TOOL]),
            0.6,
        ),
    }
    rows = read("test", 1500)
    scores = {name: sum(rule(row) == row.answer for row in rows) / len(rows) for name, (rule, _) in rules.items()}
    assert all(score <= rules[name][1] for name, score in scores.items()), scores


def test_every_kind_of_request_and_every_form_of_name_is_there() -> None:
    rows = read("train", 1000)
    assert all(5 <= len(row.tools) <= 8 and len(row.rated) <= 6 for row in rows)
    assert 70 <= sum(not row.able for row in rows) <= 130
    assert {len(row.able) for row in rows} == {0, 1, 2, 3}
    assert 100 < sum(any(name == row.answer for name, _ in row.rated) for row in rows) < 400
    assert sum(len(row.able) == 1 and row.balance(row.answer) < 0 for row in rows) > 30
    forms = {re.sub(r"[a-z]+(_[a-z]+)*", "a", row.tools[0]["name"].removeprefix("mcp__"), flags=re.I) for row in rows}
    assert len(forms) >= 5
