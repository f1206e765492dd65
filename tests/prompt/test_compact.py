"""The compact layout: what stands in it and where."""

import json
import re
from dataclasses import replace

from petool_lite.prompt.compact import compact_prompt, compact_query, related_history, shortened

from petool_lite.data.demo import generate
from petool_lite.data.entries import parse_entry, provider


def made(**parameter):
    """A demo entry whose first candidate declares one more, optional parameter."""
    row = generate("test", 1)[0]
    tools = json.loads(row["apis_candidate"])
    declared = {"name": "page", "type": "NUMBER", "description": "", "default": "", **parameter}
    changed = [{**tools[0], "optional_parameters": [declared]}, *tools[1:]]
    text = row["instruction_ratings"].replace(json.dumps(tools), json.dumps(changed))
    return parse_entry({**row, "instruction_ratings": text}, "rating", "demo", 0).prompt("rating")


def in_full(prompt, query="page"):
    """What follows the query: the likeliest candidate with its whole declaration."""
    return after(prompt, query)[0]


def after(prompt, query="page"):
    """The two lines that follow the query: the likeliest candidate, and the values that the query states for it."""
    first, last = compact_query(prompt, query, "rating").split("\nLikely: ")
    assert first == query
    candidate, stated = last.split("\nStated: ")
    return candidate, json.loads(stated)


def tool_lines(prompt):
    """The candidates' lines, in the order of the prompt's candidates."""
    lines = compact_prompt(prompt, "rating").splitlines()
    return [next(line for line in lines if f"| {tool.name} |" in line) for tool in prompt.tools]


def test_each_candidate_has_one_line_with_the_verdict_before_its_name() -> None:
    prompt = made(description="first line\nsecond  line")
    lines = tool_lines(prompt)
    assert lines[0].endswith("; page?")
    for line, tool in zip(lines, prompt.tools, strict=True):
        ratings = [i.rating for i in prompt.history if provider(i.call.tool_name) == provider(tool.name)]
        assert line.startswith("liked +" if 1 in ratings else "disliked +")
        assert f"| {tool.name} |" in line


def test_after_the_query_stands_the_candidate_that_history_and_query_speak_for_in_full() -> None:
    for index, row in enumerate(generate("test", 20)):
        entry = parse_entry(row, "rating", "demo", index)
        last = in_full(entry.prompt("rating"), entry.query)
        assert last.startswith("liked +")
        assert f"| {entry.gold.tool_name} |" in last
        parameter = next(iter(entry.gold.parameters))
        assert re.search(rf"\| {parameter}! (STRING|NUMBER)$", last)
        numbers = {name: value for name, value in entry.gold.parameters.items() if isinstance(value, int)}
        assert (
            after(entry.prompt("rating"), entry.query)[1] == numbers
        )  # a plain word in a sentence is left to the model


def test_tools_for_the_same_job_stand_together_and_the_preferred_one_first() -> None:
    prompt = made()
    text = compact_prompt(prompt, "rating")
    sections = re.split(r"^job \d+$", text, flags=re.MULTILINE)[1:]
    assert sum(section.count(" | ") for section in sections) == 3 * len(prompt.tools)
    decided = [lines for section in sections if len(lines := section.strip().splitlines()) > 1]
    assert decided
    for lines in decided:
        assert lines[0].startswith("liked +")
        assert all(line.startswith("disliked +") for line in lines[1:])
        assert len({line.split(">.<")[2].split(">")[0] for line in lines}) == 1  # one api, several providers


def test_a_long_description_is_cut_in_sight_and_counted() -> None:
    prompt = made()
    first = replace(prompt.tools[0], description="word " * 100)
    long = replace(prompt, tools=(first, *prompt.tools[1:]))
    assert f"| {('word ' * 30).strip()}... |" in compact_prompt(long, "rating")
    assert (shortened(prompt), shortened(long)) == (0, 1)


def test_defaults_stand_in_their_declared_type() -> None:
    for kind, default, shown in (
        ("NUMBER", "1", "=1"),
        ("NUMBER", "2.5", "=2.5"),
        ("NUMBER", "one", '="one"'),
        ("BOOLEAN", "True", "=true"),
        ("STRING", "1", '="1"'),
        ("NUMBER", "", ""),
    ):
        prompt = made(type=kind, default=default, description="first\n second")
        alone = replace(prompt, tools=prompt.tools[:1])
        assert in_full(alone).endswith(f"page? {kind}{shown}: first second")


def test_history_of_other_providers_and_functions_is_left_out() -> None:
    prompt = made()
    other = generate("train", 50)
    strangers = [
        item
        for index, row in enumerate(other)
        for item in parse_entry(row, "rating", "demo", index).prompt("rating").history
        if provider(item.call.tool_name) not in {provider(tool.name) for tool in prompt.tools}
    ]
    mixed = prompt.with_history([*strangers[:5], *prompt.history, *strangers[5:9]])
    assert related_history(mixed) == prompt.history
    assert compact_prompt(mixed, "rating") == compact_prompt(prompt, "rating")
