"""Calls with a real model: every form of a request, the user's memory, failures with names, the command line."""

import json
from contextlib import ExitStack
from dataclasses import replace

import pytest
from support_published import published_rows

from petool_lite import ToolCaller
from petool_lite.data import petoolbench
from petool_lite.data.entries import Call
from petool_lite.errors import PetoolError
from petool_lite.inference.call import AUTO, NONE, REQUIRED, CallOptions
from petool_lite.inference.llama import LlamaModel
from petool_lite.inference.parse import CallFailure
from petool_lite.inference.request import request_entry, row_entry
from petool_lite.inference.states import StateStore
from petool_lite.models import embedded_gguf

ROW = published_rows("test", 1)[0]
ENTRY = row_entry(ROW, "rating")
QUERY, TOOLS = ENTRY.query, [petoolbench.published_tool(tool) for tool in ENTRY.tools]
HISTORY = [petoolbench.interaction_row(item, rated=True) for item in ENTRY.history] * 2
WEATHER = {"type": "object", "properties": {"city": {"type": "str"}}, "required": ["city"]}
OPENAI = [{"type": "function", "function": {"name": "sky.now", "description": "weather", "parameters": WEATHER}}]
MCP = {"tools": [{"name": "sky.now", "description": "weather", "inputSchema": WEATHER}]}
USED = {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "sky.now", "arguments": "{}"}}]}
TURNS = [{"role": "user", "content": "Rain?"}, USED, {"role": "tool", "tool_call_id": "1", "content": "disliked"}]


@pytest.fixture
def fresh(tmp_path):
    """A caller in which nothing has been read yet."""
    with ExitStack() as callers:
        yield lambda n_ctx=2048: callers.enter_context(ToolCaller(embedded_gguf(), n_ctx, store=StateStore(tmp_path)))


@pytest.fixture
def recorded(monkeypatch):
    """Lets every model that is opened have these facts in its file."""
    read, facts = LlamaModel._read_metadata, {}
    monkeypatch.setattr(LlamaModel, "_read_metadata", lambda model: read(model) | facts)
    return lambda **more: facts.update({f"petool_lite.{name}": value for name, value in more.items()})


@pytest.mark.parametrize("tools", [OPENAI, MCP, {"result": MCP}], ids=["openai", "mcp", "mcp result"])
def test_tools_and_history_in_anybodys_form(fresh, tools) -> None:
    reply = fresh().call("How is the weather in Oslo?", tools, TURNS, options=CallOptions(explain=True))
    assert (reply.answer.name, list(reply.answer.arguments)) == ("sky.now", ["city"])
    assert (reply.candidates[0].disliked, reply.candidates[0].calls[0]["query"]) == (1, "Rain?")
    assert reply.notes == ('the tool sky.now: parameters.properties.city.type: "str" is read as string',)


def test_a_request_of_published_rows_or_of_an_openai_line_is_the_same_entry() -> None:
    training = {"instruction": ROW["instruction_ratings"], "input": QUERY, "output": "{}"}
    assert row_entry(training) == replace(ENTRY, function=None, equal_tools=None)
    assert row_entry({**training, "instruction": ROW["instruction_chronological"]}).setting == "preferred"
    assert row_entry({"query": QUERY, "tools": TOOLS, "history": HISTORY[:3]}).history == ENTRY.history
    line = {"messages": [*TURNS, {"role": "user", "content": "Oslo?"}], "tools": OPENAI}
    assert row_entry(line) == request_entry("Oslo?", OPENAI, TURNS)
    answered = [*line["messages"], {"role": "assistant", "content": "No tool fits."}]
    assert row_entry({**line, "messages": answered}) == row_entry(line)


def test_a_prompt_longer_than_the_context_is_refused_with_the_numbers_or_trimmed(fresh) -> None:
    caller, short = fresh(n_ctx=512), CallOptions(reply_tokens=64)
    with pytest.raises(PetoolError, match=r"[\d,]+ prompt tokens and 64 for the reply exceed the context of 512 even"):
        caller.call("a word " * 300, TOOLS, options=short)
    call = {"tool_name": TOOLS[0]["tool_name"], "parameters": {}}
    calls = [{"instruction": "x", "tool_call": call, "rating": 1}] * 20
    with pytest.raises(PetoolError, match=r"exceed the context of 512$"):
        caller.call("a word " * 40, TOOLS, calls, options=short)
    reply = caller.call("a word " * 40, TOOLS, calls, options=replace(short, trim_history=True))
    assert 0 < reply.history_dropped < 20
    assert reply.reply.prompt_tokens <= 512 - 64


def test_an_unsure_call_becomes_a_question_that_names_the_candidates(fresh) -> None:
    caller = fresh()

    def ask(**options):
        return caller.call(QUERY, TOOLS, HISTORY, options=CallOptions(**options))

    reply, sure, unsure = ask(explain=True), ask(at_least=0.01), ask(at_least=0.9999)
    assert sum(item.probability for item in reply.candidates) == pytest.approx(1)
    assert {item.name for item in reply.candidates} == {tool["tool_name"] for tool in TOOLS}
    assert (reply.status, 0 < reply.confidence < 1, ask().candidates) == ("call", True, ())
    assert (sure.status, unsure.status, unsure.answer) == ("call", "ask", reply.answer)
    assert str(unsure.candidates[0].name) in unsure.question
    with pytest.raises(PetoolError, match="free"):
        ask(decoding="free", at_least=0.5)


def test_a_temperature_in_the_file_calibrates_what_is_told(fresh, recorded) -> None:
    raw = fresh().call(QUERY, TOOLS, HISTORY, options=CallOptions(explain=True))
    recorded(temperature="2.0")
    mild = fresh().call(QUERY, TOOLS, HISTORY, options=CallOptions(explain=True))
    odds = [reply.confidence / (1 - reply.confidence) for reply in (raw, mild)]
    assert odds[1] == pytest.approx(odds[0] ** 0.5, rel=0.05)
    assert mild.reply.confidence == pytest.approx(raw.reply.confidence, rel=0.02), "what bench counts stays as it was"
    assert sum(item.probability for item in mild.candidates) == pytest.approx(1)


def test_an_engine_that_fails_is_no_answer(fresh, monkeypatch) -> None:
    monkeypatch.setattr((caller := fresh())._model._lib, "llama_decode", lambda *_: -3)
    with pytest.raises(CallFailure) as engine:
        caller.call(QUERY, TOOLS, HISTORY)
    assert engine.value.kind == "engine_error"


def test_a_model_of_the_published_style_gets_its_prompt_from_the_wording_in_its_file(fresh, recorded) -> None:
    pieces = ENTRY.published
    recorded(prompt_style="published", setting="rating")
    with pytest.raises(PetoolError, match="does not record the wording"):
        fresh().call(QUERY, OPENAI)
    recorded(wording=json.dumps({"rating": [pieces.head, pieces.middle, pieces.tail]}))
    caller, asked = fresh(), []
    caller._prompt = lambda entry, options: asked.append(entry) or 1 / 0
    for request in (lambda: caller.call_entry(ENTRY), lambda: caller.call(QUERY, TOOLS, HISTORY[:3])):
        with pytest.raises(ZeroDivisionError):
            request()
    texts = [petoolbench.prompt_of(entry.published) for entry in asked]
    assert texts[0] == ROW["instruction_ratings"]
    assert row_entry({"instruction": texts[1], "input": QUERY}, "rating") == asked[1]
    with pytest.raises(PetoolError, match="tool_choice none"):
        caller.call(QUERY, OPENAI, options=CallOptions(choice=NONE))


def test_a_model_that_learned_to_decline_may_and_another_may_not(fresh, recorded) -> None:
    """The base here was taught neither: held to calls it calls, and where a text is let through it writes one."""
    hello = "Hello, who are you?"
    assert isinstance(fresh().call(hello, OPENAI).answer, Call)
    recorded(prompt_style="petool", prompt_layout="1")
    caller = fresh()
    for choice, kind in ((AUTO, str), (NONE, str), (REQUIRED, Call)):
        answer = caller.call(hello, OPENAI, options=CallOptions(choice=choice, reply_tokens=120)).answer
        assert isinstance(answer, kind)


def test_call_on_the_command_line(command, tmp_path) -> None:
    (tmp_path / "tools.json").write_text("\ufeff" + json.dumps(TOOLS), encoding="utf-8")
    (tmp_path / "history.json").write_text(json.dumps(HISTORY))
    line = ["call", "--model", embedded_gguf(), "--tools", "tools.json", "--history", "history.json", QUERY]
    plain = command(*line, "--explain", cwd=tmp_path)
    assert plain.returncode == 0, plain.stderr
    assert json.loads(plain.stdout)["name"] in plain.stderr
    assert "liked" in plain.stderr
    request = json.dumps({"query": QUERY, "tools": TOOLS, "history": HISTORY})
    ask = ["call", "--model", embedded_gguf(), "--request", "-", "--json"]
    whole = command(*ask, cwd=tmp_path, input=request, inline=True)
    document = json.loads(whole.stdout.splitlines()[-1])
    assert (document["status"], document["call"]) == ("call", json.loads(plain.stdout))
    assert document["timings"]["prompt_tokens"] > 150
    free = command(*line, "--decoding", "free", "--reply-tokens", "20", "--json", cwd=tmp_path, inline=True)
    assert (free.returncode, "failure" in json.loads(free.stdout)) == (1, True)
