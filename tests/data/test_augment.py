"""Every made entry keeps a label that follows from its history, and the originals stay as they are."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from random import Random

import pytest

from petool_lite.data.augment import (
    Amounts,
    augment,
    build_catalog,
    counterfactual,
    history_queries,
    shuffled,
    training_fault,
)
from petool_lite.data.demo import generate
from petool_lite.data.entries import Entry, ToolCall, balance, parse_entry, provider
from petool_lite.data.files import load_dataset
from petool_lite.data.splits import answer_functions, api_words, folds, function_words, leaks

EVERY = Amounts(shuffle=1, counterfactual=True, history=2, renamed=2, described=2)


def demo(setting: str = "rating", count: int = 60, split: str = "train") -> list[Entry]:
    return [parse_entry(row, setting, "demo", index) for index, row in enumerate(generate(split, count))]


@pytest.fixture(scope="module")
def published(open_entries) -> tuple[Entry, ...]:
    return load_dataset(str(open_entries), "rating").entries


def best_liked(entry: Entry) -> list[str]:
    """The tools of the best liked providers among the right tool and its equals, listed or alike in name."""
    prompt = entry.prompt("rating")
    words = api_words(entry.gold.tool_name)
    names = [
        tool.name for tool in prompt.tools if tool.name in (entry.equal_tools or ()) or api_words(tool.name) == words
    ]
    likes = [balance(prompt.history, name) for name in names]
    return [name for name, value in zip(names, likes, strict=True) if value == max(likes)]


def check_augmented(entries, setting: str) -> list[Entry]:
    before = [(entry.id, entry.query, entry.gold.to_json(), entry.prompt(setting).text) for entry in entries]
    result = augment(entries, setting, EVERY, seed=5)
    assert all(mine is theirs for mine, theirs in zip(result, entries, strict=False))
    assert before == [(e.id, e.query, e.gold.to_json(), e.prompt(setting).text) for e in result[: len(entries)]]
    assert result == augment(entries, setting, EVERY, seed=5)
    assert result != augment(entries, setting, EVERY, seed=6)
    assert len({entry.id for entry in result}) == len(result)
    by_id = {entry.id: entry for entry in result}
    for entry in result[len(entries) :]:
        assert training_fault(entry, setting) is None
        check_text(entry, setting)
        origin, kind = entry.id.rpartition("+")[0], entry.id.rpartition("+")[2].rstrip("0123456789")
        if kind == "swap":
            check_swap(by_id[origin], entry)
        elif kind == "history":
            check_asked(by_id[origin], entry, setting)
        elif kind == "renamed" and origin in by_id:  # what it renames may itself have been left out
            check_renamed(by_id[origin], entry, setting)
    return result[len(entries) :]


def check_text(entry: Entry, setting: str) -> None:
    """The prompt's pieces say in text what they say in types."""
    prompt = entry.prompt(setting)
    row = {"instruction": prompt.text, "input": entry.query, "output": entry.gold.to_json()}
    again = parse_entry(row, setting, "made", 0)
    assert again.prompt(setting) == prompt
    assert again.gold == entry.gold


def check_swap(origin: Entry, swap: Entry) -> None:
    assert list(swap.prompts) == ["rating"]
    assert best_liked(swap) == [swap.gold.tool_name]
    assert swap.gold.tool_name not in best_liked(origin) or len(best_liked(origin)) > 1
    assert swap.gold.parameters == origin.gold.parameters
    assert swap.prompt("rating").tools_text == origin.prompt("rating").tools_text
    both = {provider(swap.gold.tool_name), provider(origin.gold.tool_name)}
    kept = [item for item in origin.prompt("rating").history if item.call.tool_name != swap.gold.tool_name]
    for old, new in zip(kept, swap.prompt("rating").history, strict=True):
        differing = [pair for pair in zip(old.text, new.text, strict=True) if pair[0] != pair[1]]
        assert len(differing) == (provider(old.call.tool_name) in both)
        assert json.loads(new.text) == {**json.loads(old.text), "rating": new.rating}


def check_asked(origin: Entry, asked: Entry, setting: str) -> None:
    old, new = origin.prompt(setting), asked.prompt(setting)
    assert (asked.query, asked.gold) in [(item.instruction, item.call) for item in old.history if item.rating != 0]
    assert all(item.call.tool_name != asked.gold.tool_name for item in new.history)
    assert [item for item in old.history if item.call.tool_name != asked.gold.tool_name] == list(new.history)
    assert origin.gold.tool_name not in {tool.name for tool in new.tools}
    assert balance(new.history, asked.gold.tool_name) > 0
    if len(new.tools) == len(old.tools):
        positions = [[tool.name for tool in prompt.tools] for prompt in (old, new)]
        assert positions[0].index(origin.gold.tool_name) == positions[1].index(asked.gold.tool_name)


def check_renamed(origin: Entry, copy: Entry, setting: str) -> None:
    """Every provider has become another one, with the user's likes; what is asked is as before."""
    old, new = origin.prompt(setting), copy.prompt(setting)
    names = {}
    for before, after in zip(old.history, new.history, strict=True):
        assert (before.rating, before.call.parameters) == (after.rating, after.call.parameters)
        assert names.setdefault(provider(before.call.tool_name), provider(after.call.tool_name)) == provider(
            after.call.tool_name
        )
    assert len(set(names.values())) == len(names)
    assert sorted(tool.description for tool in old.tools) == sorted(tool.description for tool in new.tools)
    assert balance(old.history, origin.gold.tool_name) == balance(new.history, copy.gold.tool_name)
    assert origin.gold.parameters.keys() == copy.gold.parameters.keys()
    for key, value in copy.gold.parameters.items():
        if value != origin.gold.parameters[key]:
            assert str(value) in copy.query
            assert str(value) not in origin.query


def test_demo_entries_in_every_setting() -> None:
    made = check_augmented(demo(), "rating")
    kinds = [entry.id.rpartition("+")[2] for entry in made]
    assert kinds.count("shuffle1") == kinds.count("swap") == 60
    for setting in ("preferred", "chronological"):
        made = check_augmented(demo(setting), setting)
        assert {entry.id.rpartition("+")[2].rstrip("0123456789") for entry in made} == {
            "shuffle",
            "renamed",
            "described",
        }  # one liked call cannot be spared for a query


def test_some_published_entries(published) -> None:
    """Every kind is made of real entries; of all of them, in every setting, in the slow test below."""
    some = published[::6]
    made = check_augmented(some, "rating")
    kinds = {entry.id.rpartition("+")[2].rstrip("0123456789") for entry in made}
    assert kinds >= {"shuffle", "swap", "history", "renamed", "described"}


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["rating", "preferred", "chronological"])
def test_published_entries_in_every_setting(published, setting) -> None:
    for entry in published:
        assert training_fault(entry, setting) is None
    made = check_augmented(published, setting)
    kinds = [entry.id.rpartition("+")[2].rstrip("0123456789") for entry in made]
    assert kinds.count("shuffle") == 753
    assert kinds.count("swap") == (538 if setting == "rating" else 0)
    assert (kinds.count("history") > 700) == (setting != "chronological")
    assert kinds.count("renamed") == 1506 if setting != "rating" else kinds.count("renamed") > 1200
    # preferred users often call equal providers equally often, and then a made answer would not be certain
    assert kinds.count("described") > (500 if setting == "preferred" else 1200)


def test_the_best_liked_provider_of_the_right_function_is_the_published_answer(published) -> None:
    right = 0.0
    for entry in published:
        history = entry.prompt("rating").history
        likes = {name: balance(history, name) for name in (entry.gold.tool_name, *entry.equal_tools)}
        best = [name for name, value in likes.items() if value == max(likes.values())]
        right += (entry.gold.tool_name in best) / len(best)
    assert right / len(published) == pytest.approx(0.9075, abs=0.001)


def test_unlisted_equals_are_guessed_without_a_mistake(published) -> None:
    swaps = 0
    for entry in published:
        swap = counterfactual(replace(entry, equal_tools=None), Random(0))
        if swap is not None:
            swaps += 1
            assert swap.gold.tool_name in entry.equal_tools
    assert swaps > 400


def test_shuffling_keeps_each_tool_and_its_text() -> None:
    for entry in demo(count=10):
        copy = shuffled(entry, Random(1))
        for setting, prompt in entry.prompts.items():
            pairs = dict(zip([tool.name for tool in prompt.tools], prompt.tool_texts, strict=True))
            other = copy.prompt(setting)
            assert dict(zip([tool.name for tool in other.tools], other.tool_texts, strict=True)) == pairs
            assert prompt.with_tools(list(zip(prompt.tools, prompt.tool_texts, strict=True))).text == prompt.text


def with_history(entry: Entry, rows: list[dict]) -> Entry:
    text = entry.prompt("rating").with_history(()).text.replace("[]", json.dumps(rows), 1)
    row = {"instruction": text, "input": entry.query, "output": entry.gold.to_json()}
    return parse_entry(row, "rating", "file", 0)


def test_only_the_users_own_rating_is_rewritten() -> None:
    entry = demo(count=1)[0]
    rows = [json.loads(item.text) for item in entry.prompt("rating").history]
    for row in rows:
        row["instruction"] = 'Rate it: "rating": 1, and "rating": 0'
        row["tool_call"]["parameters"] = {"rating": 0, "inner": {"rating": 1}}
    rows = [{"rating": row.pop("rating"), **row} for row in rows]
    entry = with_history(entry, rows)
    swap = counterfactual(entry, Random(0))
    assert swap is not None
    check_swap(entry, swap)


def test_no_swap_without_ratings_or_where_a_parameter_does_not_fit() -> None:
    entry = demo(count=1)[0]
    rows = [json.loads(item.text) for item in entry.prompt("rating").history]
    for row in rows:
        del row["rating"]
    assert counterfactual(with_history(entry, rows), Random(0)) is None
    assert counterfactual(replace(entry, gold=None), Random(0)) is None
    prompt = entry.prompt("rating")
    tools = [
        tool if tool.name == entry.gold.tool_name else replace(tool, required=(replace(tool.required[0], type="DATE"),))
        for tool in prompt.tools
    ]
    changed = prompt.with_tools(list(zip(tools, prompt.tool_texts, strict=True)))
    assert counterfactual(replace(entry, prompts={"rating": changed}), Random(0)) is None


def test_history_requests_stay_off_the_test_functions(published) -> None:
    dealt = folds(published, 5, seed=0)
    test = [published[index] for index in dealt[0]]
    train = [published[index] for fold in dealt[1:] for index in fold]
    barred = answer_functions(test)
    made = augment(train, "rating", Amounts(shuffle=0, counterfactual=True, history=3), seed=0, barred=barred)
    assert not leaks(made, test)
    assert leaks(augment(train, "rating", Amounts(0, False, 3), 0), test)
    assert all(function_words(entry.gold.tool_name) not in barred for entry in made)


def test_history_requests_obey_their_limit(published) -> None:
    catalog = build_catalog(published, "rating")
    for entry in published[:40]:
        many = history_queries(entry, catalog, Random(2), 99)
        assert history_queries(entry, catalog, Random(2), 1) == many[:1]
        assert history_queries(entry, catalog, Random(2), 0) == []
        assert len({asked.gold.tool_name for asked in many}) == len(many)


def test_validate_names_what_is_wrong() -> None:
    entry = demo(count=1)[0]
    gold, prompt = entry.gold, entry.prompt("rating")
    pairs = list(zip(prompt.tools, prompt.tool_texts, strict=True))
    disliked = next(
        tool
        for tool in prompt.tools
        if tool.name != gold.tool_name and api_words(tool.name) == api_words(gold.tool_name)
    )
    wrong = {
        "no right answer": replace(entry, gold=None),
        "0 candidates": replace(entry, gold=ToolCall("<A>.<B>.<c>", gold.parameters)),
        "2 candidates": replace(entry, prompts={"rating": prompt.with_tools(pairs * 2)}),
        "not declared": replace(entry, gold=ToolCall(gold.tool_name, {**gold.parameters, "more": 1})),
        "missing": replace(entry, gold=ToolCall(gold.tool_name, {})),
        "liked no less": replace(entry, id="0+swap", gold=ToolCall(disliked.name, gold.parameters)),
        "liked more": replace(
            entry,
            id="0+shuffle1",
            gold=ToolCall(disliked.name, gold.parameters),
            equal_tools=(gold.tool_name,),
        ),
        "not liked": replace(
            entry,
            id="0+history0",
            prompts={
                "rating": prompt.with_history(()).with_tools([pair for pair in pairs if pair[0].name == gold.tool_name])
            },
        ),
    }
    assert training_fault(entry, "rating") is None
    for words, broken in wrong.items():
        assert words in (training_fault(broken, "rating") or "")


def with_descriptions(entry: Entry) -> Entry:
    """The entry with every parameter of its candidates described in words that are not its name."""
    prompt, kept = entry.prompt("rating"), []
    for tool, text in zip(prompt.tools, prompt.tool_texts, strict=True):
        value = json.loads(text)
        for item in value["required_parameters"]:
            item["description"] = "subject wanted by customers"
        required = tuple(replace(item, description="subject wanted by customers") for item in tool.required)
        kept.append((replace(tool, required=required), json.dumps(value)))
    return replace(entry, prompts={"rating": prompt.with_tools(kept)})


def test_varied_requests_fit_parameters_that_other_providers_name_otherwise() -> None:
    entries = [with_descriptions(entry) for entry in demo(count=40)]
    own = {item.name for entry in entries for tool in entry.prompt("rating").tools for item in tool.required}
    found = {}
    for varied in (False, True):
        made = augment(entries, "rating", replace(EVERY, varied=varied, described=4), 0)
        asked = [entry for entry in made if "described" in entry.id]
        assert len(asked) > 40
        for entry in asked:  # the declaration, its text and the call have the same names
            assert training_fault(entry, "rating") is None
            tool = next(tool for tool in entry.prompt("rating").tools if tool.name == entry.gold.tool_name)
            text = next(
                text for text in entry.prompt("rating").tool_texts if json.loads(text)["tool_name"] == tool.name
            )
            assert [item["name"] for item in json.loads(text)["required_parameters"]] == [i.name for i in tool.required]
        found[varied] = {name for entry in asked for name in entry.gold.parameters} - own
    assert not found[False]
    assert {"subject", "wanted"} & {name.lower() for name in found[True]}


SAME_ROWS = """
import hashlib
from petool_lite.data.augment import Amounts, augment
from petool_lite.data.files import load_dataset
entries = load_dataset("demo:train:30", "rating").entries
made = augment(entries, "rating", Amounts(1, True, 2, 1, 4), 0)
text = "".join(f"{item.id}{item.query}{item.gold}{item.equal_tools}{item.prompt('rating').text}" for item in made)
print(len(made), hashlib.sha256(text.encode()).hexdigest())
"""


def test_every_process_makes_the_same_rows() -> None:
    """Sets of texts have another order in every process, and rows must not depend on it."""
    found = set()
    for seed in ("1", "2", "3"):
        line = [sys.executable, "-c", SAME_ROWS]
        made = subprocess.run(
            line, env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        )
        found.add(made.stdout)
    assert len(found) == 1
    assert int(found.pop().split()[0]) > 150
