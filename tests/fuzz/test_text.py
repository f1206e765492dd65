"""Recipes, entries, replies, grammars and templates of any content: taken, or refused by a PetoolError."""

import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support_fuzz import cases, deep, scalar, text, value

from petool_lite.data.entries import Parameter, Tool, parse_entry
from petool_lite.data.files import load_dataset
from petool_lite.errors import PetoolError
from petool_lite.inference.constrain import Constrainer
from petool_lite.inference.parse import CallFailure, parse_call
from petool_lite.inference.request import request_entry, tools_from_openai
from petool_lite.prompt.render import Chat, Layout, prompt_ids, render
from petool_lite.recipe import load_recipe, settings, to_toml
from petool_lite.scorer import published_call, score_reply

KEYS = [name for name, _, _, _ in settings()]
PLAIN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
CHAT = Chat(lambda texts: [[ord(letter) for letter in item] for item in texts], PLAIN, "<s>", "</s>", 2)


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("recipe") / "any.toml"


def toml_text(draw_value: object) -> str:
    return json.dumps(draw_value) if not isinstance(draw_value, float) else repr(draw_value)


lines = st.one_of(
    st.builds(lambda key, item: f"{key} = {toml_text(item)}", st.sampled_from([k.split(".")[1] for k in KEYS]), scalar),
    st.sampled_from(["[model]", "[data]", "[train]", "[lora]", "[bench]", "[odd]", "[[train]]"]),
    text,
)


@cases(300)
@given(
    raw=st.one_of(
        st.lists(lines, max_size=8).map("\n".join).map(lambda t: t.encode("utf-8", "surrogatepass")),
        st.binary(max_size=200),
    )
)
@example(raw=b"a = " + b"[" * 5000)
@example(raw=b"\xff\xfe")
def test_any_recipe_is_read_or_refused(recipe_file, raw) -> None:
    recipe_file.write_bytes(raw)
    try:
        _, recipe = load_recipe(str(recipe_file))
    except PetoolError:
        return
    recipe_file.write_text(to_toml(recipe))
    assert load_recipe(str(recipe_file))[1] == recipe, "what is written into the run reads back as it was"


@cases(300)
@given(key=st.one_of(st.sampled_from(KEYS), text), raw=text)
def test_any_override_is_taken_or_refused(recipe_file, key, raw) -> None:
    try:
        _, recipe = load_recipe("demo", [f"{key}={raw}"])
    except PetoolError:
        return
    recipe_file.write_text(to_toml(recipe), encoding="utf-8")
    assert load_recipe(str(recipe_file))[1] == recipe


calls = st.fixed_dictionaries({}, optional={"tool_name": scalar, "parameters": value})
history = st.lists(
    st.one_of(value, st.fixed_dictionaries({}, optional={"instruction": scalar, "tool_call": calls, "rating": scalar})),
    max_size=3,
)
parameter = st.one_of(scalar, st.fixed_dictionaries({}, optional={"name": scalar, "type": scalar, "default": value}))
tool = st.one_of(
    value,
    st.fixed_dictionaries(
        {
            "tool_name": text,
            "required_parameters": st.lists(parameter, max_size=3),
            "optional_parameters": st.lists(parameter, max_size=2),
        }
    ),
)
prompt = st.one_of(
    text,
    st.builds(
        lambda a, h, b, t: f"{a}{json.dumps(h)}{b}{json.dumps(t)}", text, history, text, st.lists(tool, max_size=3)
    ),
)
entry = st.one_of(
    value,
    st.fixed_dictionaries(
        {},
        optional={
            "query": scalar,
            "input": scalar,
            "instruction": prompt,
            "output": st.one_of(scalar, calls.map(json.dumps)),
            "chosen": scalar,
            "rejected": scalar,
            "instruction_ratings": prompt,
            "api_call_ground_truth": calls,
            "apis_same_func": value,
            "func": scalar,
            "entry_id": scalar,
        },
    ),
)


def use(found) -> None:
    """What training and scoring do with an entry that was read."""
    for style in ("published", "compact"):
        prompt_ids(CHAT, found, Layout("rating", style, 4096))
    if found.gold is not None:
        json.loads(found.gold.to_json())


@cases(500)
@given(row=entry)
@example(row={"query": "q", "instruction_ratings": "[" * 20000})
@example(row={"query": "q", "instruction_ratings": "[1," * 20000})
def test_any_entry_is_parsed_or_refused(row) -> None:
    try:
        found = parse_entry(row, "rating", "the file", 0)
        use(found)
    except PetoolError:
        return


def test_a_call_that_could_not_be_written_again_is_refused() -> None:
    row = {"query": "q", "instruction_ratings": "[] []", "api_call_ground_truth": {"tool_name": "a", "parameters": {}}}
    row["api_call_ground_truth"]["parameters"]["x"] = deep(900)
    with pytest.raises(PetoolError):
        parse_entry(row, "rating", "the file", 0)


@pytest.fixture(scope="module")
def data_file(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data") / "any.json"


@cases(200)
@given(
    raw=st.one_of(
        st.binary(max_size=300),
        value.map(json.dumps).map(str.encode),
        st.lists(entry, max_size=3).map(json.dumps).map(str.encode),
    )
)
@example(raw=b"[" * 100_000)
@example(raw=b'{"a":' * 100_000)
@example(raw=b"PK\x05\x06" + b"\0" * 18)
def test_any_data_file_is_read_or_refused(data_file, raw) -> None:
    data_file.write_bytes(raw)
    try:
        load_dataset(str(data_file), "rating")
    except PetoolError:
        return


requests = st.one_of(value, st.lists(tool, max_size=3))


@cases(300)
@given(query=st.text(max_size=30), tools=requests, past=st.one_of(value, history))
def test_any_request_makes_an_entry_or_is_refused(query, tools, past) -> None:
    try:
        use(request_entry(query, tools, past, "rating"))
    except PetoolError:
        return


schema = st.one_of(
    value,
    st.fixed_dictionaries(
        {},
        optional={
            "properties": st.dictionaries(
                text,
                st.one_of(value, st.fixed_dictionaries({}, optional={"type": value, "enum": value, "default": value})),
                max_size=3,
            ),
            "required": value,
        },
    ),
)
function = st.one_of(
    value, st.fixed_dictionaries({"name": text}, optional={"description": value, "parameters": schema})
)


@cases(300)
@given(tools=st.lists(st.one_of(value, st.fixed_dictionaries({"function": function})), max_size=3))
def test_any_openai_tools_are_taken_or_refused(tools) -> None:
    try:
        request_entry("q", tools_from_openai(tools), [], "rating")
    except PetoolError:
        return


TOOLS = (Tool("a.b.c", "", (Parameter("x", "STRING", "", ""),), (Parameter("y", "NUMBER", "", ""),)),)
pieces = st.sampled_from(
    ['{"tool_name": "', "a.b.c", '", "parameters": {', '"x": "', '"', "}}", "{", "}", ", ", "\n", "1"]
)
reply = st.one_of(text, value.map(json.dumps), st.lists(st.one_of(pieces, text), max_size=20).map("".join))


@cases(600)
@given(said=reply, finish=st.sampled_from(["stop", "length"]))
@example(said='{"a":' * 100_000, finish="stop")
@example(said='{"tool_name": "a.b.c", "parameters": ' + "9" * 5000, finish="stop")
def test_any_reply_is_a_call_or_a_named_failure(said, finish) -> None:
    try:
        call = parse_call(said, TOOLS, finish)
        assert "x" in call.parameters
    except CallFailure as failure:
        assert failure.kind
        assert failure.reply == said


@cases(600)
@given(said=reply)
@example(said='{"tool_name": "a' * 150)
def test_any_reply_can_be_scored(said) -> None:
    found = published_call(said)
    right = score_reply(said, {"tool_name": "a.b.c", "parameters": {"x": ""}})
    assert found is not None or right == (False, False)


parameters = st.lists(
    st.builds(Parameter, text, st.one_of(text, st.sampled_from(["NUMBER", "ARRAY", "BOOLEAN"])), text, value),
    max_size=5,
)
offered = st.lists(st.builds(lambda n, r, o: Tool(n, "", tuple(r), tuple(o)), text, parameters, parameters), max_size=3)


@pytest.fixture(scope="module")
def constrainer(smollm2) -> Constrainer:
    return Constrainer.from_directory(smollm2.directory, 2)


@cases(150)
@given(tools=offered)
def test_any_tools_make_a_grammar_or_are_refused(constrainer, tools) -> None:
    try:
        constraint = constrainer.start(tools)
        for _ in range(3):
            forced = constraint.forced()
            if not forced or constraint.finished:
                break
            constraint.accept(forced)
    except PetoolError:
        return


parts = st.sampled_from(
    [
        "{{ ",
        " }}",
        "{% ",
        " %}",
        "for m in messages",
        "endfor",
        "m.content",
        "messages[0]",
        "range(99999)",
        "* 99999999",
    ]
    + [
        "set x = x ~ x",
        "set x = 'a'",
        "x",
        "if x",
        "endif",
        "macro f()",
        "endmacro",
        "f()",
        "loop(messages)",
        "''.__class__",
    ]
    + [
        "|center(999999999)",
        "|join",
        "|tojson",
        "'%099999999d' % 1",
        "** 99",
        "namespace()",
        "raise_exception('no')",
        "[",
        "]",
    ]
)


@cases(300)
@given(template=st.one_of(text, st.lists(st.one_of(parts, text), max_size=12).map(" ".join)))
def test_any_template_renders_or_is_refused(template) -> None:
    chat = Chat(CHAT.encode_batch, template, "<s>", "</s>", 2)
    try:
        render(chat, [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}])
    except PetoolError:
        return
