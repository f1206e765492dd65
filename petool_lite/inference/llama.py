"""A GGUF model on the CPU through llama.cpp's C interface: tokenize, greedy decode, timings. A batch of a few tokens
takes little longer than one token. So ids of a reply that are settled wait until a choice needs the logits after them,
and a guess of what follows goes along, whose logits choose as well as any as long as the choices are as guessed."""

import codecs
import copy
import ctypes
import time
import unicodedata
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petool_lite.errors import PetoolError
from petool_lite.families import known_template
from petool_lite.inference.batch import Context, Slots
from petool_lite.inference.constrain import Constrainer, Constraint
from petool_lite.inference.llama_open import EngineSettings, open_model
from petool_lite.prompt.render import Chat, common_length

# Rows that llama.cpp's flash attention takes at a time; products of a few rows round otherwise than larger ones, too.
_TILE = 64
_PLACES = 256  # by which a context grows
_REPLY = 128  # tokens of a reply that most calls need no more than
_LONGEST_PIECE = 1024  # bytes of a token
# How many chosen ids in a row are looked for in the prompt, and how many of what follows there is taken for a guess:
# on 198 published answers that makes 9.6 batches of 15.7, and 6.1 of 10.8 guessed ids are right.
_REPEATS = {3: 8, 2: 4}
Sink = Callable[[str], None] | None
_AGAIN = "export it again from an instruct model"


@dataclass(frozen=True)
class Reply:
    """A greedy reply: its text and ids without the end token; `finish` is "stop" or "length"; times in seconds.
    `forced_tokens` of the ids were the only ones that a constraint left. `reused_tokens` of the prompt were in the
    engine's memory already. `prefill_s` is the time to the first choice. `confidence` is the constraint's, or None."""

    text: str
    ids: tuple[int, ...]
    finish: str
    prompt_tokens: int
    prefill_s: float
    decode_s: float
    forced_tokens: int = 0
    reused_tokens: int = 0
    confidence: float | None = None


class LlamaModel(ExitStack):
    """A loaded GGUF file with one context. Use as a context manager, or `close` it; only one thread may use it."""

    sequence = 0  # of the context that is this model's

    def __init__(self, path: Path, n_ctx: int = 0, settings: EngineSettings | None = None, vocab_only: bool = False):
        """Load `path`, memory-mapped; `n_ctx` in tokens, 0: the model's own length. Raises PetoolError if it cannot."""
        super().__init__()
        self.held: list[int] = []  # ids whose keys and values are in the engine's memory
        self._rows, self._first = list[Any](), 0  # logits of the last reading, and the place of the first of them
        self.settings = settings or EngineSettings()
        self.exact_reuse = False  # see `read`
        self.busy = False  # set while it writes a reply: other slots' batches wait a moment for its tokens
        self.check: Callable[[], None] | None = None  # called before and amid batches; what it raises ends the request
        self._lib, self._model = open_model(path, self.settings, vocab_only)
        self.callback(self._lib.llama_model_free, self._model)
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        self.metadata = self._read_metadata()
        self.n_ctx = n_ctx or self.train_ctx
        self.context = Context(self._lib, self._model, self.settings)
        self.callback(lambda: self.context.close())

    def _reserve(self, length: int) -> None:
        """Have room for `length` ids, or raise PetoolError: not for 8,192 at once, since clearing them takes 0.1 s."""
        if length > self.n_ctx:
            raise PetoolError(f"{length} tokens exceed the context of {self.n_ctx}", "open a larger context")
        if length <= (size := self.context.size):
            return
        held, kept = self.held, self.state(len(self.held)) if self.held else None
        self.context.close()
        self.held = []
        self.context.open(min(self.n_ctx, max(-(-length // _PLACES) * _PLACES, 2 * size)))
        if kept:
            self.restore(held, kept)

    def slots(self, count: int) -> list["LlamaModel"]:
        """Models that share this one's file and one context, each for a thread of its own and with room for `n_ctx`
        tokens; see `ToolCaller.slots`. Raises PetoolError where there is no memory for them."""
        self.context.close()
        models = [copy.copy(self) for _ in range(count)]
        self.context = Slots(self._lib, self._model, self.settings, models)
        for number, model in enumerate(models):
            model.context, model.sequence, model.held = self.context, number, []
        return models

    def _read_metadata(self) -> dict[str, str]:
        def read(function: Any, index: int) -> str:
            buffer = ctypes.create_string_buffer(function(self._model, index, None, 0) + 1)
            function(self._model, index, buffer, len(buffer))
            return buffer.value.decode("utf-8", "replace")

        count = self._lib.llama_model_meta_count(self._model)
        key, value = self._lib.llama_model_meta_key_by_index, self._lib.llama_model_meta_val_str_by_index
        return {read(key, index): read(value, index) for index in range(count)}

    @property
    def train_ctx(self) -> int:
        """The context length that the model was made for, in tokens."""
        architecture = self.metadata.get("general.architecture", "")
        return int(self.metadata.get(f"{architecture}.context_length", 0))

    def chat(self) -> Chat:
        """How this model talks, from the file's own metadata."""
        template = self.metadata.get("tokenizer.chat_template") or known_template(self.metadata.get("general.name", ""))
        if not template:
            raise PetoolError("the GGUF file lacks the key tokenizer.chat_template", _AGAIN)
        begin, end = self._token_text(self._special("bos")), self._token_text(self._end)
        return Chat(lambda texts: [self.encode(text) for text in texts], template, begin, end, self._end)

    @property
    def _end(self) -> int:
        """The end token: the one that the file names, else the end of a turn that llama.cpp knows by its text."""
        found = self._special("eos")
        found = found if found >= 0 else int(self._lib.llama_vocab_eot(self._vocab))
        if found < 0:
            raise PetoolError("the GGUF file lacks the key tokenizer.ggml.eos_token_id", _AGAIN)
        return found

    def _special(self, name: str) -> int:
        """A special token that the file names; -1 for none or one beyond the vocabulary, where llama.cpp guesses."""
        found = self.metadata.get(f"tokenizer.ggml.{name}_token_id", "")
        return int(found) if found.isdecimal() and int(found) < self._lib.llama_vocab_n_tokens(self._vocab) else -1

    def _token_text(self, token: int) -> str:
        text = self._lib.llama_vocab_get_text(self._vocab, token) if token >= 0 else b""
        return (text or b"").decode("utf-8", "replace")

    def encode(self, text: str) -> list[int]:
        """Token ids; special tokens in the text are read as such, none is added."""
        if self.metadata.get("tokenizer.ggml.pre") == "qwen2":  # whose tokenizer does so, and llama.cpp not
            text = unicodedata.normalize("NFC", text)
        raw = text.encode()
        buffer = (self._lib.llama_token * (len(raw) + 8))()
        count = self._lib.llama_tokenize(self._vocab, raw, len(raw), buffer, len(buffer), False, True)
        if count < 0:
            raise PetoolError(f"llama.cpp cannot tokenize a text of {len(raw)} bytes")
        return list(buffer[:count])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`."""
        return "".join(self.texts(ids))

    def texts(self, ids: Sequence[int]) -> list[str]:
        """The text of `ids`, cut by ids; a character of several ids stands with the last of them."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        found = [decoder.decode(self._piece(token)) for token in ids]
        return [*found[:-1], found[-1] + decoder.decode(b"", final=True)] if found else []

    def _piece(self, token: int) -> bytes:
        buffer = ctypes.create_string_buffer(_LONGEST_PIECE)
        size = self._lib.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, True)
        return buffer.raw[: max(0, size)]

    def ends(self, token: int) -> bool:
        """Whether an id ends a reply."""
        return bool(self._lib.llama_vocab_is_eog(self._vocab, token))

    def token_bytes(self) -> list[bytes]:
        """Every token as bytes; a special one, which no text is, after a byte 0xFF."""
        lib, found = self._lib, []
        for token in range(lib.llama_vocab_n_tokens(self._vocab)):
            piece, kind = self._piece(token), lib.llama_vocab_get_attr(self._vocab, token)
            own = kind & lib.LLAMA_TOKEN_ATTR_USER_DEFINED and piece.startswith(b"<") and piece.endswith(b">")
            found.append(b"\xff" + piece if own or kind & lib.LLAMA_TOKEN_ATTR_CONTROL else piece)
        return found

    def constrainer(self) -> Constrainer:
        """Makes constraints for this model's tokenizer; takes 0.1 s, so keep it."""
        return Constrainer.of_llama(self.token_bytes(), self._end, lambda: self)

    def generate(
        self, ids: list[int], most: int, constraint: Constraint | None = None, reuse: bool = False, watch: Sink = None
    ) -> Reply:
        """Decode greedily from `ids` until an end token or `most` new tokens, under `constraint` if given. With
        `reuse`, what the memory shares with `ids` is not read again. `watch` gets the reply's text as it grows. Raises
        PetoolError if the prompt and the reply do not fit the context, or the engine fails."""
        started = time.perf_counter()
        self._reserve(len(ids) + min(most, _REPLY))
        writing = _Writing(self, ids, constraint, most, watch)
        writing.force()
        reused = min(len(ids), self.read([*ids, *writing.ids], reuse, writing.guess()))
        prefilled = time.perf_counter()
        while not writing.finish:
            known = len(ids) + len(writing.ids)
            if self.held[len(ids) : known] == writing.ids:
                writing.choose(self._logits(known - 1))
            else:  # what was chosen and forced since, and a guess of what comes next, in one batch
                self._keep(len(ids) + common_length(self.held[len(ids) :], writing.ids))
                self._eval([*ids, *writing.ids][len(self.held) :], writing.guess())
        times = (prefilled - started, time.perf_counter() - prefilled)
        confidence = constraint.confidence if constraint else None
        text, reply = self.decode(writing.ids), tuple(writing.ids)
        return Reply(text, reply, writing.finish, len(ids), *times, writing.forced, reused, confidence)

    def read(self, ids: Sequence[int], reuse: bool = True, guess: Sequence[int] = ()) -> int:
        """Read `ids` so that the next token can be chosen; returns how many of them the memory held already. As much of
        `guess` as the last batch has room for is read with it, see `_eval`. With `exact_reuse` set, the logits are
        those of a reading from the start, to the bit: matrix products of few rows round otherwise than those of many,
        so what is read again has the parts and tiles that it would have there."""
        step = self.settings.ubatch  # one matrix product a call, so that Ctrl-C is heard in between
        shared = min(common_length(self.held, ids), len(ids) - 1) if reuse else 0
        if self.exact_reuse:  # the part up to the next multiple of `step` begins with a tile and has all rows or a tile
            start = shared // step * step
            rows = min(step, len(ids) + len(guess) - start)
            shared = max(start, min(shared, start + rows - _TILE) // _TILE * _TILE)
        origin = 0 if self.exact_reuse else shared
        self._keep(shared)
        while (offset := len(self.held)) < len(ids):
            end = offset + step - (offset - origin) % step
            self._eval(ids[offset:end], guess[: max(0, end - len(ids))])
        return shared

    def _keep(self, length: int) -> None:
        """Drop all but the first `length` ids from memory."""
        if not self.context.pointer:
            return
        with self.context.lock:
            memory = self._lib.llama_get_memory(self.context.pointer)
            if not self._lib.llama_memory_seq_rm(memory, self.sequence, length, -1):
                self._lib.llama_memory_seq_rm(memory, self.sequence, -1, -1)
                length = 0
            del self.held[length:]

    def state(self, length: int) -> memoryview:
        """The engine's state after the first `length` ids in memory; the others are dropped."""
        with self.context.lock:
            self._keep(length)
            size = self._lib.llama_state_seq_get_size(self.context.pointer, self.sequence)
            buffer = (ctypes.c_uint8 * size)()
            self._lib.llama_state_seq_get_data(self.context.pointer, buffer, size, self.sequence)
        return memoryview(buffer).cast("B")

    def restore(self, ids: Sequence[int], data: memoryview) -> bool:
        """Put a state of `state` back, as read after `ids`; False if the engine refuses it, and the memory is empty."""
        import numpy as np

        if len(ids) > self.n_ctx:
            return False
        self._keep(0)
        self._reserve(len(ids))
        address = np.frombuffer(data, dtype=np.uint8).ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        with self.context.lock:
            context = self.context.pointer
            taken = self._lib.llama_state_seq_set_data(context, address, data.nbytes, self.sequence)
            top = self._lib.llama_memory_seq_pos_max(self._lib.llama_get_memory(context), self.sequence)
            if taken != data.nbytes or top != len(ids) - 1:
                self._keep(0)
                return False
        self.held = list(ids)
        return True

    def _logits(self, place: int = -1) -> Any:
        """Logits after the id at `place` in memory, the last one if -1, shape (vocabulary,); see `_eval`."""
        return self._rows[place - self._first if place >= 0 else -1]

    def shares(self, ids: Sequence[int], choices: Sequence[Sequence[int]]) -> list[float]:
        """Each choice's probability among them as the continuation of `ids`: the product of those of its ids, each
        renormalised over the ids that a choice can go on with (see `Constraint`). Choices that share a beginning share
        its reading; none is the beginning of another, and none is kept. Raises PetoolError if the engine fails."""
        import numpy as np

        self.read(ids)
        found, path, rows = {}, list[int](), [self._logits().astype(np.float64)]
        for choice in sorted({tuple(choice) for choice in choices}):
            shared = min(common_length(path, choice), len(choice) - 1, len(rows) - 1)
            self._keep(len(ids) + shared)
            path, rows = list(choice), rows[: shared + 1]
            if fresh := path[shared:-1]:  # what follows the last token does not matter
                self._eval(fresh[:1], fresh[1:])
                rows += [row.astype(np.float64) for row in self._rows]
            share = 1.0
            for depth, row in enumerate(rows):
                others = {other[depth] for other in choices if list(other[:depth]) == path[:depth]}
                share /= float(np.exp(row[list(others)] - row[path[depth]]).sum())
            found[choice] = share
        self._keep(len(ids))
        return [found[tuple(choice)] for choice in choices]

    def _eval(self, ids: Sequence[int], guess: Sequence[int] = ()) -> None:
        """Read `ids` and `guess` after what is held; logits after the last of `ids` and all of `guess` can be had."""
        self._reserve(len(self.held) + len(ids) + len(guess))
        self._first = len(self.held) + len(ids) - 1
        self._rows = self.context.read(self, [*ids, *guess], len(ids) - 1)


class _Writing:
    """A reply in the making: ids that are settled, whether or not the engine has read them, and what may follow."""

    def __init__(self, model: LlamaModel, prompt: list[int], constraint: Constraint | None, most: int, watch: Sink):
        """See `LlamaModel.generate`."""
        self._model, self._prompt, self._constraint = model, prompt, constraint
        self._most, self._watch = most, watch
        self.ids: list[int] = []
        self.forced, self._chosen = 0, 0  # ids that were forced, and those that were chosen since
        self.finish = ""  # "stop" or "length" in the end

    def choose(self, logits: Any) -> None:
        """Settle the likeliest id, and all that it forces."""
        self._add([self._constraint.choose(logits) if self._constraint else int(logits.argmax())])
        self._chosen += 1
        self.force()

    def force(self) -> None:
        """Settle what the constraint leaves no choice about."""
        while self._constraint and not self.finish and (ids := self._constraint.forced()):
            self.forced += len(self._add(ids))
            self._chosen = 0

    def _add(self, ids: Sequence[int]) -> Sequence[int]:
        ids = ids[: self._most - len(self.ids)]
        if self._constraint:
            self._constraint.accept(ids)
        if self._model.ends(ids[-1]):
            ids, self.finish = ids[:-1], "stop"
        self.ids += ids
        if self._watch:
            self._watch(self._model.decode(self.ids))
        if not self.finish and len(self.ids) == self._most:
            self.finish = "length"
        return ids

    def guess(self) -> list[int]:
        """What may come after the settled ids: the start of a call, or what followed the same words in the prompt."""
        if self._constraint is None:
            return []
        found = self._constraint.possible(self._repeated()) if self.ids else self._constraint.opening()
        return found[: self._most - len(self.ids)]

    def _repeated(self) -> list[int]:
        """What followed the latest place in the prompt of the same last ids, chosen ones only."""
        for length, most in _REPEATS.items():
            tail, prompt = self.ids[-length:], self._prompt
            for place in range(len(prompt) - 1, length - 1, -1) if length <= self._chosen else ():
                if prompt[place - length : place] == tail:
                    return prompt[place : place + most]
        return []
