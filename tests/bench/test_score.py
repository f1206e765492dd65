"""The published scorer with its quirks, and the interval."""

import json

import pytest
from petool_lite.bench.score import score_rows
from petool_lite.bench.stats import wilson

from petool_lite.scorer import score_reply

GOLD = {"tool_name": "<A>.<b>.<c>", "parameters": {"q": "x", "n": 2}}
GOOD = json.dumps(GOLD)


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
        ('{"tool_name": "<A>.<b>.<c>",\n"parameters": {"q": "x",\n "n": 2}}', (False, False)),
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


def test_rows_are_counted_and_an_engine_failure_is_no_wrong_answer() -> None:
    def row(reply: str, **more):
        return {"status": "ok", "reply": reply, "gold": GOLD, "finish": "stop", **more}

    wrong_tool = '{"tool_name": "z", "parameters": {"q": "x", "n": 2}}'
    rows = [
        row(GOOD),
        row(GOOD),
        row(wrong_tool),
        row("cut", finish="length"),
        {"status": "engine_error", "gold": GOLD},
    ]
    score = score_rows(rows)
    assert (score.n, score.engine_errors, score.no_call, score.cut_off) == (4, 1, 1, 1)
    assert (score.tool_acc, score.param_acc, score.joint_acc) == (50.0, 75.0, 50.0)


def test_the_interval_is_wilsons() -> None:
    # 787 of 1,000: computed by hand from the formula
    assert wilson(787, 1000) == pytest.approx((76.06, 81.13), abs=0.02)
    assert wilson(0, 0) == (0.0, 100.0)
    assert wilson(10, 10)[1] == 100.0
    assert wilson(0, 10)[0] == 0.0
