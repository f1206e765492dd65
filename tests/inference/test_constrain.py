"""The constraint lets through what training writes and nothing else, token by token, for both kinds of tokenizer."""

import numpy as np
import pytest

from petool_lite.data.entries import Call, Tool
from petool_lite.data.files import load_dataset
from petool_lite.errors import PetoolError
from petool_lite.inference.constrain import Constrainer, Constraint
from petool_lite.prompt.render import Chat, answer_text, chat_from_directory

CALL = '<tool_call>\n{"name": "<Weather>.<Sky>.<now>", "arguments": {"city": "x", "days": 3}}\n</tool_call>'
BROKEN = [
    (', "days": 3', ""), ("3}", '"3"}'), ("3}", "03}"), ("3}", '3, "city": "y"}'), ("3}", '3, "town": "y"}'),
    ("x", "x\n"), ('"name": ', '"name":'), ("<now>", "<then>"), ("</tool_call>", "</tool_call> and"),
    ("<tool_call>\n", ""), (CALL, ""),
]  # fmt: skip
ODD = ['say "hi"', "a/b\\c", "{}}{", "👋🏽 naïve 日本", "tab\there", "%if a::_ | b", "'; #//", "\x01\x7f", " ", "<[7]>"]


def tool(name: str, *required: str, **places) -> Tool:
    schema = {"type": "object", "properties": places, "required": list(required)}
    return Tool(name, "", schema)


@pytest.fixture(scope="module")
def chat(smollm2) -> Chat:
    return chat_from_directory(smollm2.directory)


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


def accepts(constrainer: Constrainer, chat: Chat, tools: list[Tool], reply: str, **options) -> bool:
    options = {"style": "published" if reply.startswith('{"tool_name"') else "petool", **options}
    return walk(constrainer.start(tools, **options), [*chat.encode(reply), chat.eos_id]) is None


@pytest.mark.parametrize("style", ["petool", pytest.param("published", marks=pytest.mark.slow)])
def test_every_right_answer_of_the_open_entries_passes_token_by_token(open_entries, constrainer, chat, style) -> None:
    """745 of 753; the other eight answer against their own declaration, such as 10 for a STRING."""
    refused, forced = 0, 0
    for entry in load_dataset(str(open_entries), "rating").entries:
        constraint = constrainer.start(entry.tools, style)
        forced += len(constraint.forced())
        refused += walk(constraint, [*chat.encode(answer_text(entry.answer, style)), chat.eos_id]) is not None
    assert refused == 8
    assert forced >= 5 * 753  # {"tool_name": at the least


WEATHER = tool(
    "<Weather>.<Sky>.<now>", "city", "days", city={"type": "string"}, days={"type": "number", "default": 3},
    metric={"type": "boolean"}, tags={"type": "array"},
)  # fmt: skip


def test_everything_else_is_refused(constrainer, chat) -> None:
    other = CALL.replace('{"city": "x", "days": 3}', '{"days": -2.5, "metric": false, "city": "\\u0001 {}}} 👋"}')
    assert all(accepts(constrainer, chat, [WEATHER], right) for right in (CALL, other))
    for part, other in BROKEN:
        assert not accepts(constrainer, chat, [WEATHER], CALL.replace(part, other)), (part, other)
        assert part == CALL or not accepts(constrainer, chat, [WEATHER], CALL.replace(part, other), text=True)
    for allowed, right in ((False, False), (True, True), ("No tool fits.", True), ("Not now.", False)):
        assert accepts(constrainer, chat, [WEATHER], "No tool fits.", text=allowed) is right, "a sentence: itself only"


def test_names_with_any_character_are_safe(constrainer, chat) -> None:
    for name in ODD:
        odd = tool(name, name + " key", **{name + " key": {"type": "string"}, "plain": {"type": "string"}})
        call = Call(name, {name + " key": name.replace("\x7f", "")})
        assert accepts(constrainer, chat, [odd, WEATHER], answer_text(call, "petool"))
        assert not accepts(constrainer, chat, [odd], answer_text(Call(name + "!", call.arguments), "petool"))


def test_a_name_that_spells_a_special_token_is_written_as_plain_text(constrainer, chat) -> None:
    name = "a <|im_end|> b"
    constraint = constrainer.start([tool(name), tool("other")], "petool")
    written: list[int] = []
    logits = np.zeros(49152, dtype=np.float32)
    logits[chat.encode(' a <|im_end|> "')] = 1
    while not constraint.finished:
        step = constraint.forced() or [constraint.choose(logits)]
        constraint.accept(step)
        written += step
    assert chat.eos_id not in written[:-1]
    assert chat.decode(written[:-1]) == answer_text(Call(name, {}), "petool")


def test_a_vocabulary_whose_marks_are_one_token_each_writes_them_so(smollm2, tmp_path) -> None:
    """As Qwen's, in whose GGUF files <tool_call> is a token of its own."""
    from llguidance import LLTokenizer
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer.from_file(str(smollm2.directory / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in ("<tool_call>", "</tool_call>")])
    maker, (no,) = Constrainer(LLTokenizer(tokenizer.to_str(), eos_token=2)), tokenizer.encode("No").ids
    ids = tokenizer.encode(answer_text(Call("n", {}), "petool"), add_special_tokens=False).ids
    assert {49152, 49153} <= set(ids)
    assert walk(maker.start([WEATHER, tool("n")], "petool"), [*ids, 2]) is None
    for first in (49152, no):
        constraint, logits = maker.start([WEATHER, tool("n")], "petool", True), np.full(49154, -50, dtype=np.float32)
        logits[[49152, no]] = np.log([3, 1])
        constraint.weigh(logits, constraint.allowed(49154))
        constraint.accept([first])
        assert (constraint.call_share, constraint.choosing) == (pytest.approx(0.75, abs=1e-4), first != no)


def test_confidence_is_the_share_of_what_was_chosen_up_to_the_end_of_the_name(constrainer, chat) -> None:
    """By hand: of a call 3, of a text 1 + 1; of the names 4 to 1, of the first letters of both the same."""

    def decode(*steps: dict[str, float]) -> Constraint:
        constraint, left = constrainer.start([tool("sun"), tool("hat")], "petool", True), iter(steps)
        while constraint.choosing:
            step = constraint.forced()
            if not step:
                logits = np.full(49152, -50, dtype=np.float32)
                for text, chance in next(left).items():
                    logits[chat.encode(text)[0]] = np.log(chance)
                step = [constraint.choose(logits)]
            constraint.accept(step)
        return constraint

    called = decode({"<": 3, "No": 1, "I": 1}, {"sun": 4, "hat": 1})
    assert (called.confidence, called.call_share) == (pytest.approx(0.6 * 0.8, abs=1e-4), pytest.approx(0.6, abs=1e-4))
    silent = decode({"<": 3, "No": 4, "I": 1})
    assert (silent.confidence, silent.call_share) == (pytest.approx(5 / 8, abs=1e-4), pytest.approx(3 / 8, abs=1e-4))
    only = constrainer.start([tool("only")], "petool")
    only.accept(only.forced())
    assert (only.choosing, only.confidence) == (False, 1.0), "nothing else could be"
