"""The three scorers, the published one with its quirks, and what is made of their right."""

import json
import random
import re
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from petool_lite.bench.score import (
    design_effect,
    error_class,
    mcnemar,
    paired,
    paired_interval,
    score_row,
    summary,
    wilson,
)

from petool_lite.scorer import as_asked, published_form, read_published, score_reply

GOLD = {"tool_name": "<A>.<b>.<c>", "parameters": {"q": "x", "n": 2}}
GOOD = json.dumps(GOLD)
LINES = '{"tool_name": "<A>.<b>.<c>",\n"parameters": {"q": "x",\n "n": 2}}'


def test_the_published_scorer_and_its_quirks() -> None:
    for reply, right in (
        (f"Sure! {GOOD} Anything else?", (True, True)),
        ('{"tool_name": "<A>.<b>.<c>", "parameters": {"n": 2, "q": "x"}}', (True, True)),
        ('{"tool_name": "<A>.<b>.<c>", "parameters": {"q": "x", "n": "2"}}', (True, False)),
        ('{"tool_name": "<A>.<other>.<c>", "parameters": {"q": "x", "n": 2}}', (False, True)),
        ("", (False, False)),
        ('{"tool_name": "<A>.<b>.<c>", "parameters": {"q": "x"', (False, False)),
        # right as JSON, wrong to it: another order, several lines, a space between the last braces
        ('{"parameters": {"q": "x", "n": 2}, "tool_name": "<A>.<b>.<c>"}', (False, False)),
        (LINES, (False, False)),
        ("{\n" + GOOD[1:], (False, False)),
        (GOOD[:-1] + " }", (False, False)),
    ):
        assert score_reply(reply, GOLD) == right, reply
    for reply in ("{\n" + GOOD[1:], LINES):
        assert score_reply(reply, GOLD, spanning=True) == (True, True), "the 3B result's scorer"
    for parameters, right in (  # an object ends at the first two braces
        ({"a": {"b": 1}, "c": 2}, True),
        ({"c": 2, "a": {"b": 1}}, False),
        ({"a": "}}", "c": 2}, False),
        ({}, True),
    ):
        call = {"tool_name": "t", "parameters": parameters}
        assert score_reply(json.dumps(call), call) == (right, right), parameters


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


def reply_row(reply: str, **more):
    facts = {"offered": ["<A>.<b>.<c>"], "same_job": ["<A>.<b>.<c>"], "history_length": 3}
    return {"status": "ok", "style": "petool", "reply": reply, "gold": GOLD, "finish": "stop", "facts": facts, **more}


def test_the_strict_scorer_compares_as_json() -> None:
    for reply, strict in (
        (f" {GOOD}\n", (True, True)),
        (LINES, (True, True)),
        ('{"parameters": {"n": 2, "q": "x"}, "tool_name": "<A>.<b>.<c>"}', (True, True)),
        (GOOD.replace("2", "20e-1"), (True, True)),
        (GOOD.replace("2", '"2"'), (True, False)),
        (GOOD.replace("2", "true"), (True, False)),
        (GOOD.replace("<b>", "<d>"), (False, True)),
        (f"Sure! {GOOD}", (False, False)),
        (GOOD.replace('"q": "x"', '"q": "y", "q": "x"'), (False, False)),
        (GOOD[:-1] + ', "why": "so"}', (False, False)),
        (GOOD.replace("2", "NaN"), (False, False)),
        ('{"a":' * 100_000, (False, False)),
    ):
        assert score_row(reply_row(reply)).pairs["strict"] == strict, reply[:99]
    at_its_limit = score_row(reply_row(GOOD, finish="length"))
    assert (at_its_limit.pairs["strict"], at_its_limit.pairs["published"]) == ((False, False), (True, True))


@pytest.mark.parametrize(
    ("gold", "reply", "published", "strict"),
    [
        ({"on": 1}, {"on": True}, (True, True), (True, False)),
        ({"c": 2, "a": {"b": [1, {"d": None}]}}, None, (False, False), (True, True)),
        ({"a": "}}", "c": 2}, None, (False, False), (True, True)),
    ],
)
def test_where_the_published_scorer_and_the_strict_one_differ(gold, reply, published, strict) -> None:
    said = json.dumps({"tool_name": "t", "parameters": reply or gold})
    score = score_row(reply_row(said, gold={"tool_name": "t", "parameters": gold}))
    assert (score.pairs["published"], score.pairs["strict"]) == (published, strict)


@pytest.mark.parametrize(
    ("found", "right", "request_text", "asked"),
    [
        (46.046, 46, "Ship 46.046 kg.", True),
        (46.6, 47, "Ship 46.6 kg.", True),
        (46.6, 46, "Ship 46.6 kg.", True),
        (46.5, 47, "Ship 46.5 kg.", True),
        (-33.87, -33, "Weather at -33.87, 151.2", True),
        (1234.5, 1234, "Pay $1,234.50 now", True),
        (46, 46, "", True),
        (46.046, 46, "Ship 46 kg.", False),
        (46.046, 46, "Ship 146.046 kg.", False),
        (48.046, 46, "Ship 48.046 kg.", False),
        ("46.046", 46, "Ship 46.046 kg.", False),
        (46.046, "46", "Ship 46.046 kg.", False),
        (1.5, True, "Take 1.5", False),
        (float("inf"), 46, "inf 46", False),
        ({"at": [2.5, "x"]}, {"at": [2, "x"]}, "At 2.5", True),
        ({"at": [2.5, "y"]}, {"at": [2, "x"]}, "At 2.5", False),
        ({"at": [2.5, "x"], "to": 1}, {"at": [2, "x"]}, "At 2.5", False),
    ],
)
def test_a_number_counts_as_asked_where_the_data_cut_it(found, right, request_text, asked) -> None:
    assert as_asked(found, right, request_text) is asked
    gold = {"tool_name": "<A>.<b>.<c>", "parameters": {"p": right}}
    reply = json.dumps({"tool_name": "<A>.<b>.<c>", "parameters": {"p": found}})
    pairs = score_row(reply_row(reply, gold=gold, query=request_text)).pairs
    if not isinstance(found, dict):  # the published expression does not read an object that ends the parameters
        assert (pairs["published"], pairs["as_asked"]) == ((True, found == right), (True, asked))


def test_rows_are_counted_and_an_engine_failure_is_no_wrong_answer() -> None:
    rows = [
        reply_row(GOOD),
        reply_row(GOOD),
        reply_row(GOOD.replace("<b>", "<z>")),
        reply_row("cut", finish="length"),
        {"status": "engine_error", "style": "petool", "gold": GOLD, "facts": {}},
    ]
    score = summary(rows, [score_row(item) for item in rows])
    assert (score["n"], score["engine_errors"], score["no_call"], score["cut_off"]) == (4, 1, 1, 1)
    assert (score["tool_acc"], score["param_acc"], score["joint_acc"]) == (50.0, 75.0, 50.0)
    assert score["strict"]["joint_acc"] == 50.0
    assert score["joint_ci"][0] < 50 < score["joint_ci"][1]


def test_paired_tests_count_who_alone_is_right() -> None:
    other = GOOD.replace("<b>", "<z>")
    first = {index: score_row(reply_row(GOOD if index < 3 else other)) for index in range(12)}
    second = {index: score_row(reply_row(GOOD if index > 1 else other)) for index in range(13)}
    found = paired(first, second)
    assert found["n"] == 12
    assert (found["tool"]["first_only"], found["tool"]["second_only"]) == (2, 9)
    assert found["tool"]["difference"] == pytest.approx(100 * 7 / 12, abs=1e-3)
    assert found["tool"]["p"] == pytest.approx(2 * (1 + 11 + 55) / 2**11)
    assert found["param"]["p"] == 1.0
    assert found["agreement"] == pytest.approx(100 / 12, abs=1e-3)


WEATHER = {"tool_name": "<W>.<Sun>.<forecast>", "parameters": {"city": "Oslo", "days": 3}}
OFFERED = ["<W>.<Sun>.<forecast>", "<W>.<Rain>.<forecast>", "<M>.<Tune>.<search>"]


def call(tool: str = "<W>.<Sun>.<forecast>", **parameters) -> str:
    given = {**WEATHER["parameters"], **parameters}
    return json.dumps({"tool_name": tool, "parameters": {key: value for key, value in given.items() if value}})


@pytest.mark.parametrize(
    ("reply", "more", "found"),
    [
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
    ],
)
def test_each_class_of_error(reply, more, found) -> None:
    facts = {"offered": OFFERED, "same_job": more.get("same_job", OFFERED[:2]), "history_length": 20}
    row = reply_row(reply, gold=WEATHER) | {"facts": facts} | more
    assert error_class(row, score_row(row)) == found


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


def test_entries_of_one_function_are_worth_less_than_as_many_of_several() -> None:
    values = [1, 1, 1, 0, 0, 0, 1, 1, 0, 0]
    assert design_effect(values, range(10)) == pytest.approx(1)
    # by hand: the sums of three functions around their mean are 1.5, -1.5 and 0; 4.5 / 2.5 * (3 / 2) / (10 / 9)
    assert design_effect(values, "aaabbbcccc") == pytest.approx(4.5 / 2.5 * 1.5 * 0.9)
    assert design_effect([1, 1], "ab") == design_effect([1, 0], "aa") == design_effect([], []) == 1.0
    rng = random.Random(3)  # against drawing whole functions many times
    groups = [group for group in range(60) for _ in range(rng.randint(1, 9))]
    chances = [rng.random() for _ in range(60)]
    flags = [rng.random() < chances[group] for group in groups]
    held = [[flag for flag, own in zip(flags, groups, strict=True) if own == group] for group in range(60)]
    means = sorted(
        sum(map(sum, drawn)) / sum(map(len, drawn)) for drawn in (rng.choices(held, k=60) for _ in range(4000))
    )
    effect = design_effect(flags, groups)
    low, high = wilson(sum(flags) / effect, len(flags) / effect)
    assert effect > 1.5
    assert (low, high) == pytest.approx((100 * means[100], 100 * means[3900]), abs=1.5)


def test_the_interval_is_wilsons() -> None:
    # 787 of 1,000: computed by hand from the formula
    assert wilson(787, 1000) == pytest.approx((76.06, 81.13), abs=0.02)
    assert wilson(0, 0) == (0.0, 100.0)
    assert wilson(10, 10)[1] == 100.0
    assert wilson(0, 10)[0] == 0.0


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (2, 9), (5, 5), (0, 11), (7, 6)])
def test_mcnemar_is_the_share_of_coin_throws_that_are_as_uneven(lost, won) -> None:
    n = lost + won
    uneven = sum(abs(2 * sum(throw) - n) >= abs(won - lost) for throw in product((0, 1), repeat=n))
    assert mcnemar(lost, won) == pytest.approx(uneven / 2**n)


def test_mcnemar_of_thousands_of_pairs_is_no_zero_by_underflow() -> None:
    assert mcnemar(1500, 1500) == 1.0
    assert 0 < mcnemar(1000, 1300) < 1e-9


def test_the_paired_interval_holds_its_difference_and_is_symmetric() -> None:
    low, high = paired_interval(20, 50, 500)
    assert low < 6.0 < high
    assert low > 0  # 20 against 50 is no chance: p < 0.001
    assert paired_interval(50, 20, 500) == pytest.approx((-high, -low))
    # by hand: centre 30/502, spread sqrt(71 - 900/502)/502
    assert (low, high) == pytest.approx((2.73, 9.22), abs=0.02)
    assert paired_interval(0, 0, 0) == (-100.0, 100.0)
