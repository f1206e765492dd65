"""Each way in which a reply can fail has its own name; only a valid answer gets through."""

import pytest

from petool_lite.data.entries import Call, Tool
from petool_lite.inference.parse import CallFailure, parse_call

STRING, NUMBER = {"type": "string"}, {"type": "number"}
TOOLS = [
    Tool("t", "", {"type": "object", "properties": {"a": STRING, "b": NUMBER}, "required": ["a"]}),
    Tool("u", "", {"type": "object", "properties": {}}),
    Tool("open", "", {"type": "object", "additionalProperties": True}),
]


@pytest.mark.parametrize(
    ("reply", "name", "arguments"),
    [
        ('<tool_call>\n{"name": "t", "arguments": {"b": 1.5, "a": "x}}</tool_call>"}}\n</tool_call>', "t",
         {"b": 1.5, "a": "x}}</tool_call>"}),
        ('{"tool_name": "t", "parameters": {"a": "x"}}', "t", {"a": "x"}),
        (' {"name": "u", "parameters": {}}\n', "u", {}),
        ('<tool_call>{"name": "open", "arguments": {"x": {"k": 2}}}</tool_call>', "open", {"x": {"k": 2}}),
    ],
)  # fmt: skip
def test_a_valid_call_is_read_in_every_form(reply, name, arguments) -> None:
    assert parse_call(reply, TOOLS) == Call(name, arguments)
    assert parse_call(reply, TOOLS, text=True) == Call(name, arguments)


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        ("I cannot help with that.", "no_call"),
        ("", "no_call"),
        ("{}", "no_call"),
        ('{"tool_name": 3, "parameters": {}}', "no_call"),
        ('Sure: <tool_call>{"name": "u", "arguments": {}}</tool_call>', "no_call"),
        ('<tool_call>{"name": "u", "arguments": {}}', "bad_json"),
        ('<tool_call>{"name": "u", "arguments": {}}</tool_call> and more', "bad_json"),
        ('{"tool_name": "u", "parameters": {}} and more', "bad_json"),
        ('{"tool_name": "u", "parameters": {}', "bad_json"),
        ('{"tool_name": "t", "parameters": {"a": "x", "a": "y"}}', "bad_json"),
        ('{"tool_name": "t", "parameters": {"a": NaN}}', "bad_json"),
        ('{"tool_name": "t", "parameters": {"a": 1e999}}', "bad_json"),
        ('{"tool_name": "t", "parameters": {"a": "\\ud83d"}}', "bad_json"),
        ("{" + '"a": {' * 5000, "bad_json"),
        ('{"tool_name": "v", "parameters": {}}', "unknown_tool"),
        ('{"tool_name": "t", "parameters": {"b": 1}}', "missing_parameter"),
        ('{"tool_name": "u", "parameters": {"a": 1}}', "extra_parameter"),
    ],
)
def test_failures_have_names(reply, kind) -> None:
    with pytest.raises(CallFailure) as caught:
        parse_call(reply, TOOLS)
    assert (caught.value.kind, caught.value.reply) == (kind, reply)


def test_a_text_is_an_answer_where_it_may_be_one() -> None:
    assert parse_call(" No tool fits.\n", TOOLS, text=True) == "No tool fits."
    for reply in ("", "{", '{"a": 1}', 'Sure: <tool_call>{"name": "u", "arguments": {}}</tool_call>'):
        with pytest.raises(CallFailure):
            parse_call(reply, TOOLS, text=True)


def test_a_reply_that_reached_its_limit_is_cut_off_whatever_it_says() -> None:
    for reply in ('{"tool_name": "u", "parameters": {}}', "<tool_call>\n{", "No tool"):
        with pytest.raises(CallFailure) as caught:
            parse_call(reply, TOOLS, finish="length")
        assert caught.value.kind == "cut_off"
