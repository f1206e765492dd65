"""Constrained decoding: a reply can only be a call of an offered tool in the form that training uses, or a plain text.
Each tool's own JSON Schema becomes a grammar by llguidance: exactly the tool's name, then its parameters in any order
(right answers do not keep the declared one), each at most once and every required one, in the spacing of json.dumps,
then the end token. A text is let through where no tool may fit. A grammar that cannot be built, or a token that it
refuses, raises PetoolError; nothing falls back to a free reply."""

import contextlib
import ctypes
import json
import marshal
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from petool_lite.data.entries import Call, Tool
from petool_lite.errors import PetoolError
from petool_lite.inference.llama_open import model_sha256
from petool_lite.inference.parse import CLOSE, OPEN, check_names
from petool_lite.inference.schema import ANY_NUMBER, Schema, buildable, guidance, options
from petool_lite.places import own_folder
from petool_lite.prompt.render import answer_text
from petool_lite.runs import draft

if TYPE_CHECKING:
    from petool_lite.inference.llama import LlamaModel

_ANY_ORDER = 64  # parameters: the grammar keeps those that are written in a 64-bit set; more keep the declared order
_TEXT = r"TEXT: /[^<{\s](.|\n)*/"
_NAMED = re.compile(rb'name": "(?:[^"\\]|\\.)*"')  # what a reply holds as soon as its tool is chosen
_NUMBER = r"NUMBER: /-?(0|[1-9][0-9]{0,18})(\.[0-9]{1,17})?(e[+-][0-9]{2})?/"


def grammar(tools: Sequence[Tool], style: str, text: bool | str = False, marks: dict[str, int] | None = None) -> str:
    """The grammar of all calls of `tools`, in llguidance's Lark dialect, and of a plain text if `text`: of one only if
    it is a string. `marks` are words that are one special token, with its id. Raises PetoolError for bad tools."""
    if tools or not text:
        check_names(tools)
    choices = [f"tool{index}" for index in range(len(tools))] + (["text"] if text else [])
    rules = ["start: " + " | ".join(choices), _NUMBER]
    if text:
        rules += [f"text: {_literal(text)}"] if isinstance(text, str) else ["text: TEXT", _TEXT]
    for index, tool in enumerate(tools):
        head, _, tail = answer_text(Call(tool.name, {}), style).rpartition("{}")
        start, end = (_literal(part, marks or {}) for part in (head, tail))
        rules += [f"tool{index}: {start} arguments{index} {end}", *_arguments(index, buildable(tool).schema)]
    return "\n".join(rules)


def _literal(text: str, marks: dict[str, int] | None = None) -> str:
    # A literal of the grammar is written as a JSON string, so no character of a name has a meaning in the grammar;
    # its lexer takes the one control character that JSON leaves as it is (DEL) in escaped form only.
    tokens = {mark: f"<[{token}]>" for mark, token in (marks or {}).items()}
    parts = re.split(f"({'|'.join(tokens)})", text) if tokens else [text]
    quoted = (json.dumps(part, ensure_ascii=False).replace("\x7f", "\\u007f") for part in parts)
    return " ".join(tokens.get(part, literal) for part, literal in zip(parts, quoted, strict=True) if part)


def _arguments(index: int, schema: Schema) -> list[str]:
    """The rules of one tool's arguments."""
    places = schema.get("properties", {})
    plain = set(schema) <= {"type", "properties", "required", "additionalProperties", "$defs"}
    if not plain or schema["additionalProperties"] is not False or len(places) > _ANY_ORDER:
        return [f"arguments{index}: %json {_json(schema, {})}"]
    names = sorted(places, key=lambda name: name not in schema["required"])
    required = len(schema["required"])
    first = [] if required else ['"{}"']
    # A rule's parameter is the set of what is written already, a bit each; required parameters have the low bits.
    rest = ['"}"' + (f" %if is_ones([0:{required}])" if required else "")]
    values = []
    for bit, name in enumerate(names):
        key, value = json.dumps(name, ensure_ascii=False), f"value{index}_{bit}"
        first.append(f"{_literal('{' + key + ': ')} {value} rest{index}::{hex(1 << bit)}")
        rest.append(f"{_literal(', ' + key + ': ')} {value} rest{index}::set_bit({bit}) %if bit_clear({bit})")
        number = places[name] == ANY_NUMBER
        values.append(f"{value}: " + ("NUMBER" if number else f"%json {_json(places[name], schema.get('$defs', {}))}"))
    rules = [f"arguments{index}: " + " | ".join(first), *values]
    return rules + ([f"rest{index}::_: " + "\n | ".join(rest)] if names else [])


def _json(schema: Schema, definitions: Schema) -> str:
    """A schema with llguidance's options, and with the definitions where it may refer to them."""
    text = json.dumps({**options(), **schema}, ensure_ascii=False)
    if '"$ref"' not in text or "$defs" in schema:
        return text
    return f'{text[:-1]}, "$defs": {json.dumps(definitions, ensure_ascii=False)}}}'


def heated(share: float, temperature: float) -> float:
    """A probability with its log-odds divided by a temperature, which calibrates it (Guo et al. 2017: logits)."""
    inside = min(max(share, 1e-6), 1 - 1e-6)
    odds = float((1 / inside - 1) ** (1 / temperature))
    return min(max(1 / (1 + odds), 1e-6), 1 - 1e-6)


class Constraint:
    """What may come next in one reply: append `forced()` where there is any, else `choose`; `accept` either. Once the
    end token is accepted it is `finished`. `confidence` is the probability of the tool that was chosen, or of no tool:
    the product of the chosen ids' probabilities, renormalised over the allowed ones, up to the end of the tool's name.
    `choosing` tells whether that is still to come; `call_share` is the probability of a call of any tool."""

    def __init__(self, tokenizer: Any, tools: Sequence[Tool], style: str, text: bool | str = False) -> None:
        """`tokenizer` is an llguidance.LLTokenizer; see `Constrainer`."""
        self._tokenizer = tokenizer
        found = {mark: tokenizer.tokenize_str(mark, parse_special=True) for mark in (OPEN, CLOSE)}
        marks = {mark: ids[0] for mark, ids in found.items() if len(ids) == 1 and tokenizer.is_special_token(ids[0])}
        self._marks = frozenset(marks.values())
        matcher = guidance().LLMatcher
        rules = matcher.grammar_from_lark(grammar(tools, style, text, marks))
        self._matcher = matcher(tokenizer, rules, log_level=0)
        self._check("no grammar can be built from these tools")
        self._end: int = tokenizer.eos_token
        self.finished, self.choosing, self._written = False, True, b""
        self.confidence = self.call_share = 1.0
        self._head = answer_text(Call("", {}), style).partition('""')[0]
        heads = [self._head[:end] for end in range(1, len(self._head) + 1)] if text else []
        starts = [tokenizer.tokenize_str(head, parse_special=True) for head in heads]
        self._starts = {ids[0] for ids in starts if len(ids) == 1}  # ids that a call can begin with, where a text may

    def _check(self, what: str) -> None:
        if self._matcher.is_error():
            reason = self._matcher.get_error().strip().splitlines()[0]
            raise PetoolError(f"{what}: {reason}", "check the tools' names and parameters, or use free decoding")

    def forced(self) -> list[int]:
        """The ids that must come next as training has them, maybe with the end token; none where there is a choice."""
        if self.finished or self._matcher.is_stopped():
            return [] if self.finished else [self._end]
        found: list[int] = self._matcher.compute_ff_tokens()
        special = (place for place, token in enumerate(found) if self._tokenizer.is_special_token(token))
        odd = next((place for place in special if found[place] not in self._marks), None)
        if odd == 0:  # a name that spells a special token, such as "<|im_end|>", is written as plain text
            plain = self._matcher.compute_ff_bytes().partition(b"\xff")[0].decode("utf-8", "ignore")
            found = self._tokenizer.greedy_tokenize(plain)
        return found if odd == 0 else found[:odd]

    def opening(self) -> list[int]:
        """How a call begins, as a guess of how the reply begins: up to where the tools' names differ."""
        matcher = self._matcher.deep_copy()
        start = self._tokenizer.tokenize_str(self._head, parse_special=True)[:1]
        return start + matcher.compute_ff_tokens() if matcher.try_consume_tokens(start) else []

    def possible(self, ids: list[int]) -> list[int]:
        """As many of `ids` as may come next."""
        return ids[: self._matcher.validate_tokens(ids)] if ids else []

    def allowed(self, size: int) -> Any:
        """Which of the first `size` ids may come next, as numpy bool."""
        import numpy as np

        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check("the constraint cannot go on")
        return np.unpackbits(bits, count=size, bitorder="little").view(bool)

    def choose(self, logits: Any) -> int:
        """The likeliest allowed id; `logits` is a numpy array of shape (vocabulary,) and is left as it is."""
        import numpy as np

        allowed = self.allowed(logits.size)
        if not allowed.any():
            raise PetoolError("the constraint leaves no token to choose", "report this; free decoding does without it")
        if self.choosing:
            self.weigh(logits, allowed)
        return int(np.where(allowed, logits, -np.inf).argmax())

    def weigh(self, logits: Any, allowed: Any) -> None:
        """Take the coming choice of the likeliest id into `confidence`; see `choose`."""
        import numpy as np

        ids = np.flatnonzero(allowed)
        shares = np.exp(logits[ids].astype(np.float64) - logits[ids].max())
        chosen = np.arange(ids.size) == shares.argmax()
        if self._starts and not self._written:  # a call or a text, however either begins
            calls = np.isin(ids, list(self._starts))
            self.call_share = float(shares[calls].sum() / shares.sum())
            chosen = calls == calls[shares.argmax()]
        self.confidence *= float(shares[chosen].sum() / shares.sum())

    def accept(self, ids: Sequence[int]) -> None:
        """Move on by `ids`; raises PetoolError if one of them is not allowed."""
        if ids and self.choosing:
            text = bool(self._starts) and not self._written and ids[0] not in self._starts
            self._written += self._tokenizer.decode_bytes(list(ids))
            self.choosing = not text and _NAMED.search(self._written) is None
        for token in ids:
            if self.finished or (token == self._end and not self._matcher.is_accepting()):
                raise PetoolError(f"token {token} is not allowed by the constraint here", "this is an engine's fault")
            self.finished = token == self._end
            if not self.finished:
                self._matcher.consume_token(token)
                self._check(f"token {token} is not allowed by the constraint here")


class Constrainer:
    """Makes the constraints of one model; holds what llguidance keeps of its tokenizer (0.1 s to build)."""

    def __init__(self, tokenizer: Any, function: Any = None) -> None:
        """For an llguidance.LLTokenizer with training's end token; a `function` that it calls is kept alive as long."""
        self._tokenizer, self._function = tokenizer, function

    @classmethod
    def of_llama(cls, pieces: list[bytes], end: int, loaded: "Callable[[], LlamaModel]") -> "Constrainer":
        """For a GGUF file with `pieces` of `LlamaModel.token_bytes` and the end token; `loaded` is for `start` only."""

        def tokenize(vocab: Any, text: int, size: int, ids: Any, room: int, add: bool, special: bool) -> int:
            raw, model = ctypes.string_at(text, size), loaded()
            return int(model._lib.llama_tokenize(model._vocab, raw, size, ids, room, add, special))

        number, address, flag = ctypes.c_int32, ctypes.c_void_p, ctypes.c_bool
        kind = ctypes.CFUNCTYPE(number, address, address, number, ctypes.POINTER(number), number, flag, flag)
        function = kind(tokenize)  # one like llama_tokenize
        place = ctypes.cast(function, address).value
        # Without slices masks take 0.9 ms instead of 0.4, and building it half the time.
        settings: dict[str, Any] = {"vocab_ptr": 1, "tokenize_fptr": place, "eos_token": end, "slices": []}
        return cls(guidance().LLTokenizer.from_llamacpp(tokens=pieces, **settings), function)

    @classmethod
    def of_file(cls, path: Path, loaded: "Callable[[], LlamaModel]") -> "Constrainer":
        """For a GGUF file, while `loaded` still loads it where its tokens are kept from an earlier time."""
        if folder := own_folder("tokens"):
            kept = folder / f"{model_sha256(path)[:32]}.bin"
            with contextlib.suppress(OSError, ValueError, EOFError, TypeError):
                pieces, end = marshal.loads(kept.read_bytes())
                return cls.of_llama(pieces, end, loaded)
            with contextlib.suppress(OSError), draft(kept) as path:
                path.write_bytes(marshal.dumps((loaded().token_bytes(), loaded()._end)))
        return loaded().constrainer()

    @classmethod
    def from_directory(cls, directory: Path, eos_id: int) -> "Constrainer":
        """For a model directory in Hugging Face format."""
        size = json.loads((directory / "config.json").read_text())["vocab_size"]
        text = (directory / "tokenizer.json").read_text()
        return cls(guidance().LLTokenizer(text, n_vocab=size, eos_token=eos_id))

    def start(self, tools: Sequence[Tool], style: str, text: bool | str = False) -> Constraint:
        """The constraint of one reply; see `grammar`. Raises PetoolError if it cannot be built."""
        return Constraint(self._tokenizer, tools, style, text)
