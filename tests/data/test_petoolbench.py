"""Published entries: nothing is lost on the way to JSON Schema and back, and what is wrong is named."""

import copy
import json
import zipfile
from dataclasses import replace

import pytest
from support_published import published_rows, training_row

from petool_lite.data import SETTINGS, petoolbench
from petool_lite.data.entries import DISLIKED, LIKED, Entry
from petool_lite.data.fields import Fault
from petool_lite.data.files import load_dataset
from petool_lite.data.openai import read_tools
from petool_lite.data.petoolbench import PROMPT_FIELD, interaction_row, parse, prompt_of, published_call
from petool_lite.prompt.render import Layout, chat_from_directory, prompt_text


def test_every_published_entry_comes_back_byte_for_byte(open_entries) -> None:
    with zipfile.ZipFile(open_entries) as archive:
        rows = json.loads(archive.read(archive.namelist()[0]))
    for setting in SETTINGS:
        entries = load_dataset(str(open_entries), setting).entries
        assert len(entries) == len(rows) == 753
        for row, entry in zip(rows, entries, strict=True):
            assert prompt_of(entry.published) == row[PROMPT_FIELD[setting]]
            assert published_call(entry.answer) == row["api_call_ground_truth"]
            for tool, text in zip(entry.tools, entry.published.tools, strict=True):
                assert json.dumps(petoolbench.published_tool(tool)) == json.dumps(json.loads(text))
            for item, text in zip(entry.history, entry.published.history, strict=True):
                assert interaction_row(item, rated=setting == "rating") == json.loads(text)


def test_a_published_type_is_json_schema_and_comes_back() -> None:
    for declared, schema in (
        ({"type": "NUMBER", "default": "10"}, {"type": "number", "default": 10}),
        ({"type": "NUMBER", "default": "10.0"}, {"type": "number", "default": 10.0}),
        ({"type": "NUMBER", "default": "NaN"}, {"type": "number", "default": "NaN"}),
        ({"type": "BOOLEAN", "default": "True"}, {"type": "boolean", "default": True}),
        ({"type": "DATE (YYYY-MM-DD)", "default": "2024-01-01"}, {"type": "string", "default": "2024-01-01"}),
        ({"type": "NUMBER", "default": None}, {"type": "number"}),
    ):
        parameter = {"name": "x", "type": "", "description": "what it is", "default": ""} | declared
        published = {"tool_name": "<A>.<b>.<c>", "tool_description": "does"}
        published |= {"required_parameters": [parameter], "optional_parameters": []}
        tool = petoolbench.read_tool(published, "tool")
        found = {key: value for key, value in tool.parameters["properties"]["x"].items() if key != "x-published"}
        assert found == schema | {"description": "what it is"}
        assert json.dumps(petoolbench.published_tool(tool)) == json.dumps(published)


@pytest.mark.parametrize("kind", ["integer", "boolean", "string", None, ["integer", "null"]])
def test_null_is_nothing_and_never_a_word(kind, smollm2) -> None:
    schema = {"type": "object", "properties": {"x": {"type": kind, "description": None, "default": None}}}
    ours = {"name": "bakeries", "description": None, "parameters": schema}
    theirs = {
        "tool_name": "<A>.<b>.<c>", "tool_description": None, "optional_parameters": [],
        "required_parameters": [{"name": "x", "type": None, "description": None, "default": None}],
    }  # fmt: skip
    chat = chat_from_directory(smollm2.directory)
    for form in (ours, theirs):
        entry = Entry("0", "Which loaves?", read_tools([form]))
        row = petoolbench.published_tool(entry.tools[0])
        assert {row["tool_description"], *(part["description"] for part in row["optional_parameters"])} == {""}
        made = petoolbench.published_entry(entry, ["", "", ""], "rating")
        for style in ("petool", "published"):
            shown = prompt_text(chat, made, Layout(style, 4096))
            assert not [word for word in ("None", '"null"') if word in shown]


def test_a_training_row_and_a_preference_row_are_read_and_rewording_a_prompt_does_not_break_it() -> None:
    row = published_rows("train", 1)[0]
    answer = json.dumps(row["api_call_ground_truth"])
    sft = parse(training_row(row), "rating", "0")
    dpo = parse(training_row(row, chosen=answer, rejected="{}"), "rating", "0")
    test = parse(row, "rating", "0")
    assert sft.answer == dpo.answer == test.answer
    assert (dpo.rejected, sft.rejected) == ("{}", None)
    assert sft.published == test.published
    assert [item.verdict for item in test.history] == [DISLIKED, DISLIKED, LIKED]
    assert [item.verdict for item in parse(row, "preferred", "0").history] == [LIKED]
    assert {item.verdict for item in parse(row, "chronological", "0").history} == {None}
    text = row["instruction_ratings"].replace("Tools:", "You may call [one] of {these}:").replace("Choose", "[] Pick")
    entry = parse({**row, "instruction_ratings": text}, "rating", "0")
    assert prompt_of(entry.published) == text
    assert len(entry.tools) == 4
    wording = entry.published.head, entry.published.middle, entry.published.tail  # by which any entry gets a prompt
    made = petoolbench.published_entry(replace(entry, published=None), wording, "rating")
    assert prompt_of(made.published) == text


def test_a_broken_entry_is_named_by_file_entry_and_field(tmp_path) -> None:
    for path, value, named in (
        (("api_call_ground_truth", "tool_name"), None, "api_call_ground_truth.tool_name"),
        (("api_call_ground_truth", "parameters"), "x", "api_call_ground_truth.parameters"),
        (("api_call_ground_truth", "parameters"), {"a": float("nan")}, "api_call_ground_truth.parameters.a"),
        (("api_call_ground_truth", "parameters"), {"a": ["\ud800"]}, "api_call_ground_truth.parameters.a[0]"),
        (("query",), 3, "query"),
        (("func",), "\udc00", "func"),
        (("instruction_ratings",), "no arrays here", "instruction_ratings"),
    ):
        row = copy.deepcopy(published_rows("train", 1)[0])
        place = row
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        with pytest.raises(Fault) as error:
            parse(row, "rating", "7")
        assert str(error.value).startswith(f"{named}: ")
        (tmp_path / "rows.json").write_text(json.dumps([row, published_rows("train", 2)[1]]))
        kept = load_dataset(str(tmp_path / "rows.json"), "rating", skip_bad=True)
        assert (len(kept.entries), kept.total) == (1, 2)
        assert f"rows.json, entry 0 (entry_id '0'), {named}: " in kept.bad[0]
