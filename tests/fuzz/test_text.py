"""Recipes, entries, tools, replies, grammars and templates of any content: taken, or refused by a PetoolError."""

import json
from contextlib import suppress
from dataclasses import replace

from hypothesis import example, given
from hypothesis import strategies as st
from support_fuzz import cases, deep, scalar, some, text, value

from petool_lite.data.answers import answer_faults
from petool_lite.data.entries import Entry, Tool
from petool_lite.data.fields import Fault
from petool_lite.data.files import load_dataset
from petool_lite.data.openai import entry_line, parse, read_tools
from petool_lite.errors import PetoolError
from petool_lite.inference.parse import CallFailure, parse_call
from petool_lite.prompt.render import Chat, Layout, prompt_ids, render_messages
from petool_lite.recipe import load_recipe, settings, to_toml

PLAIN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
CHAT = Chat(lambda texts: [[ord(letter) for letter in item] for item in texts], PLAIN, "<s>", "</s>", 2)
KEYS = st.sampled_from([name for name, *_ in settings()])
recipes = st.lists(st.one_of(text, st.builds("{} = {}".format, KEYS, scalar.map(json.dumps))), max_size=6)
TYPES = ["object", "array", "string", "dict", "number", "int", ["string", "null"]]
called = st.fixed_dictionaries({"name": text, "arguments": st.one_of(value, value.map(json.dumps), text)})
turn = st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "tool"]), "value": text})
TOOLS = (Tool("a.b.c", "", {"type": "object", "properties": {"x": {"type": "string"}, "y": {}}, "required": ["x"]}),)
pieces = st.sampled_from(
    ['{"tool_name": "', '<tool_call>\n{"name": "', "a.b.c", '", "parameters": {', '", "arguments": {', '"x": "', '"']
    + ["}}", "{", "}", ", ", "\n", "\n</tool_call>", "1", "No tool fits."]
)
reply = st.one_of(text, value.map(json.dumps), st.lists(st.one_of(pieces, text), max_size=20).map("".join))
BLOCKS = [
    *("{{ ", " }}", "{% ", " %}", "for m in messages", "endfor", "m.content", "messages[0]", "range(99999)", "** 99"),
    *("set x = x ~ x", "set x = 'a'", "x", "if x", "endif", "macro f()", "endmacro", "f()", "loop(messages)"),
    *("''.__class__", "|center(999999999)", "|join", "|tojson", "'%099999999d' % 1", "namespace()", "[", "]"),
    *("raise_exception('no')", "{% generation %}", "{% endgeneration %}", "* 99999999"),
]


@cases(300)
@given(raw=st.one_of(st.binary(max_size=200), recipes.map(lambda lines: "\n".join(lines).encode("utf-8", "replace"))))
@example(raw=b"a = " + b"[" * 5000)
def test_any_recipe_is_read_or_refused(tmp_path, raw) -> None:
    file = tmp_path / "any.toml"
    file.write_bytes(raw)
    try:
        recipe = load_recipe(str(file))[1]
    except PetoolError:
        return
    file.write_text(to_toml(recipe))
    assert load_recipe(str(file))[1] == recipe, "what is written into the run reads back as it was"


def lists(size: int, *items: st.SearchStrategy) -> st.SearchStrategy[list]:
    return st.lists(st.one_of(*items), max_size=size)


calls = some(tool_name=scalar, parameters=value)
past = some(instruction=scalar, tool_call=calls, rating=scalar)
parameter = st.one_of(scalar, some(name=scalar, type=scalar, default=value))
published_tool = st.fixed_dictionaries(
    {"tool_name": text, "required_parameters": lists(3, parameter)},
    optional={"optional_parameters": lists(2, parameter), "tool_description": scalar},
)
prompts = [text, lists(3, value, past).map(json.dumps), text, lists(3, value, published_tool).map(json.dumps)]
prompt = st.one_of(text, st.tuples(*prompts).map("".join))
schema = st.recursive(
    st.one_of(value, some(type=scalar, enum=value, default=value)),
    lambda inner: some(
        type=st.sampled_from(TYPES), properties=st.one_of(value, st.dictionaries(text, inner, max_size=3)),
        required=st.one_of(value, lists(2, text)), items=inner, anyOf=lists(2, inner), minimum=scalar, pattern=text,
        additionalProperties=inner, **{"$ref": st.sampled_from(["#", "#/$defs/a", "#/properties/a", "http://x"])},
    ),
    max_leaves=5,
)  # fmt: skip
function = st.fixed_dictionaries(
    {"name": text}, optional={"description": scalar, "parameters": schema, "provider": scalar}
)
tools = lists(3, value, published_tool, function, st.fixed_dictionaries({"type": text, "function": function}))
made = lists(2, st.fixed_dictionaries({"function": called}, optional={"id": text}))
role = st.sampled_from(["system", "user", "assistant", "tool", "odd"])
content = st.one_of(scalar, st.sampled_from(["liked", "disliked", "used"]), value)
more = {"content": content, "tool_calls": st.one_of(value, made), "tool_call_id": scalar}
message = st.fixed_dictionaries({"role": role}, optional=more)
messages = lists(6, message, value)
row = st.one_of(
    value,
    some(
        query=scalar, input=scalar, instruction=prompt, output=st.one_of(scalar, calls.map(json.dumps)),
        rejected=scalar, instruction_ratings=prompt, api_call_ground_truth=calls, apis_same_func=value, func=scalar,
        entry_id=scalar,
    ),
    st.fixed_dictionaries({"messages": messages, "tools": st.one_of(tools, tools.map(json.dumps))}),
    st.builds(dict, query=scalar, tools=tools.map(json.dumps), answers=st.lists(called).map(json.dumps)),
    st.fixed_dictionaries({"conversations": st.lists(turn)}, optional={"tools": tools}),
)  # fmt: skip


def use(found: Entry) -> None:
    """What training and scoring do with an entry that was read."""
    for style in ("published", "petool"):
        if style == "petool" or found.published:
            prompt_ids(CHAT, found, Layout(style, 4096))
    if found.answer is not None and found.published is None:
        assert parse(json.loads(json.dumps(entry_line(found))), found.id) == replace(found, function=None)


def line(schema: object, value: object) -> dict:
    made = [{"function": {"name": "t", "arguments": {"a": value}}}]
    told = [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": made}]
    return {"messages": told, "tools": [{"name": "t", "parameters": {"properties": {"a": schema}}}]}


ANSWER = {"role": "assistant", "content": "No tool fits."}


def spoken(text: str) -> dict:
    return {"conversations": [{"from": "system", "value": text}, {"from": "gpt", "value": text}]}


@cases(800)
@given(found=row)
@example(found=line({"type": "string", "pattern": "^(a+)+$"}, "a" * 40 + "!"))
@example(found=line({"type": "string", "pattern": "((("}, "a"))
@example(found=spoken("<tool_call>" * 100_000))
@example(found=spoken("<tools>" * 100_000))
@example(found={"messages": [{"role": "user", "content": text} for text in ("a", "")] + [ANSWER], "tools": []})
@example(found=spoken("<tool_call>{" + " " * 300_000 + "x</tool_call>"))
@example(found={"query": "q", "instruction_ratings": "[" * 20000})
@example(found={"query": "q", "instruction_ratings": "[1," * 20000})
@example(found={"query": "q", "instruction_ratings": "[] []", "api_call_ground_truth": deep(400)})
def test_any_entry_is_read_and_rendered_or_refused(tmp_path, found) -> None:
    file = tmp_path / "any.json"
    file.write_text(json.dumps([found]))
    with suppress(PetoolError):
        for entry in load_dataset(str(file)).entries:
            answer_faults(entry)
            use(entry)


@cases(600)
@given(said=reply, finish=st.sampled_from(["stop", "length"]), style=st.sampled_from(["petool", "published"]))
@example(said='{"a":' * 100_000, finish="stop", style="published")
@example(said='<tool_call>\n{"name": "a.b.c", "arguments": ' + "9" * 5000, finish="stop", style="petool")
def test_any_reply_is_a_call_no_call_or_a_named_failure(said, finish, style) -> None:
    try:
        parse_call(said, TOOLS, finish, style == "petool")
    except CallFailure as failure:
        assert failure.kind
        assert failure.reply == said


def doubling(word: str, levels: int = 40) -> dict:
    """A schema whose references lead twice to each next one."""
    found = {f"d{level}": {word: [{"$ref": f"#/$defs/d{level + 1}"}] * 2} for level in range(levels)}
    return {"properties": {"a": {"$ref": "#/$defs/d0"}}, "$defs": found | {f"d{levels}": {"type": "string"}}}


JOINED = [{"type": "string", "pattern": f"(a|b)*a(a|b){{{n}}}"} for n in range(16)]
CHAIN = {f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(3000)} | {"d3000": {}}


@cases(150)
@given(offered=tools)
@example(offered=[{"name": "t", "parameters": doubling("allOf")}])
@example(offered=[{"name": "t", "parameters": doubling("anyOf")}])
@example(offered=[{"name": "t", "parameters": {"allOf": [{"$ref": "#"}], "properties": {"a": {"$ref": "#"}}}}])
@example(offered=[{"name": "t", "parameters": {"properties": {"a": {"allOf": JOINED}}}}])
@example(offered=[{"name": "t", "parameters": {"properties": {"a": {"$ref": "#/$defs/d0"}}, "$defs": CHAIN}}])
def test_any_tools_make_a_grammar_or_are_refused(constrainer, offered) -> None:
    with suppress(Fault, PetoolError):
        constraint = constrainer.start(read_tools(offered), "petool", True)
        for _ in range(3):
            forced = constraint.forced()
            if not forced or constraint.finished:
                break
            constraint.accept(forced)


@cases(300)
@given(template=st.one_of(text, st.lists(st.one_of(st.sampled_from(BLOCKS), text), max_size=12).map(" ".join)))
def test_any_template_renders_or_is_refused(template) -> None:
    chat = replace(CHAT, template=template)
    with suppress(PetoolError):
        render_messages(chat, [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}])
