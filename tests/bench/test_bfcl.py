"""BFCL's rules for one call against what is accepted, and tests in that form from their lines to the report."""

import gzip
import json
from pathlib import Path

import pytest
from petool_lite.bench.bfcl import arguments_accepted
from petool_lite.bench.engines import Task
from petool_lite.bench.report import write_report
from petool_lite.bench.run import entry_row
from petool_lite.bench.score import error_class, score_row
from support_bench import answer, row, write_results

from petool_lite.data.entries import NO_TOOL, Call
from petool_lite.data.fields import Fault
from petool_lite.data.files import load_dataset
from petool_lite.data.openai import entry_line, parse

CORPORA = Path(__file__).parents[3] / "shared" / "corpora"
TEXT, NUMBERS = {"type": "string"}, {"type": "array", "items": {"type": "number"}}


def right(value, accepted: list, schema: dict, required: bool = True) -> bool:
    """Whether `value` is right for a parameter `p` beside nothing else; ... leaves it out."""
    declared = {"type": "object", "properties": {"p": schema}, "required": ["p"] if required else []}
    return arguments_accepted({} if value is ... else {"p": value}, {"p": accepted}, declared)


def test_values_are_compared_by_their_declared_type() -> None:
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
    ):
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


def test_objects_and_lists_of_objects() -> None:
    one, many = {"type": "dict"}, {"type": "array", "items": {"type": "dict"}}
    places = [{"city": ["San Francisco"], "days": [3, 4], "unit": ["", "C"]}, {"place": ["SF"]}]
    sf, ann, bo = {"city": "san francisco", "days": 4}, {"name": "ann"}, {"name": "bo"}
    people = [[{"name": ["Ann"], "age": [3, ""]}, {"name": ["Bo"]}], ""]
    for schema, accepted, good, bad in (
        (one, places, [sf, {"days": 3, "city": "San-Francisco", "unit": "c"}, {"place": "sf"}],
         [{"city": "San Francisco"}, {"city": "SF", "days": 3}, {"place": "SF", "days": 3}, {}, "SF", [sf]]),
        (one, [{"at": [{"lat": 1.5}]}], [{"at": {"lat": 1.5}}], [{"at": {"lat": 2.5}}]),
        (many, people, [[ann, bo]], [[bo, ann], [ann], [ann, "bo"], ann]),
    ):  # fmt: skip
        assert all(right(value, accepted, schema) for value in good), accepted
        assert not any(right(value, accepted, schema) for value in bad), accepted


AREA = {"base": {"type": "integer"}, "unit": {"type": "string"}}
TOOL = {"name": "math.area", "parameters": {"type": "object", "properties": AREA, "required": ["base"]}}


def line(accept, **more) -> dict:
    tool = {"type": "function", "function": TOOL | more}
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
    twice = score_row(made | {"status": "ok", "style": "petool", "reply": f"{right}\n{right}"})
    assert twice.pairs["ast"] == (False, False), "one call is asked for"
    other = score_row(made | {"status": "ok", "style": "petool", "reply": reply.replace("math.area", "math_area")})
    assert other.pairs["ast"] == (False, False)
    silent = score_row(made | {"status": "ok", "style": "petool", "reply": NO_TOOL})
    assert (silent.pairs["ast"], silent.call) == ((False, False), None)


def test_the_report_names_the_scorer_and_counts_apart_where_no_tool_fits(tmp_path) -> None:
    file = tmp_path / "test.jsonl.gz"
    lines = [line([{"math.area": {"base": [5]}}])] * 3 + [line(None)] * 4
    file.write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))
    dataset = load_dataset(str(file))
    assert Task(dataset, 64).text == Task(load_dataset(str(file)), 64, limit=3).text == NO_TOOL
    call = answer(dataset.entries[0])
    replies = [call, call.replace("5", "6"), NO_TOOL, NO_TOOL, NO_TOOL, NO_TOOL, call]
    made = [row(entry, index, replies[index], setting="none") for index, entry in enumerate(dataset.entries)]
    write_results(tmp_path, made)
    (item,) = write_report(tmp_path)["variants"]
    assert (item["scorer"], item["n"], "as_asked" in item) == ("ast", 7, False)
    fits, none = item["cases"]["a tool fits"], item["cases"]["none fits"]
    assert [fits[key] for key in ("n", "called_acc", "tool_acc", "joint_acc")] == [3, 66.6667, 66.6667, 33.3333]
    assert [none[key] for key in ("n", "called_acc", "tool_acc", "joint_acc")] == [4, 25.0, 75.0, 75.0]
    text = (tmp_path / "report.md").read_text()
    assert "BFCL's AST" in text
    assert "none fits | 4 | 25.0" in text


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
