"""Copies under other names: which values of the answer change, and how."""

from dataclasses import replace
from random import Random

import pytest

from petool_lite.data.demo import generate
from petool_lite.data.entries import Entry, Parameter, ToolCall, parse_entry
from petool_lite.data.rename import renamed, scrambled


def with_answer(query: str, parameters: dict, defaults: dict) -> Entry:
    """An entry of the demo whose right tool has these parameters."""
    entry = parse_entry(generate("train", 1)[0], "rating", "demo", 0)
    prompt = entry.prompt("rating")
    required = tuple(Parameter(name, "STRING", "", value) for name, value in defaults.items())
    tools = [
        (replace(tool, required=required, optional=()) if tool.name == entry.gold.tool_name else tool, text)
        for tool, text in zip(prompt.tools, prompt.tool_texts, strict=True)
    ]
    gold = ToolCall(entry.gold.tool_name, parameters)
    return replace(entry, query=query, gold=gold, prompts={"rating": prompt.with_tools(tools)})


def copied(entry, seed: int = 0):
    return renamed(entry, "rating", Random(seed), ["A", "B", "C", "D", "E", "F", "G", "H", "I", "J", "K", "L"])


def test_a_default_that_the_query_repeats_changes_in_both() -> None:
    entry = with_answer("the item AB12-77 please", {"item": "AB12-77"}, {"item": "AB12-77"})
    made = [copied(entry, seed) for seed in range(20)]
    assert all(copy.gold.parameters["item"] in copy.query for copy in made)
    assert len({copy.gold.parameters["item"] for copy in made}) == 20


@pytest.mark.parametrize("value", ["10", "100"])
def test_a_short_default_may_stand_in_the_query_by_chance(value) -> None:
    entry = with_answer(f"the {value} best", {"limit": value}, {"limit": value})
    assert copied(entry).gold.parameters == {"limit": value}


def test_a_default_that_the_query_does_not_repeat_stays() -> None:
    entry = with_answer("the item please", {"item": "AB12-77"}, {"item": "AB12-77"})
    assert copied(entry).gold.parameters == {"item": "AB12-77"}


def test_a_scrambled_address_is_still_one() -> None:
    made = scrambled("https://www.example7.org/p/12", Random(0))
    assert made.startswith("https://www.")
    assert made != "https://www.example7.org/p/12"
    assert [sign for sign in made if not sign.isalnum()] == list("://..//")
