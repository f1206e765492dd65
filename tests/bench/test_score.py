"""The scorers, the published one with its quirks, classes of error, and statistics of what is right."""

import json
import random
import re
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from petool_lite.bench.score import (
    calibration,
    calibration_error,
    design_effect,
    error_class,
    mcnemar,
    paired,
    paired_interval,
    score_row,
    summary,
    wilson,
)

from petool_lite.inference.constrain import heated
from petool_lite.scorer import as_asked, published_form, read_published, score_reply

GOLD = {"tool_name": "<A>.<b>.<c>", "parameters": {"q": "x", "n": 2}}
GOOD = json.dumps(GOLD)
LINES = '{"tool_name": "<A>.<b>.<c>",\n"parameters": {"q": "x",\n "n": 2}}'
BOTH, TOOL, PARAM, NEITHER = (True, True), (True, False), (False, True), (False, False)


def reply_row(reply: str, **more):
    facts = {"offered": ["<A>.<b>.<c>"], "same_job": ["<A>.<b>.<c>"], "history_length": 3}
    return {"status": "ok", "style": "petool", "reply": reply, "gold": GOLD, "finish": "stop", "facts": facts, **more}


def test_the_published_scorer_with_its_quirks_and_the_strict_one() -> None:
    for reply, published, strict in (
        (GOOD, BOTH, BOTH),
        (f"Sure! {GOOD} Anything else?", BOTH, NEITHER),
        (f" {GOOD}\n", BOTH, BOTH),
        ('{"tool_name": "<A>.<b>.<c>", "parameters": {"n": 2, "q": "x"}}', BOTH, BOTH),
        (GOOD.replace("2", '"2"'), TOOL, TOOL),
        (GOOD.replace("2", "20e-1"), BOTH, BOTH),
        (GOOD.replace("2", "true"), TOOL, TOOL),
        (GOOD.replace("<b>", "<other>"), PARAM, PARAM),
        (GOOD.replace('"q": "x"', '"q": "y", "q": "x"'), BOTH, NEITHER),
        (GOOD.replace("2", "NaN"), TOOL, NEITHER),
        ("", NEITHER, NEITHER),
        (GOOD[:-10], NEITHER, NEITHER),
        ('{"a":' * 100_000, NEITHER, NEITHER),
        # right as JSON, wrong to the published one: another order, several lines, a space between the last braces
        ('{"parameters": {"q": "x", "n": 2}, "tool_name": "<A>.<b>.<c>"}', NEITHER, BOTH),
        (LINES, NEITHER, BOTH),
        ("{\n" + GOOD[1:], NEITHER, BOTH),
        (GOOD[:-1] + " }", NEITHER, BOTH),
        (GOOD[:-1] + ', "why": "so"}', NEITHER, NEITHER),
    ):
        assert score_reply(reply, GOLD) == published, reply[:99]
        assert score_row(reply_row(reply)).pairs["strict"] == strict, reply[:99]
    for reply in ("{\n" + GOOD[1:], LINES):
        assert score_reply(reply, GOLD, spanning=True) == BOTH, "the 3B result's scorer"
    for parameters, said, published, strict in (  # an object ends at the first two braces; 1 is true
        ({"a": {"b": 1}, "c": 2}, None, BOTH, BOTH),
        ({"c": 2, "a": {"b": 1}}, None, NEITHER, BOTH),
        ({"a": "}}", "c": 2}, None, NEITHER, BOTH),
        ({}, None, BOTH, BOTH),
        ({"on": 1}, {"on": True}, BOTH, TOOL),
    ):
        gold = {"tool_name": "t", "parameters": parameters}
        score = score_row(reply_row(json.dumps(gold | {"parameters": said or parameters}), gold=gold))
        assert (score.pairs["published"], score.pairs["strict"]) == (published, strict), parameters
    at_its_limit = score_row(reply_row(GOOD, finish="length"))
    assert (at_its_limit.pairs["strict"], at_its_limit.pairs["published"]) == (NEITHER, BOTH)


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
    assert read_published(reply, spanning) == call


def test_a_number_counts_as_asked_where_the_data_cut_it() -> None:
    for found, right, request, asked in (
        (46.046, 46, "Ship 46.046 kg.", True),
        (46.6, 46, "Ship 46.6 kg.", True),
        (46.5, 47, "Ship 46.5 kg.", True),
        (-33.87, -33, "Weather at -33.87, 151.2", True),
        (1234.5, 1234, "Pay $1,234.50 now", True),
        (46, 46, "", True),
        (46.046, 46, "Ship 46 kg.", False),
        (46.046, 46, "Ship 146.046 kg.", False),
        ("46.046", 46, "Ship 46.046 kg.", False),
        (1.5, True, "Take 1.5", False),
        (float("inf"), 46, "inf 46", False),
        ({"at": [2.5, "x"]}, {"at": [2, "x"]}, "At 2.5", True),
        ({"at": [2.5, "x"], "to": 1}, {"at": [2, "x"]}, "At 2.5", False),
    ):
        assert as_asked(found, right, request) is asked, found
        gold = {"tool_name": "<A>.<b>.<c>", "parameters": {"p": right}}
        reply = json.dumps({"tool_name": "<A>.<b>.<c>", "parameters": {"p": found}})
        pairs = score_row(reply_row(reply, gold=gold, query=request)).pairs
        if not isinstance(found, dict):  # the published expression does not read an object that ends the parameters
            assert (pairs["published"], pairs["as_asked"]) == ((True, found == right), (True, asked))


HERMES = '<tool_call>\n{"name": "<A>.<b>.<c>", "arguments": {"q": "x", "n": 2}}\n</tool_call>'


def test_a_petool_reply_is_read_by_the_published_scorer_in_its_own_form() -> None:
    for reply, published, strict in (
        (HERMES, True, True),
        (f"Sure!\n{HERMES}", True, False),
        (HERMES.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>"), True, True),
        (HERMES.replace("<b>", "<d>"), False, False),
        (HERMES.replace("}}", "}"), False, False),
        ("No tool fits.", False, False),
        (GOOD, True, True),
    ):
        score = score_row(reply_row(reply))
        assert (score.right("joint"), score.right("joint", "strict")) == (published, strict), reply
    assert read_published(published_form(HERMES)) == GOLD
    for reply in ("No tool fits.", "I cannot do that.", HERMES, HERMES[:-20]):
        score = score_row(reply_row(reply, gold={"no_call": "No tool fits."}))
        right = "<tool_call>" not in reply
        assert set(score.pairs.values()) == {(right, right)}, reply


WEATHER = {"tool_name": "<W>.<Sun>.<forecast>", "parameters": {"city": "Oslo", "days": 3}}
OFFERED = ["<W>.<Sun>.<forecast>", "<W>.<Rain>.<forecast>", "<M>.<Tune>.<search>"]


def call(tool: str = "<W>.<Sun>.<forecast>", **parameters) -> str:
    given = {**WEATHER["parameters"], **parameters}
    return json.dumps({"tool_name": tool, "parameters": {key: value for key, value in given.items() if value}})


def test_each_class_of_error() -> None:
    for reply, more, found in (
        (call(), {}, "right"),
        (f"Here you are: {call()}", {"finish": "length"}, "right"),
        (call().replace("}}", "}\n}"), {"style": "published"}, "other_form"),
        (call("<W>.<Rain>.<forecast>"), {}, "wrong_provider"),
        (call("<M>.<Tune>.<search>"), {}, "wrong_function"),
        (call("<M>.<Tune>.<search>"), {"same_job": []}, "wrong_tool"),
        (call("<W>.<Snow>.<forecast>"), {}, "invented_tool"),
        (call(city=None, lang="en"), {}, "missing_parameter"),
        (call(lang="en"), {}, "extra_parameter"),
        (call(city="Bergen"), {}, "wrong_parameter"),
        ("I would call the forecast.", {}, "no_call"),
        (call()[:-9], {"finish": "length"}, "cut_off"),
        (call(), {"gold": {"no_call": "No tool fits."}}, "needless_call"),
        ("", {"status": "too_long"}, "too_long"),
        ("", {"status": "engine_error"}, "engine_error"),
    ):
        facts = {"offered": OFFERED, "same_job": more.get("same_job", OFFERED[:2]), "history_length": 20}
        row = reply_row(reply, gold=WEATHER) | {"facts": facts} | more
        assert error_class(row, score_row(row)) == found


def test_rows_are_counted_and_an_engine_failure_is_no_wrong_answer() -> None:
    replies = [GOOD, GOOD, GOOD.replace("<b>", "<z>"), "cut"]
    rows = [reply_row(reply, finish="length" if reply == "cut" else "stop") for reply in replies]
    rows.append({"status": "engine_error", "style": "petool", "gold": GOLD, "facts": {}})
    score = summary(rows, [score_row(item) for item in rows])
    assert (score["n"], score["engine_errors"], score["no_call"], score["cut_off"]) == (4, 1, 1, 1)
    assert (score["tool_acc"], score["param_acc"], score["joint_acc"]) == (50.0, 75.0, 50.0)
    assert (score["strict"]["joint_acc"], score["calibration"]) == (50.0, None)
    assert score["joint_ci"][0] < 50 < score["joint_ci"][1]


def test_paired_tests_count_who_alone_is_right() -> None:
    other = GOOD.replace("<b>", "<z>")
    first = {index: score_row(reply_row(GOOD if index < 3 else other)) for index in range(12)}
    second = {index: score_row(reply_row(GOOD if index > 1 else other)) for index in range(13)}
    found = paired(first, second)
    assert (found["n"], found["tool"]["first_only"], found["tool"]["second_only"]) == (12, 2, 9)
    assert found["tool"]["difference"] == pytest.approx(100 * 7 / 12, abs=1e-3)
    assert found["tool"]["p"] == pytest.approx(2 * (1 + 11 + 55) / 2**11)
    assert found["param"]["p"] == 1.0
    assert found["agreement"] == pytest.approx(100 / 12, abs=1e-3)


def test_entries_of_one_function_are_worth_less_than_as_many_of_several() -> None:
    values = [1, 1, 1, 0, 0, 0, 1, 1, 0, 0]
    assert design_effect(values, range(10)) == pytest.approx(1)
    # by hand: the sums of three functions around their mean are 1.5, -1.5 and 0; 4.5 / 2.5 * (3 / 2) / (10 / 9)
    assert design_effect(values, "aaabbbcccc") == pytest.approx(4.5 / 2.5 * 1.5 * 0.9)
    assert design_effect([1, 1], "ab") == design_effect([1, 0], "aa") == design_effect([], []) == 1.0


def test_the_intervals_are_wilsons_and_agresti_and_mins() -> None:
    # 787 of 1,000: computed by hand from the formula
    assert wilson(787, 1000) == pytest.approx((76.06, 81.13), abs=0.02)
    assert (wilson(0, 0), wilson(10, 10)[1], wilson(0, 10)[0]) == ((0.0, 100.0), 100.0, 0.0)
    low, high = paired_interval(20, 50, 500)
    assert 0 < low < 6.0 < high, "20 against 50 is no chance: p < 0.001"
    assert paired_interval(50, 20, 500) == pytest.approx((-high, -low))
    # by hand: centre 30/502, spread sqrt(71 - 900/502)/502
    assert (low, high) == pytest.approx((2.73, 9.22), abs=0.02)
    assert paired_interval(0, 0, 0) == (-100.0, 100.0)


def test_mcnemar_is_the_share_of_coin_throws_that_are_as_uneven() -> None:
    for lost, won in ((0, 0), (1, 0), (2, 9), (5, 5), (0, 11), (7, 6)):
        n = lost + won
        uneven = sum(abs(2 * sum(throw) - n) >= abs(won - lost) for throw in product((0, 1), repeat=n))
        assert mcnemar(lost, won) == pytest.approx(uneven / 2**n)
    assert mcnemar(1500, 1500) == 1.0
    assert 0 < mcnemar(1000, 1300) < 1e-9, "no zero by underflow"


def test_the_calibration_error_and_the_temperature_that_mends_it() -> None:
    # by hand: bins of 0.9 (two right of four) and 0.2 (one of one)
    pairs = [(0.9, True), (0.9, True), (0.95, False), (0.95, False), (0.2, True)]
    assert calibration_error(pairs) == pytest.approx((4 * abs(0.925 - 0.5) + 0.8) / 5, abs=1e-4)
    assert calibration_error([(1.0, True), (0.0, False)]) == calibration_error([]) == 0.0
    assert heated(0.9, 1.0) == pytest.approx(0.9)
    assert heated(0.9, 2.0) == pytest.approx(0.75)  # odds of 9 to 1 become 3 to 1
    rng, scores = random.Random(5), []
    for index in range(4000):  # a model whose log-odds are twice as large as they should be
        true = rng.uniform(0.3, 0.99)
        reply = GOOD if rng.random() < true else GOOD.replace("<b>", "<z>")
        facts = {"offered": [], "same_job": [], "history_length": 0, "function": str(index % 200)}
        scores.append(score_row(reply_row(reply, facts=facts, confidence=heated(true, 0.5))))
    found = calibration(scores)
    assert (found["n"], found["temperature"]) == (4000, pytest.approx(2, rel=0.15))
    assert found["ece"] > 0.1 > 0.04 > found["ece_fitted"]
    assert calibration([*scores, score_row(reply_row(GOOD))]) is None, "one without a probability"
