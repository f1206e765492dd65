"""Every class of error and every kind of parameter fault, on replies that a model might write."""

import json

import pytest
from petool_lite.bench.errors import CLASSES, breakdown, error_class, parameter_faults
from petool_lite.bench.score import mark_row

GOLD = {"tool_name": "<W>.<Sun>.<forecast>", "parameters": {"city": "Oslo", "days": 3, "unit": "C"}}
FACTS = {
    "offered": ["<W>.<Sun>.<forecast>", "<W>.<Rain>.<forecast>", "<M>.<Tune>.<search>"],
    "same_job": ["<W>.<Sun>.<forecast>", "<W>.<Rain>.<forecast>"],
    "declared": ["city", "days", "unit", "lang"],
    "history_length": 20,
    "liked_share": None,
    "defaults": {"city": "Paris", "days": "7", "unit": "C", "lang": ""},
}


def classified(reply, **more):
    row = {"status": "ok", "finish": "stop", "gold": GOLD, "facts": FACTS, "reply": reply} | more
    return error_class(row, mark_row(row))


def call(tool="<W>.<Sun>.<forecast>", **parameters) -> str:
    return json.dumps({"tool_name": tool, "parameters": {**GOLD["parameters"], **parameters}})


def without(name: str) -> str:
    parameters = {key: value for key, value in GOLD["parameters"].items() if key != name}
    return json.dumps({"tool_name": GOLD["tool_name"], "parameters": parameters})


@pytest.mark.parametrize(
    ("reply", "more", "found"),
    [
        (call(), {}, "right"),
        (f"Here you are: {call()}", {}, "right"),
        (call(), {"finish": "length"}, "right"),
        (call().replace('"parameters": {', '"parameters":\n{').replace("}}", "}\n}"), {}, "other_form"),
        (call("<W>.<Rain>.<forecast>"), {}, "preference_mismatch"),
        (call("<M>.<Tune>.<search>"), {}, "function_mismatch"),
        (call("<W>.<Snow>.<forecast>"), {}, "invented_tool"),
        (without("city"), {}, "missing_parameter"),
        (call(lang="en"), {}, "extra_parameter"),
        (call(city="Bergen"), {}, "wrong_parameter"),
        ("I would call the forecast.", {}, "bad_format"),
        (call()[:-1], {}, "bad_format"),
        (call()[:-9], {"finish": "length"}, "cut_off"),
        ("", {"status": "too_long"}, "too_long"),
        ("", {"status": "engine_error"}, "engine_error"),
    ],
)
def test_each_class(reply, more, found) -> None:
    assert classified(reply, **more)[0] == found


def test_every_class_is_tested_above() -> None:
    marks = next(mark for mark in test_each_class.pytestmark if mark.name == "parametrize")
    assert {case[2] for case in marks.args[1]} == set(CLASSES)


@pytest.mark.parametrize(
    ("reply", "faults"),
    [
        (without("city"), {"city": "missing_other"}),
        (without("unit"), {"unit": "missing_default"}),
        (call(lang="en"), {"lang": "unasked"}),
        (call(speed=1), {"speed": "undeclared"}),
        (call(days="3"), {"days": "wrong_type"}),
        (call(unit="F"), {"unit": "forgotten_default"}),
        (call(days=7), {"days": "kept_default"}),
        (call(days="7"), {"days": "kept_default"}),
        (call(city="oslo"), {"city": "copied_wrongly"}),
        (call(city="Paris", days=4), {"city": "kept_default", "days": "copied_wrongly"}),
    ],
)
def test_each_fault_of_a_parameter(reply, faults) -> None:
    assert parameter_faults(json.loads(reply), {"gold": GOLD, "facts": FACTS}) == faults


def test_an_empty_default_is_no_default() -> None:
    gold = {"tool_name": "t", "parameters": {"lang": ""}}
    found = parameter_faults({"tool_name": "t", "parameters": {"lang": "en"}}, {"gold": gold, "facts": FACTS})
    assert found == {"lang": "copied_wrongly"}


def test_parts_hold_all_rows_once_and_in_order() -> None:
    lengths = [0, 3, 20, 20, 80]
    rows = [
        {"status": "ok", "finish": "stop", "gold": GOLD, "reply": call() if length else ""}
        | {"facts": FACTS | {"history_length": length}}
        for length in lengths
    ]
    marks = [mark_row(row) for row in rows]
    classes = [error_class(row, mark)[0] for row, mark in zip(rows, marks, strict=True)]
    parts = breakdown(rows, marks, classes, "history_length")
    assert [(part["part"], part["n"], part["tool_acc"]) for part in parts] == [
        ("none", 1, 0.0), ("1-5", 1, 100.0), ("16-20", 2, 100.0), ("more than 50", 1, 100.0)
    ]  # fmt: skip
    assert parts[0]["classes"]["bad_format"] == 1
    assert sum(sum(part["classes"].values()) for part in parts) == len(rows)
