"""The scorers, the published one with its quirks, classes of error, and statistics of what is right."""

import gzip
import json
import random
import re
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support_bench import answer, row, write_results

from petool_lite.bench import score as stats
from petool_lite.bench.bfcl import arguments_accepted
from petool_lite.bench.engines import Task
from petool_lite.bench.report import write_report
from petool_lite.bench.run import entry_row
from petool_lite.bench.score import calibration, error_class, score_row
from petool_lite.data.entries import NO_TOOL, Call
from petool_lite.data.fields import Fault
from petool_lite.data.files import load_dataset
from petool_lite.data.openai import entry_line, parse
from petool_lite.inference.constrain import heated
from petool_lite.scorer import as_asked, published_form, read_published, score_reply

GOLD = {"tool_name": "<A>.<b>.<c>", "parameters": {"q": "x", "n": 2}}
GOOD = json.dumps(GOLD)
LINES = '{"tool_name": "<A>.<b>.<c>",\n"parameters": {"q": "x",\n "n": 2}}'
BOTH, TOOL, PARAM, NEITHER = (True, True), (True, False), (False, True), (False, False)
PIECES = ["{", "}", "}}", '"tool_name": "t"', '"tool_name":"', ", ", '"parameters": {', '"parameters": {}', "\n", "x"]
HERMES = '<tool_call>\n{"name": "<A>.<b>.<c>", "arguments": {"q": "x", "n": 2}}\n</tool_call>'
WEATHER = {"tool_name": "<W>.<Sun>.<forecast>", "parameters": {"city": "Oslo", "days": 3}}
OFFERED = ["<W>.<Sun>.<forecast>", "<W>.<Rain>.<forecast>", "<M>.<Tune>.<search>"]
TEXT, NUMBERS = {"type": "string"}, {"type": "array", "items": {"type": "number"}}
AREA = {"base": {"type": "integer"}, "unit": {"type": "string"}}
AREA_TOOL = {"name": "math.area", "parameters": {"type": "object", "properties": AREA, "required": ["base"]}}


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


def test_entries_of_one_function_are_worth_less_than_as_many_of_several() -> None:
    values = [1, 1, 1, 0, 0, 0, 1, 1, 0, 0]
    assert stats.design_effect(values, range(10)) == pytest.approx(1)
    # by hand: the sums of three functions around their mean are 1.5, -1.5 and 0; 4.5 / 2.5 * (3 / 2) / (10 / 9)
    assert stats.design_effect(values, "aaabbbcccc") == pytest.approx(4.5 / 2.5 * 1.5 * 0.9)
    assert stats.design_effect([1, 1], "ab") == stats.design_effect([1, 0], "aa") == stats.design_effect([], []) == 1.0


def test_the_intervals_are_wilsons_and_agresti_and_mins() -> None:
    # 787 of 1,000: computed by hand from the formula
    assert stats.wilson(787, 1000) == pytest.approx((76.06, 81.13), abs=0.02)
    assert stats.wilson(0, 0) == (stats.wilson(0, 10)[0], stats.wilson(10, 10)[1]) == (0.0, 100.0)
    low, high = stats.paired_interval(20, 50, 500)
    assert 0 < low < 6.0 < high, "20 against 50 is no chance: p < 0.001"
    assert stats.paired_interval(50, 20, 500) == pytest.approx((-high, -low))
    # by hand: centre 30/502, spread sqrt(71 - 900/502)/502
    assert (low, high) == pytest.approx((2.73, 9.22), abs=0.02)
    assert stats.paired_interval(0, 0, 0) == (-100.0, 100.0)


def test_mcnemar_is_the_share_of_coin_throws_that_are_as_uneven() -> None:
    for lost, won in ((0, 0), (1, 0), (2, 9), (5, 5), (0, 11), (7, 6)):
        n = lost + won
        uneven = sum(abs(2 * sum(throw) - n) >= abs(won - lost) for throw in product((0, 1), repeat=n))
        assert stats.mcnemar(lost, won) == pytest.approx(uneven / 2**n)
    assert stats.mcnemar(1500, 1500) == 1.0
    assert 0 < stats.mcnemar(1000, 1300) < 1e-9, "no zero by underflow"


def test_the_calibration_error_and_the_temperature_that_mends_it() -> None:
    # by hand: bins of 0.9 (two right of four) and 0.2 (one of one)
    pairs = [(0.9, True), (0.9, True), (0.95, False), (0.95, False), (0.2, True)]
    assert stats.calibration_error(pairs) == pytest.approx((4 * abs(0.925 - 0.5) + 0.8) / 5, abs=1e-4)
    assert stats.calibration_error([(1.0, True), (0.0, False)]) == stats.calibration_error([]) == 0.0
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


CORPORA = Path(__file__).parents[3] / "shared" / "corpora"


def right(value, accepted: list, schema: dict, required: bool = True) -> bool:
    """Whether `value` is right for a parameter `p` beside nothing else; ... leaves it out."""
    declared = {"type": "object", "properties": {"p": schema}, "required": ["p"] if required else []}
    return arguments_accepted({} if value is ... else {"p": value}, {"p": accepted}, declared)


def test_values_are_compared_by_their_declared_type_also_in_objects() -> None:
    one, many = {"type": "dict"}, {"type": "array", "items": {"type": "dict"}}
    places = [{"city": ["San Francisco"], "days": [3, 4], "unit": ["", "C"]}, {"place": ["SF"]}]
    sf, ann, bo = {"city": "san francisco", "days": 4}, {"name": "ann"}, {"name": "bo"}
    people = [[{"name": ["Ann"], "age": [3, ""]}, {"name": ["Bo"]}], ""]
    for schema, accepted, good, bad in (
        (TEXT, ["New York, NY", "NYC"], ["new york ny", "NEW-YORK_NY", "n.y.c"], ["New York", 1, None, ["NYC"], ""]),
        (TEXT, ["it's"], ['IT"S', "it's"], ["its", "it\u2019s"]),
        (TEXT, ["x^2+1", "x**2"], ["x2+1", "X 2"], ["x2 1", "x(2)"]),
        ({"type": "integer"}, [3], [3], [3.0, "3", True, 4]),
        ({"type": "integer"}, [1], [1], [True]),
        ({"type": "number"}, [3.0, 2.5], [3, 3.0, 2.5], ["3", True, 2]),
        ({"type": "float"}, [3.0], [3], ["3.0"]),
        ({"type": "boolean"}, [True], [True], [1, "true", False]),
        (NUMBERS, [[1.0, 2.5]], [[1.0, 2.5]], [[1, 2.5], [2.5, 1.0], [1.0], "1.0, 2.5"]),
        (NUMBERS, [[1, 2]], [[1, 2]], [[1, 2, 3], [True, 2], ["1", 2]]),
        ({"type": "tuple", "items": TEXT}, [["Oslo", "LA, US"]], [["oslo", "la-us"]], [["la us"], [1]]),
        # declared a number, accepted as a text: a variable's name, which counts as it stands
        ({"type": "number"}, ["radius"], ["radius"], ["Radius", 2]),
        ({}, ["a", 5], ["A"], [5]),
        ({}, [5, "a"], [5], ["A"]),
        (one, places, [sf, {"days": 3, "city": "San-Francisco", "unit": "c"}, {"place": "sf"}],
         [{"city": "San Francisco"}, {"city": "SF", "days": 3}, {"place": "SF", "days": 3}, {}, "SF", [sf]]),
        (one, [{"at": [{"lat": 1.5}]}], [{"at": {"lat": 1.5}}], [{"at": {"lat": 2.5}}]),
        (many, people, [[ann, bo]], [[bo, ann], [ann], [ann, "bo"], ann]),
    ):  # fmt: skip
        assert all(right(value, accepted, schema) for value in good), accepted
        assert not any(right(value, accepted, schema) for value in bad), accepted


def test_what_may_be_left_out_and_what_is_not_declared() -> None:
    assert right(..., ["mi", ""], TEXT, required=False)
    assert not right(..., ["mi"], TEXT, required=False), "not required, but no right call leaves it out"
    assert not right(..., ["mi", ""], TEXT, required=True)
    assert not right("km", ["mi", ""], TEXT, required=False)
    declared = {"type": "object", "properties": {"p": TEXT, "q": TEXT}, "required": ["p"]}
    assert not arguments_accepted({"p": "a", "q": "b"}, {"p": ["a"]}, declared), "declared, but in no right call"
    assert not arguments_accepted({"p": "a", "r": "b"}, {"p": ["a"], "r": ["b"]}, declared)


def line(accept, **more) -> dict:
    tool = {"type": "function", "function": AREA_TOOL | more}
    return {"messages": [{"role": "user", "content": "An area of base 5."}], "tools": [tool], "accept": accept}


def test_lines_bring_what_is_accepted_and_survive_being_written() -> None:
    entry = parse(line([{"math.area": {"base": [5], "unit": ["cm", ""]}}]), "7")
    assert entry.answer == Call("math.area", {"base": 5})
    assert parse(entry_line(entry) | {"id": "7"}, "0") == entry
    assert parse(line(None), "0").answer == parse(line([]), "0").answer == NO_TOOL
    underscored = parse(line([{"math.area": {"base": [5]}}], name="math_area"), "0")
    assert underscored.accepted.name == underscored.answer.name == "math_area"
    one = {"math.area": {"base": [5]}}
    wrong = ([one, one], one, ["math.area"], [{"math.area": {"base": 5}}], [{"math.area": {"base": []}}], [{"x": {}}])
    for accept in wrong:
        with pytest.raises(Fault, match="accept"):
            parse(line(accept), "0")


def test_a_reply_is_scored_and_classed_by_what_is_accepted() -> None:
    made = entry_row(0, parse(line([{"math.area": {"base": [5], "unit": ["square cm", ""]}}]), "0"))
    right = ""
    for arguments, pair, name in (
        ({"base": 5, "unit": "Square CM"}, (True, True), "right"),
        ({"base": 5.0}, (True, False), "wrong_parameter"),
        ({"unit": "square cm"}, (True, False), "missing_parameter"),
        ({"base": 5, "height": 2}, (True, False), "extra_parameter"),
    ):
        reply = f"<tool_call>\n{json.dumps({'name': 'math.area', 'arguments': arguments})}\n</tool_call>"
        right = reply if name == "right" else right
        found = made | {"status": "ok", "style": "petool", "finish": "stop", "reply": reply}
        score = score_row(found)
        assert (score.scorer, score.pairs["ast"], error_class(found, score)) == ("ast", pair, name)
    for wrong in (f"{right}\n{right}", reply.replace("math.area", "math_area"), NO_TOOL):
        score = score_row(made | {"status": "ok", "style": "petool", "reply": wrong})
        assert score.pairs["ast"] == (False, False), "one call is asked for, of the name that is accepted"
    assert score.call is None


def test_the_report_names_the_scorer_and_counts_apart_where_no_tool_fits(tmp_path) -> None:
    file = tmp_path / "test.jsonl.gz"
    lines = [line([{"math.area": {"base": [5]}}])] * 3 + [line(None)] * 4
    file.write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))
    dataset = load_dataset(str(file))
    assert Task(dataset, 64).text == Task(load_dataset(str(file)), 64, limit=3).text == NO_TOOL
    call = answer(dataset.entries[0])
    replies = [call, call.replace("5", "6"), NO_TOOL, NO_TOOL, NO_TOOL, NO_TOOL, call]
    kinds = ["pair", "alone", "alone", "none", "none", "none", "none"]
    told = zip(dataset.entries, range(7), replies, kinds, strict=True)
    write_results(tmp_path, [row(*three, setting="none", kind=kind) for *three, kind in told])
    (item,) = write_report(tmp_path)["variants"]
    assert (item["scorer"], item["n"], "as_asked" in item) == ("ast", 7, False)
    fits, none = item["cases"]["a tool fits"], item["cases"]["none fits"]
    assert [fits[key] for key in ("n", "called_acc", "tool_acc", "joint_acc")] == [3, 66.6667, 66.6667, 33.3333]
    assert [none[key] for key in ("n", "called_acc", "tool_acc", "joint_acc")] == [4, 25.0, 75.0, 75.0]
    text = (tmp_path / "report.md").read_text()
    assert "BFCL's AST" in text
    assert "none fits | 4 | 25.0" in text
    assert "| tuned | pair | 1 | 100.0 " in text
    assert "| tuned | none |" not in text, "the same entries are not told twice"


@pytest.mark.parametrize(("name", "count"), [("simple", 400), ("multiple", 200), ("irrelevance", 240)])
def test_every_recorded_answer_of_bfcl_is_right(name, count) -> None:
    path = CORPORA / f"test_bfcl_{name}.jsonl.gz"
    if not path.is_file():
        pytest.skip("the corpora are not on this machine")
    entries = load_dataset(str(path)).entries
    assert len(entries) == count
    for index, entry in enumerate(entries):
        reply = entry.answer.to_json() if isinstance(entry.answer, Call) else entry.answer
        assert score_row(row(entry, index, reply)).right("joint"), (index, reply)
