"""Constrained decoding: a reply can only be a call of an offered tool in the format that training uses.

A request's candidates become one grammar: exactly an offered name, then that tool's parameters in any order (right
answers do not keep the declared one), each at most once and every required one, with values of the declared type, in
the spacing of `ToolCall.to_json`, then the end token. llguidance runs the grammar for both engines. A grammar that
cannot be built, or a token that it refuses, raises PetoolError; nothing falls back to a free reply.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from petool_lite.data.entries import Parameter, Tool
from petool_lite.errors import PetoolError

# The published words for types (ENUM lists no values, a GEOPOINT or a DATE is written as text); the lower-case
# JSON schema words come with requests to the server. Any other word means text.
_RULES = {
    "NUMBER": "NUMBER",
    "FLOAT": "NUMBER",
    "INTEGER": "INTEGER",
    "INT": "INTEGER",
    "BOOLEAN": "BOOLEAN",
    "BOOL": "BOOLEAN",
    "ARRAY": "array3",
    "LIST": "array3",
    "OBJECT": "object3",
    "MAP": "object3",
}
_SHORTEST_LIMIT = 256  # characters of a text value, or twice its default: the longest real one has 116
_MOST_PARAMETERS = 64  # of one tool: the grammar keeps the ones that are written in a 64-bit set
_MOST_ITEMS = 31  # of an array or object

# Text as json.dumps(ensure_ascii=False) writes it: only the quote, the backslash and control characters are escaped.
_TEXT = r'/"([^"\\\x00-\x1f]|\\["\\bfnrt]|\\u00[01][0-9a-f]){0,%d}"/'
_VALUES = r"""
INTEGER: /-?(0|[1-9][0-9]{0,18})/
NUMBER: /-?(0|[1-9][0-9]{0,18})(\.[0-9]{1,17})?(e[+-][0-9]{2})?/
BOOLEAN: "true" | "false"
json0: TEXT | NUMBER | BOOLEAN | "null"
"""


def value_rule(parameter: Parameter) -> str:
    """The grammar rule for a parameter's declared type; text for a type that is not known."""
    word = parameter.type.split("(")[0].strip().upper()
    return _RULES.get(word, "TEXT")


def _literal(text: str) -> str:
    # A literal of the grammar is written as a JSON string, so no character of a name has a meaning in the grammar;
    # its lexer takes the one control character that JSON leaves as it is (DEL) in escaped form only.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def written_default(parameter: Parameter) -> str | None:
    """A default that its own type cannot hold, as JSON, such as "" for a NUMBER; None for all others.

    The data answers such a parameter with the default as it stands (20 of the 22 numbers that the open entries write
    as text), so it is a legal value beside those of the type.
    """
    default, rule = parameter.default, value_rule(parameter)
    if not isinstance(default, str) or rule == "TEXT":
        return None
    try:
        read = json.loads(default)
    except ValueError:
        return json.dumps(default, ensure_ascii=False)
    kinds: dict[str, type | tuple[type, ...]] = {
        "NUMBER": (int, float),
        "INTEGER": int,
        "BOOLEAN": bool,
        "array3": list,
        "object3": dict,
    }
    return None if isinstance(read, kinds[rule]) else json.dumps(default, ensure_ascii=False)


def declared(tool: Tool) -> tuple[tuple[Parameter, ...], int]:
    """The tool's parameters, each name once and required ones first, and how many are required.

    Real tools declare a name twice; the first declaration counts, as in the published data.
    """
    found: dict[str, Parameter] = {}
    for parameter in tool.required:
        found.setdefault(parameter.name, parameter)
    required = len(found)
    for parameter in tool.optional:
        found.setdefault(parameter.name, parameter)
    return tuple(found.values()), required


def grammar(tools: Sequence[Tool]) -> str:
    """The grammar of all calls of `tools`, in llguidance's Lark dialect; raises PetoolError where none can be made."""
    if not tools:
        raise PetoolError("no tool is offered, so there is nothing to call", "give at least one tool")
    rules = ["start: " + " | ".join(f"tool{index}" for index in range(len(tools)))]
    longest = _SHORTEST_LIMIT
    for index, tool in enumerate(tools):
        rules += _tool_rules(index, tool)
        defaults = [item.default for item in declared(tool)[0] if isinstance(item.default, str)]
        longest = max([longest, *(2 * len(default) for default in defaults)])
    rules.append("TEXT: " + _TEXT % longest)
    text = "\n".join(rules) + _VALUES + "\n".join(_nested_rules())
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PetoolError("a name or default of a tool is not valid Unicode", "half of a surrogate pair") from error
    return text


def _tool_rules(index: int, tool: Tool) -> list[str]:
    parameters, required = declared(tool)
    if len(parameters) > _MOST_PARAMETERS:
        raise PetoolError(
            f"the tool {tool.name} declares {len(parameters)} parameters, more than {_MOST_PARAMETERS}",
            "offer it with fewer, or use free decoding",
        )
    first = [] if required else ['"}}"']
    # A rule's parameter is the set of what is written already, a bit each; required parameters have the low bits.
    rest = ['"}}"' + (f" %if is_ones([0:{required}])" if required else "")]
    for bit, parameter in enumerate(parameters):
        key, value = f"{json.dumps(parameter.name, ensure_ascii=False)}: ", _value(parameter)
        first.append(f"{_literal(key)} {value} rest{index}::{hex(1 << bit)}")
        rest.append(f"{_literal(', ' + key)} {value} rest{index}::set_bit({bit}) %if bit_clear({bit})")
    head = f'{{"tool_name": {json.dumps(tool.name, ensure_ascii=False)}, "parameters": {{'
    rules = [f"tool{index}: {_literal(head)} first{index}", f"first{index}: " + " | ".join(first)]
    return rules + ([f"rest{index}::_: " + "\n | ".join(rest)] if parameters else [])


def _value(parameter: Parameter) -> str:
    rule, default = value_rule(parameter), written_default(parameter)
    return rule if default is None else f"({rule} | {_literal(default)})"


def _nested_rules() -> list[str]:
    """JSON arrays and objects, three deep, so that every answer ends."""
    rules = []
    for depth in (1, 2, 3):
        inside = f"json{depth - 1}"
        pair = f'TEXT ": " {inside}'
        rules.append(f'array{depth}: "[]" | "[" {inside} (", " {inside}){{0,{_MOST_ITEMS}}} "]"')
        rules.append(f'object{depth}: "{{}}" | "{{" {pair} (", " {pair}){{0,{_MOST_ITEMS}}} "}}"')
        rules.append(f"json{depth}: json0 | array{depth} | object{depth}")
    return rules


class Constraint:
    """What may come next in one reply: append `forced()` where there is any, else `choose`; `accept` either."""

    def __init__(self, tokenizer: Any, tools: Sequence[Tool]) -> None:
        """`tokenizer` is an llguidance.LLTokenizer; see `Constrainer`."""
        from llguidance import LLMatcher

        self._tokenizer = tokenizer
        self._matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_lark(grammar(tools)), log_level=0)
        self.eos_id: int = tokenizer.eos_token
        self._ended = False
        self._check("no grammar can be built from these tools")

    def _check(self, what: str) -> None:
        if self._matcher.is_error():
            reason = self._matcher.get_error().strip().splitlines()[0]
            raise PetoolError(f"{what}: {reason}", "check the tools' names and parameters, or use free decoding")

    @property
    def finished(self) -> bool:
        """Whether the end token was accepted."""
        return self._ended

    def forced(self) -> list[int]:
        """The token ids that must come next, as training tokenizes them; the last one may be the end token.

        They can be appended in one batch. Empty where there is a choice.
        """
        if self._ended or self._matcher.is_stopped():
            return [] if self._ended else [self.eos_id]
        found: list[int] = self._matcher.compute_ff_tokens()
        if any(self._tokenizer.is_special_token(token) for token in found):
            # A name that spells a special token, such as "<|im_end|>", is written as plain text.
            found = self._tokenizer.greedy_tokenize(self._matcher.compute_ff_bytes().decode("utf-8", "ignore"))
        return found

    def bits(self) -> Any:
        """The allowed next ids as numpy uint8: bit i of byte j is the id 8j + i; the last bytes may be unused."""
        import numpy as np

        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check("the constraint cannot go on")
        return bits

    def choose(self, logits: Any) -> int:
        """The likeliest allowed id; `logits` is a numpy array of shape (vocabulary,) and is left as it is."""
        import numpy as np

        bits = self.bits()
        best = int(logits.argmax())
        if best // 8 < bits.size and bits[best // 8] >> (best % 8) & 1:
            return best
        ids = np.flatnonzero(np.unpackbits(bits, bitorder="little")[: logits.size])
        if ids.size == 0:
            raise PetoolError("the constraint leaves no token to choose", "report this; free decoding does without it")
        return int(ids[logits[ids].argmax()])

    def accept(self, ids: Sequence[int]) -> None:
        """Move on by `ids`; raises PetoolError if one of them is not allowed."""
        for token in ids:
            if self._ended or (token == self.eos_id and not self._matcher.is_accepting()):
                raise PetoolError(f"token {token} is not allowed by the constraint here", "this is an engine's fault")
            if token == self.eos_id:
                self._ended = True
            else:
                self._matcher.consume_token(token)
                self._check(f"token {token} is not allowed by the constraint here")


class Constrainer:
    """Makes the constraints of one model; holds what llguidance keeps of its tokenizer (under a second to build)."""

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer` is an llguidance.LLTokenizer whose end token is the one that training ends answers with."""
        self._tokenizer = tokenizer

    @classmethod
    def from_directory(cls, directory: Path, eos_id: int) -> "Constrainer":
        """For a model directory in Hugging Face format."""
        from llguidance import LLTokenizer

        size = json.loads((directory / "config.json").read_text())["vocab_size"]
        text = (directory / "tokenizer.json").read_text()
        return cls(LLTokenizer(text, n_vocab=size, eos_token=eos_id))

    def start(self, tools: Sequence[Tool]) -> Constraint:
        """The constraint of one reply; raises PetoolError if it cannot be built."""
        return Constraint(self._tokenizer, tools)
