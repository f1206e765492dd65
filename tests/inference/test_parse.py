"""Each way in which a reply can fail has its own name; only a valid call gets through."""

import pytest

from petool_lite.data.entries import Parameter, Tool
from petool_lite.inference.parse import CallFailure, parse_call

TOOLS = [Tool("t", "", (Parameter("a", "STRING", "", ""),), (Parameter("b", "NUMBER", "", ""),)), Tool("u", "", (), ())]


def test_a_valid_call_is_read() -> None:
    call = parse_call('{"tool_name": "t", "parameters": {"b": 1.5, "a": "x}}"}}', TOOLS)
    assert (call.tool_name, call.parameters) == ("t", {"b": 1.5, "a": "x}}"})


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        ("I cannot help with that.", "no_call"),
        ("", "no_call"),
        ("{}", "no_call"),
        ('{"tool_name": "u", "parameters": [], "x": 1}', "no_call"),
        ('{"tool_name": 3, "parameters": {}}', "no_call"),
        ('Sure: {"tool_name": "u", "parameters": {}}', "no_call"),
        ('{"tool_name": "u", "parameters": {}} and more', "bad_json"),
        ('{"tool_name": "u", "parameters": {}', "bad_json"),
        ('{"tool_name": "t", "parameters": {"a": "x", "a": "y"}}', "bad_json"),
        ('{"tool_name": "t", "parameters": {"a": NaN}}', "bad_json"),
        ("{" + '"a": {' * 5000, "bad_json"),
        ('{"tool_name": "v", "parameters": {}}', "unknown_tool"),
        ('{"tool_name": "t", "parameters": {"b": 1}}', "missing_parameter"),
        ('{"tool_name": "u", "parameters": {"a": 1}}', "extra_parameter"),
    ],
)
def test_failures_have_names(reply, kind) -> None:
    with pytest.raises(CallFailure) as caught:
        parse_call(reply, TOOLS)
    assert caught.value.kind == kind
    assert caught.value.reply == reply


def test_a_reply_that_reached_its_limit_is_cut_off_whatever_it_says() -> None:
    with pytest.raises(CallFailure) as caught:
        parse_call('{"tool_name": "u", "parameters": {}}', TOOLS, finish="length")
    assert caught.value.kind == "cut_off"
