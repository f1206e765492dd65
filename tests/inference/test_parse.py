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
FAILURES = {
    "no_call": [
        "I cannot help with that.", "", "{}", '{"tool_name": 3, "parameters": {}}',
        'Sure: <tool_call>{"name": "u", "arguments": {}}</tool_call>',
    ],
    "bad_json": [
        '<tool_call>{"name": "u", "arguments": {}}', '<tool_call>{"name": "u", "arguments": {}}</tool_call> and more',
        '{"tool_name": "u", "parameters": {}} and more', '{"tool_name": "u", "parameters": {}', "{" + '"a": {' * 5000,
        *(f'{{"tool_name": "t", "parameters": {{"a": {value}}}}}' for value in ('"x", "a": "y"', "NaN", "1e999")),
        '{"tool_name": "t", "parameters": {"a": "\\ud83d"}}',
    ],
    "unknown_tool": ['{"tool_name": "v", "parameters": {}}'],
    "missing_parameter": ['{"tool_name": "t", "parameters": {"b": 1}}'],
    "extra_parameter": ['{"tool_name": "u", "parameters": {"a": 1}}'],
}  # fmt: skip


def test_a_valid_call_is_read_in_every_form() -> None:
    for reply, name, arguments in (
        ('<tool_call>\n{"name": "t", "arguments": {"b": 1.5, "a": "x}}</tool_call>"}}\n</tool_call>', "t",
         {"b": 1.5, "a": "x}}</tool_call>"}),
        ('{"tool_name": "t", "parameters": {"a": "x"}}', "t", {"a": "x"}),
        (' {"name": "u", "parameters": {}}\n', "u", {}),
        ('<tool_call>{"name": "open", "arguments": {"x": {"k": 2}}}</tool_call>', "open", {"x": {"k": 2}}),
    ):  # fmt: skip
        assert parse_call(reply, TOOLS) == Call(name, arguments)
        assert parse_call(reply, TOOLS, text=True) == Call(name, arguments)


@pytest.mark.parametrize(("kind", "reply"), [(kind, reply) for kind in FAILURES for reply in FAILURES[kind]])
def test_failures_have_names(kind, reply) -> None:
    with pytest.raises(CallFailure) as caught:
        parse_call(reply, TOOLS)
    assert (caught.value.kind, caught.value.reply) == (kind, reply)


def test_a_text_is_an_answer_where_it_may_be_one_and_what_is_cut_off_is_nothing() -> None:
    assert parse_call(" No tool fits.\n", TOOLS, text=True) == "No tool fits."
    for reply in ("", '{"a": 1}', 'Sure: <tool_call>{"name": "u", "arguments": {}}</tool_call>'):
        with pytest.raises(CallFailure):
            parse_call(reply, TOOLS, text=True)
    for reply in ('{"tool_name": "u", "parameters": {}}', "No tool"):
        with pytest.raises(CallFailure) as caught:
            parse_call(reply, TOOLS, finish="length")
        assert caught.value.kind == "cut_off"
