"""What a request may say and what it may not, and how a reply is cut into pieces, without a server."""

import json

import pytest
from support_serve import ASK, SCHEMA

from petool_lite.inference.worker import Pieces
from petool_lite.serve.requests import Refusal, read_chat, read_responses

TOOLS = [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in ("weather", "hotel", "car")]
NAMED = {"type": "function", "function": {"name": "car"}}
CHOICES = [
    (None, ("auto", None)),
    ("required", ("required", None)),
    ("none", ("none", None)),
    (NAMED, ("required", ("car",))),
    ({"type": "function", "name": "car"}, ("required", ("car",))),
    ({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}}, ("auto", ("car",))),
    ({"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "car"}]},
     ("required", ("car",))),
]  # fmt: skip
NO_CHOICES = [
    "any", {}, 7, ["car"], {"type": "tool", "name": "car"}, {"type": "function", "function": {"name": "fly"}},
    {"type": "allowed_tools", "mode": "auto", "tools": []}, {"type": "allowed_tools", "mode": "some", "tools": [NAMED]},
]  # fmt: skip
REFUSED = [
    ("max_tokens", 0), ("max_tokens", "64"), ("max_tokens", True), ("max_completion_tokens", -2), ("n", 2),
    ("at_least", 2), ("stream", "yes"), ("stream_options", []), ("user", ["a"]), ("history", [{}]),
    ("logprobs", True),
    ("response_format", {"type": "json_object"}), ("functions", [{}]), ("modalities", ["audio"]), ("messages", []),
    ("tools", []), ("tools", {"a": 1}), ("tools", [{"type": "web_search"}]), ("tools", [TOOLS[0], TOOLS[0]]),
]  # fmt: skip


def chat(**more):
    return read_chat({"messages": ASK, "tools": TOOLS, **more})


def test_every_documented_choice_is_read_a_refusal_names_the_field_and_the_rest_changes_nothing() -> None:
    for choice, wanted in CHOICES:
        asked = chat(tool_choice=choice).request.options
        assert (asked.choice, asked.only) == wanted
    for choice in NO_CHOICES:
        with pytest.raises(Refusal, match=r"^tool_choice") as caught:
            chat(tool_choice=choice)
        assert (caught.value.status, caught.value.body["error"]["param"]) == (400, "tool_choice")

    for name, value in REFUSED:
        with pytest.raises(Refusal, match=f"^{name}") as caught:
            chat(**{name: value})
        assert caught.value.body["error"]["param"] == name

    limits = [chat(max_tokens=value).request.options.reply_tokens for value in (None, -1, 64, 64.0)]
    assert limits == [512, None, 64, 64]
    assert chat(max_tokens=5, max_completion_tokens=7).request.options.reply_tokens == 7
    assert chat(temperature=0.5, stop=["}"], n=1.0, store=False).unused == ("temperature", "stop", "store")


def test_responses_say_the_same_in_their_own_words() -> None:
    flat = [{"type": "function", **tool["function"]} for tool in TOOLS]
    plain = read_responses({"input": ASK[0]["content"], "tools": flat, "max_output_tokens": 9, "store": True})
    assert plain.request.entry == chat().request.entry
    assert (plain.request.options.reply_tokens, plain.unused) == (9, ("store",))
    for name, value in (("input", None), ("input", [{"type": "computer_call"}]), ("previous_response_id", "resp_1"),
                        ("text", {"format": {"type": "json_schema"}}), ("instructions", 3)):  # fmt: skip
        with pytest.raises(Refusal, match=f"^{name}"):
            read_responses({"input": "x", "tools": flat, name: value})


@pytest.mark.parametrize("form", ['<tool_call>\n{"name": %s, "arguments": %s}\n</tool_call>',
                                  '{"tool_name": %s, "parameters": %s}'])  # fmt: skip
def test_a_reply_is_cut_into_name_and_arguments_wherever_its_tokens_end(form) -> None:
    name, arguments = 'odd", "arguments": {"x": "y"}', {"a": ', "parameters": ', "b": {"c": "日本 👋}"}}
    dumped = [json.dumps(value, ensure_ascii=False) for value in (name, arguments)]
    raw = (form % tuple(dumped)).encode()
    for step in (1, 2, 7, 1000):
        pieces = Pieces()
        ends = [*range(step, len(raw), step), len(raw)]
        found = [piece for end in ends for piece in pieces.grown(raw[:end].decode("utf-8", "replace"))]
        found += pieces.grown(raw.decode(), whole=True)
        assert found[0] == {"name": name}
        assert "".join(piece["arguments"] for piece in found[1:]) == dumped[1]
