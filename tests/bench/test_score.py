"""The three scorers, the published one with its quirks, and what is made of their marks."""

import json
import random
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from petool_lite.bench.score import canonical, compare_marks, mark_row, score_rows
from support_bench import row

from petool_lite.data.files import load_dataset
from petool_lite.scorer import published_call, score_reply

GOLD = {"tool_name": "<A>.<b>.<c>", "parameters": {"q": "x", "n": 2}}
GOOD = json.dumps(GOLD)
LINES = '{"tool_name": "<A>.<b>.<c>",\n"parameters": {"q": "x",\n "n": 2}}'


@pytest.mark.parametrize(
    ("reply", "marks"),
    [
        (GOOD, (True, True)),
        (f"Sure! {GOOD} Anything else?", (True, True)),
        ('{"tool_name": "<A>.<b>.<c>", "parameters": {"n": 2, "q": "x"}}', (True, True)),
        ('{"tool_name": "<A>.<b>.<c>", "parameters": {"q": "x", "n": "2"}}', (True, False)),
        ('{"tool_name": "<A>.<other>.<c>", "parameters": {"q": "x", "n": 2}}', (False, True)),
        ('{"tool_name": "<A>.<b>.<c>", "parameters": {}}', (True, False)),
        # quirks of the published scorer: right as JSON, wrong to it
        ('{"parameters": {"q": "x", "n": 2}, "tool_name": "<A>.<b>.<c>"}', (False, False)),
        (LINES, (False, False)),
        ("no call at all", (False, False)),
        ("", (False, False)),
        ('{"tool_name": "<A>.<b>.<c>", "parameters": {"q": "x"', (False, False)),
    ],
)
def test_one_reply(reply, marks) -> None:
    assert score_reply(reply, GOLD) == marks


@pytest.mark.parametrize(
    ("parameters", "marks"),
    [
        ({"a": {"b": 1}, "c": 2}, (True, True)),
        ({"c": 2, "a": {"b": 1}}, (False, False)),
        ({"a": "}}", "c": 2}, (False, False)),
        ({}, (True, True)),
    ],
)
def test_an_object_ends_at_the_first_two_braces(parameters, marks) -> None:
    call = {"tool_name": "t", "parameters": parameters}
    assert score_reply(json.dumps(call), call) == marks


def test_a_space_between_the_last_braces_is_no_match() -> None:
    assert score_reply(GOOD[:-1] + " }", GOLD) == (False, False)


def test_the_spanning_scorer_reads_over_line_ends() -> None:
    assert score_reply("{\n" + GOOD[1:], GOLD) == (False, False)
    assert score_reply("{\n" + GOOD[1:], GOLD, spanning=True) == (True, True)
    assert score_reply(LINES, GOLD, spanning=True) == (True, True)


PIECES = ["{", "}", "}}", '"tool_name": "t"', '"tool_name":"', ", ", '"parameters": {', '"parameters": {}', "\n", "x"]


@given(st.lists(st.sampled_from([*PIECES, '{"tool_name": "t", "parameters": {"a": 1}}']), max_size=14), st.booleans())
def test_the_quick_search_finds_what_the_published_expression_finds(pieces, spanning) -> None:
    """The expression as published, searched from everywhere, against the search from first braces of lines only."""
    reply = "".join(pieces)
    pattern = r'\{.*"tool_name":\s*".*?",\s*"parameters":\s*\{.*?\}\}'
    match = re.search(pattern, reply, re.DOTALL if spanning else 0)
    try:
        call = json.loads(match.group(0)) if match else None
    except ValueError:
        call = None
    call = call if isinstance(call, dict) and {"tool_name", "parameters"} <= set(call) else None
    assert published_call(reply, spanning) == call


def reply_row(reply: str, **more):
    facts = {"offered": ["<A>.<b>.<c>"], "same_job": ["<A>.<b>.<c>"], "declared": ["q", "n"], "defaults": {}}
    return {"status": "ok", "reply": reply, "gold": GOLD, "finish": "stop", "facts": facts, **more}


@pytest.mark.parametrize(
    ("reply", "strict"),
    [
        (GOOD, (True, True)),
        (f" {GOOD}\n", (True, True)),
        (LINES, (True, True)),
        ('{"parameters": {"n": 2, "q": "x"}, "tool_name": "<A>.<b>.<c>"}', (True, True)),
        (GOOD[:-1] + " }", (True, True)),
        (GOOD.replace("2", "2.0"), (True, True)),
        (GOOD.replace("2", "20e-1"), (True, True)),
        (GOOD.replace("2", '"2"'), (True, False)),
        (GOOD.replace("2", "true"), (True, False)),
        (GOOD.replace("<b>", "<d>"), (False, True)),
        (f"Sure! {GOOD}", (False, False)),
        (GOOD.replace('"q": "x"', '"q": "y", "q": "x"'), (False, False)),
        (GOOD[:-1] + ', "why": "so"}', (False, False)),
        (GOOD.replace("2", "NaN"), (False, False)),
        ("[" * 100_000, (False, False)),
        ('{"a":' * 100_000, (False, False)),
    ],
)
def test_the_strict_scorer_compares_as_json(reply, strict) -> None:
    assert mark_row(reply_row(reply)).strict == strict


def test_true_is_one_to_the_published_scorer_and_not_to_the_strict_one() -> None:
    gold = {"tool_name": "t", "parameters": {"on": 1}}
    mark = mark_row(reply_row('{"tool_name": "t", "parameters": {"on": true}}', gold=gold))
    assert (mark.published, mark.strict) == ((True, True), (True, False))


def test_a_reply_that_reached_its_limit_is_no_strict_call() -> None:
    assert mark_row(reply_row(GOOD, finish="length")).strict == (False, False)
    assert mark_row(reply_row(GOOD, finish="length")).published == (True, True)


def test_nested_values_and_braces_in_strings_are_right_to_the_strict_scorer_only() -> None:
    for parameters in ({"c": 2, "a": {"b": [1, {"d": None}]}}, {"a": "}}", "c": 2}):
        gold = {"tool_name": "t", "parameters": parameters}
        mark = mark_row(reply_row(json.dumps(gold), gold=gold))
        assert (mark.published, mark.strict) == ((False, False), (True, True))


def test_canonical_text_is_equal_for_equal_json_values_only() -> None:
    assert canonical({"b": 1.0, "a": [1e22, -0.0]}) == canonical({"a": [10**22, 0], "b": 1})
    texts = {canonical(value) for value in (1, True, "1", 1.5, None, [1], {"1": 1})}
    assert len(texts) == 7


def test_rows_are_counted_and_an_engine_failure_is_no_wrong_answer() -> None:
    rows = [
        reply_row(GOOD),
        reply_row(GOOD),
        reply_row(GOOD.replace("<b>", "<z>")),
        reply_row("cut", finish="length"),
        {"status": "engine_error", "gold": GOLD, "facts": {}},
    ]
    score = score_rows(rows)
    assert (score["n"], score["engine_errors"], score["no_call"], score["cut_off"]) == (4, 1, 1, 1)
    assert (score["tool_acc"], score["param_acc"], score["joint_acc"]) == (50.0, 75.0, 50.0)
    assert score["strict"]["joint_acc"] == 50.0
    assert score["joint_ci"][0] < 50 < score["joint_ci"][1]


def test_paired_tests_count_who_alone_is_right() -> None:
    other = GOOD.replace("<b>", "<z>")
    first = {index: mark_row(reply_row(GOOD if index < 3 else other)) for index in range(12)}
    second = {index: mark_row(reply_row(GOOD if index > 1 else other)) for index in range(13)}
    found = compare_marks(first, second)
    assert found["n"] == 12
    assert (found["tool"]["first_only"], found["tool"]["second_only"]) == (2, 9)
    assert found["tool"]["difference"] == pytest.approx(100 * 7 / 12, abs=1e-3)
    assert found["tool"]["p"] == pytest.approx(2 * (1 + 11 + 55) / 2**11)
    assert found["param"]["p"] == 1.0
    assert found["agreement"] == pytest.approx(100 / 12, abs=1e-3)


LOOP = "}}" + '{"tool_name": "a", "parameters": {' * 30  # a small model going in circles: costs the plain search 20 ms


def test_3000_rows_are_scored_within_seconds() -> None:
    entries = load_dataset("demo:test:100", "rating").entries
    rng = random.Random(0)
    rows = []
    for index in range(3000):
        entry = entries[index % 100]
        good = entry.gold.to_json()
        reply = rng.choice([good, f"Sure:\n{good}", good[:-5], good.replace("<", "{", 3), LOOP])
        rows.append(row(entry, index, reply))
    started = time.thread_time()  # not the clock: other processes run, too
    assert score_rows(rows)["n"] == 3000
    assert time.thread_time() - started < 5
