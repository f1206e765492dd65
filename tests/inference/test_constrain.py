"""The constraint lets through what training writes and nothing else, token by token, for both kinds of tokenizer."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from petool_lite.data.entries import Parameter, Tool, ToolCall
from petool_lite.data.files import load_dataset
from petool_lite.errors import PetoolError
from petool_lite.inference.constrain import Constrainer, Constraint, value_rule, written_default
from petool_lite.inference.llama import LlamaModel
from petool_lite.inference.parse import failure
from petool_lite.models import embedded_gguf
from petool_lite.prompt.render import Chat, chat_from_directory

REAL_LLAMA3 = Path(os.environ.get("LLAMA3_TOKENIZER", "no such folder"))  # holds the real tokenizer.json


def parameter(name: str, kind: str = "STRING", default: object = "") -> Parameter:
    return Parameter(name, kind, "", default)


def tool(name: str, required: tuple = (), optional: tuple = ()) -> Tool:
    return Tool(name, "", tuple(required), tuple(optional))


@pytest.fixture(scope="module")
def chat(smollm2) -> Chat:
    return chat_from_directory(smollm2.directory)


@pytest.fixture(scope="module")
def constrainer(smollm2, chat) -> Constrainer:
    return Constrainer.from_directory(smollm2.directory, chat.eos_id)


def walk(constraint: Constraint, ids: list[int]) -> str | None:
    """Feed `ids` as decoding would; None if all are accepted, forced ones exactly as they are, else what failed."""
    place = 0
    while place < len(ids):
        forced = constraint.forced()
        if forced and ids[place : place + len(forced)] != forced:
            return f"forced {forced}, the answer has {ids[place : place + len(forced)]}"
        step = forced or [ids[place]]
        try:
            constraint.accept(step)
        except PetoolError as error:
            return error.message
        place += len(step)
    return None if constraint.finished else "not finished"


def accepts(constrainer: Constrainer, chat: Chat, tools: list[Tool], text: str) -> bool:
    return walk(constrainer.start(tools), [*chat.encode(text), chat.eos_id]) is None


def misdeclared(entry) -> bool:
    """Whether the right answer itself has a value of another type than declared (and not the declared default)."""
    called = next(tool for tool in entry.prompt("rating").tools if tool.name == entry.gold.tool_name)
    found = {item.name: item for item in reversed(called.required + called.optional)}
    kinds = {"TEXT": str, "NUMBER": (int, float), "BOOLEAN": bool}
    return any(
        not isinstance(value, kinds[value_rule(found[name])]) and json.dumps(value) != written_default(found[name])
        for name, value in entry.gold.parameters.items()
    )


def test_every_right_answer_of_the_open_entries_passes_token_by_token(open_entries, constrainer, chat) -> None:
    """745 of 753; the other eight answer against their own declaration, such as 10 for a STRING."""
    refused, odd, forced = [], [], 0
    for entry in load_dataset(str(open_entries), "rating").entries:
        constraint = constrainer.start(entry.prompt("rating").tools)
        forced += len(constraint.forced())
        if walk(constraint, [*chat.encode(entry.gold.to_json()), chat.eos_id]) is not None:
            refused.append(entry.id)
        if misdeclared(entry):
            odd.append(entry.id)
    assert refused == odd
    assert len(refused) == 8
    assert forced >= 5 * 753  # {"tool_name": at the least


@pytest.mark.skipif(not REAL_LLAMA3.is_dir(), reason="no Llama-3 tokenizer on this machine")
def test_the_same_with_a_llama3_tokenizer(open_entries) -> None:
    from llguidance import LLTokenizer
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(REAL_LLAMA3 / "tokenizer.json"))
    constrainer = Constrainer(LLTokenizer((REAL_LLAMA3 / "tokenizer.json").read_text(), eos_token=128009))
    entries = load_dataset(str(open_entries), "rating").entries[:150]
    for entry in entries:
        ids = tokenizer.encode(entry.gold.to_json(), add_special_tokens=False).ids
        failed = walk(constrainer.start(entry.prompt("rating").tools), [*ids, 128009])
        assert (failed is not None) == misdeclared(entry), failed


def replies_by_chance(constrainer, chat, entries) -> list[str | None]:
    """What is wrong with replies whose every token is drawn at random from the allowed ones; None for valid calls."""
    random = np.random.default_rng(0)
    found = []
    for entry in entries:
        tools = entry.prompt("rating").tools
        constraint, ids = constrainer.start(tools), []
        while not constraint.finished and len(ids) < 20_000:
            step = constraint.forced()
            if not step:
                allowed = np.flatnonzero(np.unpackbits(constraint.bits(), bitorder="little"))
                step = [int(random.choice(allowed))]
            constraint.accept(step)
            ids += step
        found.append(failure(chat.decode(ids[:-1]), tools, "stop" if constraint.finished else "length"))
    return found


def test_even_chance_can_only_write_valid_calls(open_entries, constrainer, chat) -> None:
    """No model is needed to know what the constraint lets through; all 753 were tried once, here every 25th."""
    entries = load_dataset(str(open_entries), "rating").entries[::25]
    assert replies_by_chance(constrainer, chat, entries) == [None] * len(entries)


WEATHER = tool(
    "<Weather>.<Sky>.<now>",
    [parameter("city"), parameter("days", "NUMBER", "3")],
    [parameter("metric", "BOOLEAN", "true"), parameter("sort", "NUMBER", ""), parameter("tags", "ARRAY")],
)


@pytest.mark.parametrize(
    "parameters",
    [
        '"city": "Köln", "days": 3',
        '"days": 3, "city": ""',  # any order
        '"city": "a \\"quoted\\" \\\\ \\n tab\\t \\u0001 {}}} 👋", "days": -2.5',
        '"city": "x", "days": 1e-05, "metric": false',
        '"city": "x", "days": 1, "sort": ""',  # the declared default that is no number
        '"city": "x", "days": 1, "sort": 7, "tags": ["a", 1, [true], {"b": null}]',
    ],
)
def test_calls_in_the_declared_types_pass(constrainer, chat, parameters) -> None:
    text = f'{{"tool_name": "<Weather>.<Sky>.<now>", "parameters": {{{parameters}}}}}'
    assert ToolCall(**json.loads(text)).to_json() == text or "1e-05" in text
    assert accepts(constrainer, chat, [WEATHER], text)


@pytest.mark.parametrize(
    "text",
    [
        '{"tool_name": "<Weather>.<Sky>.<now>", "parameters": {"city": "x"}}',  # days is required
        '{"tool_name": "<Weather>.<Sky>.<now>", "parameters": {"city": "x", "days": "3"}}',
        '{"tool_name": "<Weather>.<Sky>.<now>", "parameters": {"city": "x", "days": 03}}',
        '{"tool_name": "<Weather>.<Sky>.<now>", "parameters": {"city": "x", "days": 3, "city": "y"}}',
        '{"tool_name": "<Weather>.<Sky>.<now>", "parameters": {"city": "x", "days": 3, "town": "y"}}',
        '{"tool_name": "<Weather>.<Sky>.<now>", "parameters": {"city": "x", "days": 3, "metric": "true"}}',
        '{"tool_name": "<Weather>.<Sky>.<now>", "parameters": {"city": "x\n", "days": 3}}',
        '{"tool_name":"<Weather>.<Sky>.<now>", "parameters": {"city": "x", "days": 3}}',
        '{"tool_name": "<Weather>.<Sky>.<then>", "parameters": {"city": "x", "days": 3}}',
        '{"tool_name": "<Weather>.<Sky>.<now>", "parameters": {"city": "x", "days": 3}} and',
        'Sure: {"tool_name": "<Weather>.<Sky>.<now>", "parameters": {"city": "x", "days": 3}}',
        "",
    ],
)
def test_everything_else_is_refused(constrainer, chat, text) -> None:
    assert not accepts(constrainer, chat, [WEATHER], text)


@pytest.mark.parametrize(
    "name",
    ['say "hi"', "a/b\\c", "{}}{", "👋🏽 naïve 日本", "tab\there", "%if a::_ | b", "'; #//", "\x01\x7f", " "],
)
def test_names_with_any_character_are_safe(constrainer, chat, name) -> None:
    odd = tool(name, [parameter(name + " key")], [parameter("plain")])
    call = ToolCall(name, {name + " key": name})
    ids = [*chat.encode(call.to_json()), chat.eos_id]
    assert walk(constrainer.start([odd, WEATHER]), ids) is None
    assert not accepts(constrainer, chat, [odd], ToolCall(name + "!", call.parameters).to_json())


def test_a_name_that_spells_a_special_token_is_written_as_plain_text(constrainer, chat) -> None:
    name = "a <|im_end|> b"
    constraint = constrainer.start([tool(name), tool("other")])
    written: list[int] = []
    logits = np.zeros(49152, dtype=np.float32)
    logits[chat.encode(' a <|im_end|> "')] = 1
    while not constraint.finished:
        step = constraint.forced() or [constraint.choose(logits)]
        constraint.accept(step)
        written += step
    assert chat.eos_id not in written[:-1]
    assert json.loads(chat.decode(written[:-1]))["tool_name"] == name


def test_what_cannot_be_built_is_an_error_and_never_a_free_reply(constrainer) -> None:
    with pytest.raises(PetoolError, match="no tool is offered"):
        constrainer.start([])
    with pytest.raises(PetoolError, match="not valid Unicode"):
        constrainer.start([tool("half \ud83d")])
    with pytest.raises(PetoolError, match="declares 65 parameters"):
        constrainer.start([tool("many", [parameter(f"p{index}") for index in range(65)])])


def test_a_parameter_declared_twice_is_written_once(constrainer, chat) -> None:
    twice = tool("t", [parameter("a"), parameter("a", "NUMBER")], [parameter("a")])
    assert accepts(constrainer, chat, [twice], '{"tool_name": "t", "parameters": {"a": "x"}}')
    assert not accepts(constrainer, chat, [twice], '{"tool_name": "t", "parameters": {"a": "x", "a": "x"}}')
    assert not accepts(constrainer, chat, [twice], '{"tool_name": "t", "parameters": {}}')


def test_a_tool_without_parameters_is_forced_whole(constrainer, chat) -> None:
    constraint = constrainer.start([tool("only")])
    ids = chat.encode('{"tool_name": "only", "parameters": {}}')
    assert constraint.forced() == ids
    constraint.accept(ids)
    assert constraint.forced() == [chat.eos_id]
    constraint.accept([chat.eos_id])
    assert (constraint.finished, constraint.forced()) == (True, [])


def test_the_tokenizer_of_a_gguf_and_of_its_directory_give_the_same_constraint(constrainer) -> None:
    with LlamaModel(embedded_gguf(), vocab_only=True) as model:
        one, other = model.constrainer().start([WEATHER]), constrainer.start([WEATHER])
        while not one.finished:
            assert one.forced() == other.forced()
            assert (one.bits() == other.bits()).all()
            step = one.forced() or [int((one.bits() != 0).argmax()) * 8 + _lowest_bit(one)]
            one.accept(step)
            other.accept(step)


def _lowest_bit(constraint: Constraint) -> int:
    byte = int(constraint.bits()[(constraint.bits() != 0).argmax()])
    return (byte & -byte).bit_length() - 1


@pytest.mark.slow
def test_llama_cpp_replies_are_valid_calls_even_from_an_untrained_model(open_entries) -> None:
    entries = load_dataset(str(open_entries), "rating", limit=1).entries
    with LlamaModel(embedded_gguf(), n_ctx=1024) as model:
        maker = model.constrainer()
        for entry in entries:
            tools = entry.prompt("rating").tools
            reply = model.generate(model.encode(f"Query: {entry.query}\nCall: "), 400, maker.start(tools))
            call = ToolCall(**json.loads(reply.text))
            assert call.to_json() == reply.text
            called = next(item for item in tools if item.name == call.tool_name)
            assert {item.name for item in called.required} <= set(call.parameters)
            assert reply.forced_tokens > 10
            assert reply.finish == "stop"
