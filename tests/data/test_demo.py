"""The generated entries: fixed, in the published form, and not solvable without the history."""

import json
from collections import Counter

import pytest

from petool_lite.data.demo import PROVIDERS_PER_ENTRY, generate
from petool_lite.data.entries import parse_entry, provider
from petool_lite.prompt.render import Layout, chat_from_directory, prompt_ids


def test_the_same_seed_gives_the_same_entries() -> None:
    assert generate("train", 5) == generate("train", 5)
    assert generate("train", 5) != generate("train", 5, seed=1)


def test_no_tool_of_the_test_split_occurs_in_training() -> None:
    def apis(split: str) -> set[str]:
        entries = [parse_entry(row, "rating", split, i).prompt("rating") for i, row in enumerate(generate(split, 500))]
        names = [tool.name for prompt in entries for tool in prompt.tools]
        names += [item.call.tool_name for prompt in entries for item in prompt.history]
        return {name.split(">.<")[2] for name in names}

    assert apis("train").isdisjoint(apis("test"))


@pytest.mark.parametrize("setting", ["rating", "preferred", "chronological"])
def test_the_answer_follows_from_the_history(setting: str) -> None:
    for index, row in enumerate(generate("test", 50)):
        entry = parse_entry(row, setting, "demo", index)
        history = entry.prompt(setting).history
        told = {
            "rating": [item for item in history if item.rating == 1],
            "preferred": list(history),
            "chronological": [history[-1]],
        }[setting]
        assert {provider(item.call.tool_name) for item in told} == {provider(entry.gold.tool_name)}


def test_ignoring_the_ratings_scores_no_better_than_chance() -> None:
    rows = [parse_entry(row, "rating", "demo", index) for index, row in enumerate(generate("test", 1200))]

    def accuracy(choose) -> float:
        right = 0
        for entry in rows:
            prompt = entry.prompt("rating")
            function = entry.gold.tool_name.split(">.<")[2]
            equal = [tool.name for tool in prompt.tools if tool.name.split(">.<")[2] == function]
            right += choose(prompt, equal) == entry.gold.tool_name
        return right / len(rows)

    def most_offered(prompt, equal):
        counts = Counter(provider(tool.name) for tool in prompt.tools)
        return max(equal, key=lambda name: counts[provider(name)])

    def least_offered(prompt, equal):
        counts = Counter(provider(tool.name) for tool in prompt.tools)
        return min(equal, key=lambda name: counts[provider(name)])

    def seen_first(prompt, equal):
        order = [provider(item.call.tool_name) for item in prompt.history]
        return min(equal, key=lambda name: order.index(provider(name)))

    chance = 1 / PROVIDERS_PER_ENTRY
    for rule in (
        most_offered,
        least_offered,
        seen_first,
        lambda prompt, equal: equal[0],
        lambda prompt, equal: equal[-1],
    ):
        assert abs(accuracy(rule) - chance) < 0.05, rule


def test_published_prompts_have_300_to_500_tokens(smollm2) -> None:
    chat = chat_from_directory(smollm2.directory)
    layout = Layout("rating", "published", 8192)
    for split in ("train", "test"):
        for index, row in enumerate(generate(split, 100)):
            ids, _ = prompt_ids(chat, parse_entry(row, "rating", "demo", index), layout)
            assert 300 <= len(ids) <= 500


def test_field_names_are_the_published_ones() -> None:
    row = generate("test", 1)[0]
    published = {"query", "instruction_preferred", "instruction_ratings", "instruction_chronological"}
    published |= {"apis_candidate", "api_call_ground_truth", "func", "history_length", "entry_id"}
    assert set(row) == published
    tool = json.loads(row["apis_candidate"])[0]
    assert set(tool) == {"tool_name", "tool_description", "required_parameters", "optional_parameters"}
