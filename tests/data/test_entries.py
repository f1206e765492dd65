"""Parsing loses nothing and names what is wrong."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petool_lite.data.demo import generate
from petool_lite.data.entries import SETTINGS, parse_entry
from petool_lite.data.files import load_dataset
from petool_lite.errors import PetoolError

FIELDS = {
    "rating": "instruction_ratings",
    "preferred": "instruction_preferred",
    "chronological": "instruction_chronological",
}


def test_every_published_prompt_comes_back_byte_for_byte(open_entries) -> None:
    import zipfile

    with zipfile.ZipFile(open_entries) as archive:
        rows = json.loads(archive.read(archive.namelist()[0]))
    entries = load_dataset(str(open_entries), "rating").entries
    assert len(entries) == len(rows) == 753
    for row, entry in zip(rows, entries, strict=True):
        assert entry.gold.tool_name == row["api_call_ground_truth"]["tool_name"]
        for setting in SETTINGS:
            prompt = entry.prompt(setting)
            assert prompt.text == row[FIELDS[setting]]
            assert prompt.with_history(prompt.history).text == row[FIELDS[setting]]
            assert len(prompt.history) > 0
            assert len(prompt.tools) in (10, 11)


def test_a_training_row_and_a_preference_row_are_read() -> None:
    row = generate("train", 1)[0]
    answer = json.dumps(row["api_call_ground_truth"])
    common = {"instruction": row["instruction_ratings"], "input": row["query"]}
    sft = parse_entry({**common, "output": answer}, "rating", "file", 0)
    dpo = parse_entry({**common, "chosen": answer, "rejected": "{}"}, "rating", "file", 0)
    test = parse_entry(row, "rating", "file", 0)
    assert sft.gold == dpo.gold == test.gold
    assert sft.prompt("rating") == test.prompt("rating")


def test_rewording_a_prompt_does_not_break_it() -> None:
    row = generate("train", 1)[0]
    text = row["instruction_ratings"].replace("Tools:", "You may call [one] of {these}:").replace("Choose", "[] Pick")
    prompt = parse_entry({**row, "instruction_ratings": text}, "rating", "file", 0).prompt("rating")
    assert prompt.text == text
    assert len(prompt.tools) == 4


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("api_call_ground_truth", "tool_name"), None, "api_call_ground_truth.tool_name"),
        (("api_call_ground_truth", "parameters"), "x", "api_call_ground_truth.parameters"),
        (("query",), 3, "query"),
        (("instruction_ratings",), "no arrays here", "instruction_ratings"),
    ],
)
def test_a_broken_entry_is_named_by_file_entry_and_field(path, value, named) -> None:
    row = copy.deepcopy(generate("train", 1)[0])
    place = row
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(PetoolError) as error:
        parse_entry(row, "rating", "some.json", 7)
    assert "some.json" in error.value.message
    assert "entry 7" in error.value.message
    assert named in error.value.message


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=2000, deadline=None)
@given(st.data())
def test_a_mutated_entry_gives_a_clear_error_or_an_entry(data) -> None:
    row = copy.deepcopy(generate("train", 1)[0])
    key = data.draw(st.sampled_from(sorted(row)))
    if isinstance(row[key], str) and data.draw(st.booleans()):
        start = data.draw(st.integers(0, len(row[key])))
        row[key] = row[key][:start] + data.draw(st.text(max_size=5)) + row[key][start + data.draw(st.integers(0, 9)) :]
    else:
        row[key] = data.draw(_JSON)
    try:
        entry = parse_entry(row, "rating", "file", 0)
    except PetoolError as error:
        assert "entry 0" in error.message or "no prompt" in error.message
    else:
        assert entry.prompt("rating").text == row["instruction_ratings"]
