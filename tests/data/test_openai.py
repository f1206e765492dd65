"""Everybody's forms: OpenAI, MCP, Hermes and xLAM lines become the same entries; verdicts are read from turns."""

import gzip
import json
from pathlib import Path

import pytest

from petool_lite.data.answers import answer_faults, equal_tools
from petool_lite.data.entries import DISLIKED, LIKED, Call, Entry, Interaction, Tool, balance, namespace, providers
from petool_lite.data.fields import Fault
from petool_lite.data.files import load_dataset
from petool_lite.data.openai import conversation, entry_line, entry_messages, parse, read_tools
from petool_lite.data.schema import normal_schema, value_faults

CORPORA = Path(__file__).parents[3] / "shared" / "corpora"
KINDS = {"city": {"type": "string"}, "days": {"type": "integer"}}
SCHEMA = {"type": "object", "properties": KINDS, "required": ["city"]}
FORECAST = {"type": "function", "function": {"name": "sun.forecast", "description": "Weather", "parameters": SCHEMA}}
CALL = {"name": "sun.forecast", "arguments": {"city": "Bern", "days": 2}}
ANSWER = Call("sun.forecast", CALL["arguments"])
WANTED = Entry("0", "Rain in Bern?", (Tool("sun.forecast", "Weather", SCHEMA),), answer=ANSWER)


def message(call: dict, identity: str = "a") -> dict:
    function = {"name": call["name"], "arguments": json.dumps(call["arguments"])}
    return {"role": "assistant", "tool_calls": [{"id": identity, "type": "function", "function": function}]}


LINES = {
    "openai": {"messages": [{"role": "user", "content": "Rain in Bern?"}, message(CALL)], "tools": [FORECAST]},
    "functions": {"functions": [FORECAST["function"]], "messages": [
        {"role": "user", "content": [{"type": "text", "text": None}, {"type": "input_text", "text": WANTED.query}]},
        {"role": "assistant", "function_call": {**CALL, "arguments": json.dumps(CALL["arguments"])}}]},
    "hermes": {"conversations": [
        {"from": "system", "value": f"Tools: <tools> {json.dumps([FORECAST])} </tools>"},
        {"from": "human", "value": "Rain in Bern?"},
        {"from": "gpt", "value": f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>"}]},
    "sharegpt": {"tools": json.dumps([FORECAST["function"]]), "conversations": [
        {"from": "human", "value": "Rain in Bern?"}, {"from": "function_call", "value": json.dumps(CALL)}]},
    "xlam": {"query": WANTED.query, "tools": json.dumps([FORECAST["function"]]), "answers": json.dumps([CALL])},
}  # fmt: skip


@pytest.mark.parametrize("form", LINES)
def test_every_form_is_the_same_entry_and_survives_openai_lines(form, tmp_path) -> None:
    assert parse(LINES[form], "0") == WANTED
    path = tmp_path / "log.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(LINES[form]).encode()))
    assert load_dataset(str(path)).entries == (WANTED,)
    assert parse(entry_line(WANTED), "0") == WANTED


def test_all_corpora_load_and_come_back() -> None:
    files = [file for file in sorted(CORPORA.glob("*.jsonl.gz")) if "tool_pool" not in file.name]
    if not files:
        pytest.skip("the corpora are not on this machine")
    counts = {file.name: load_dataset(str(file)).entries for file in files}
    assert sum(len(found) for name, found in counts.items() if not name.startswith("test_")) == 7912
    for found in counts.values():
        for entry in found[::40]:
            assert parse(entry_line(entry), entry.id) == entry


def test_two_calls_of_one_turn_get_their_own_verdicts_and_thanks_go_with_them() -> None:
    both = {"role": "assistant", "tool_calls": [*message(CALL, "x")["tool_calls"], *message(CALL, "y")["tool_calls"]]}
    both["tool_calls"][1]["function"] = {"name": "rain.now", "arguments": "{}"}
    turns = [
        {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Rain in Bern?"}, both,
        {"role": "tool", "tool_call_id": "y", "content": "disliked"},
        {"role": "tool", "tool_call_id": "x", "content": "liked"}, {"role": "assistant", "content": "Noted."},
        {"role": "user", "content": "And what is 2 + 2?"}, {"role": "assistant", "content": "4"},
        {"role": "user", "content": "Rain in Rome?"},
    ]  # fmt: skip
    turns[-1:-1] = [message({"name": "rain.now", "arguments": {}}), {"role": "tool", "content": "used"}]
    entry = conversation(turns, WANTED.tools)
    found = [(item.query, item.call.name, item.verdict) for item in entry.history]
    asked = "Rain in Bern?"
    assert found == [(asked, "rain.now", DISLIKED), (asked, "sun.forecast", LIKED), ("", "rain.now", None)]
    assert [turn["content"] for turn in entry.turns] == ["Be kind.", "And what is 2 + 2?", "4"]
    assert entry.query == "Rain in Rome?"
    assert conversation(entry_messages(entry), WANTED.tools) == entry


def test_a_result_that_is_no_verdict_stays_in_the_conversation() -> None:
    turns = [*LINES["openai"]["messages"], {"role": "tool", "tool_call_id": "a", "content": "dry"}]
    entry = conversation(turns, WANTED.tools)
    assert (entry.history, entry.query) == ((), "")
    assert [turn["role"] for turn in entry.turns] == ["user", "assistant", "tool"]


def test_what_is_wrong_is_named_by_its_field() -> None:
    for change, named in (
        ({"messages": []}, "messages: expected a query"),
        ({"messages": [{"role": "user", "content": "x"}]}, "messages[0]: expected an assistant's answer"),
        ({"messages": [{"role": "robot", "content": "x"}, message(CALL)]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, message(CALL)]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": "x"}, message(CALL | {"arguments": "{"})]}, "arguments"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]}, "found neither"),
        ({"tools": [FORECAST, FORECAST]}, "tools[1]: expected tools of different names"),
        ({"tools": [{"function": {"name": "x", "parameters": "text"}}]}, "tools[0].function.parameters"),
        ({"tools": [{"function": {"name": "x", "parameters": {"properties": "y"}}}]}, "parameters.properties"),
        ({"tools": [{"function": {"name": None}}]}, "tools[0].function.name: expected the tool's name, found null"),
    ):
        with pytest.raises(Fault) as error:
            parse(LINES["openai"] | change, "0")
        assert named in str(error.value)


def test_several_calls_or_a_bad_answer_are_named_and_counted(tmp_path) -> None:
    twice = message(CALL) | {"tool_calls": message(CALL)["tool_calls"] * 2}
    ask = {"role": "user", "content": "x"}
    bad = {
        "expected one call, found 2": twice,
        "is not of type 'string'": message({"name": "sun.forecast", "arguments": {"city": 3}}),
        "offered 0 times": message({"name": "other", "arguments": {}}),
        "lacks the required city": message({"name": "sun.forecast", "arguments": {"days": 3}}),
        "gives sky": message({"name": "sun.forecast", "arguments": {"city": "x", "sky": 1}}),
    }
    rows = [LINES["openai"], *({"messages": [ask, answer], "tools": [FORECAST]} for answer in bad.values())]
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    found = load_dataset(str(path), skip_bad=True)
    assert (len(found.entries), found.total) == (1, 6)
    for said, wanted in zip(found.bad, bad, strict=True):
        assert wanted in said


def test_tool_lists_of_any_shape_of_mcp_and_of_xlam() -> None:
    for shape in (None, [], {}, {"type": "object"}, {"type": "object", "properties": None}, {"properties": []}):
        (tool,) = read_tools([{"function": {"name": "now", "description": None, "parameters": shape}}])
        assert (tool.description, value_faults(tool.parameters, {})) == ("", [])

    listed = {"jsonrpc": "2.0", "result": {"tools": [{"name": "a", "description": "b", "inputSchema": SCHEMA}]}}
    assert read_tools(listed) == (Tool("a", "b", SCHEMA),)
    flat = {"city": {"type": "str", "description": "where"}, "days": {"type": "int, optional", "default": 1}}
    (tool,) = read_tools([{"name": "a", "description": "", "parameters": flat, "provider": "Sun"}])
    assert (tool.parameters["required"], tool.provider) == (["city"], "Sun")
    assert value_faults(tool.parameters, {"city": "x", "days": "y"}) == ["days: 'y' is not of type 'integer'"]


def test_types_of_the_wild_are_understood() -> None:
    for wild, valid, invalid in (
        ({"type": "dict", "properties": {"a": {"type": "float"}}}, {"a": 1.5}, {"a": "x"}),
        ({"type": "STRING"}, "x", 3),
        ({"type": "List[str]"}, ["x"], [3]),
        ({"type": "array of integers"}, [3], ["x"]),
        ({"type": "string", "nullable": True}, None, 3),
        ({"type": ["int", "NoneType"]}, None, "x"),
        ({"anyOf": [{"type": "bool"}, {"type": "null"}]}, True, "x"),
        ({"type": "integer", "required": True}, 3, "x"),
        ({"enum": ["a", None], "type": ["string", "null"]}, None, "b"),
    ):
        assert value_faults(wild, valid) == []
        assert value_faults(wild, invalid)
        assert normal_schema(normal_schema(wild)) == normal_schema(wild)
        assert "cannot be read" in value_faults({"$ref": "#/$defs/nowhere"}, {})[0]


def test_providers_are_read_from_names_who_shares_a_prefix_is_one_and_a_declared_one_wins() -> None:
    for name in ("mcp__slack__post", "slack__post", "slack.post", "slack/post_it", "slack_post", "<a>.<slack>.<a b>"):
        assert namespace(name, {"slack"}) == "slack"
    assert [namespace(name, {"slack"}) for name in ("get_time", "now")] == ["get_time", "now"]

    tools = tuple(Tool(name, "", {}) for name in ("slack_post", "slack_read", "get_time", "now"))
    history = (Interaction("", Call("slack_post", {}), LIKED), Interaction("", Call("now", {}), DISLIKED))
    entry = Entry("0", "q", (*tools, Tool("x_y", "", {}, provider="slack")), history)
    assert providers(entry) == {
        "slack_post": "slack", "slack_read": "slack", "get_time": "get_time", "now": "now", "x_y": "slack",
    }  # fmt: skip
    assert [balance(entry, name) for name in ("slack_read", "x_y", "now", "get_time")] == [1, 1, -1, 0]


def test_equal_tools_are_those_of_the_same_words_or_unknown() -> None:
    tools = tuple(Tool(name, "", {}) for name in ("a.send_mail", "b.sendMail", "c.read"))
    entry = Entry("0", "q", tools, answer=Call("a.send_mail", {}))
    assert equal_tools(entry) == ("a.send_mail", "b.sendMail")
    assert equal_tools(Entry("0", "q", tools, answer=Call("c.read", {}))) is None
    assert answer_faults(Entry("0", "q", tools, answer="No tool fits.")) == []
