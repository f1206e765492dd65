"""A GGUF model on the CPU through llama.cpp's C interface: tokenize, greedy decode, timings."""

import codecs
import ctypes
import time
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petool_lite.errors import PetoolError
from petool_lite.families import known_template
from petool_lite.inference.constrain import Constrainer, Constraint
from petool_lite.inference.llama_open import Closing, first_error, held_signals, open_context, open_model
from petool_lite.inference.settings import EngineSettings
from petool_lite.prompt.render import Chat, common_length

# Rows that llama.cpp's flash attention takes at a time; products of a few rows round otherwise than larger ones, too.
_TILE = 64
_AGAIN = "export it again from an instruct model"


@dataclass(frozen=True)
class Reply:
    """A greedy reply: its text and ids without the end token; `finish` is "stop" or "length"; times in seconds.

    `forced_tokens` of the ids were the only ones that a constraint left and were not sampled. `reused_tokens` of the
    prompt were in the engine's memory already. `prefill_s` is the time to the first choice of a token. `confidence` is
    that of the constraint, None without one.
    """

    text: str
    ids: tuple[int, ...]
    finish: str
    prompt_tokens: int
    prefill_s: float
    decode_s: float
    forced_tokens: int = 0
    reused_tokens: int = 0
    confidence: float | None = None


class LlamaModel(Closing):
    """One loaded GGUF file with one context. Use as a context manager; not safe to share between threads."""

    _seq = 0  # the context's sequence that is this model's

    def __init__(
        self, path: Path, n_ctx: int = 0, settings: EngineSettings | None = None, vocab_only: bool = False
    ) -> None:
        """Load `path`, memory-mapped; `n_ctx` in tokens, 0 for the model's own length.

        Raises PetoolError if it does not load.
        """
        self._context: Any = None
        self._held: list[int] = []  # ids whose keys and values are in the engine's memory
        self.settings = settings or EngineSettings()
        self.exact_reuse = False  # see `read`
        self.check: Callable[[], None] | None = None  # called before and amid batches; what it raises ends the request
        self._raised: BaseException | None = None
        self._signals: list[int] = []  # that came amid a batch
        self._lib, self._model = open_model(path, vocab_only)
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        self.metadata = self._read_metadata()
        self.n_ctx = n_ctx or self.train_ctx
        if not vocab_only:
            callback = self._lib.llama_cpp.ggml_abort_callback
            self._abort, self._no_abort = callback(self._wanted_no_more), callback()
            try:
                self._context = open_context(self._lib, self._model, self.n_ctx, self.settings)
            except PetoolError:
                self.close()
                raise

    def _wanted_no_more(self, data: Any) -> bool:
        """Called by llama.cpp amid a large batch, which takes seconds."""
        try:
            if self.check:
                self.check()
        except BaseException as error:
            self._raised = error
        return self._raised is not None or bool(self._signals)

    def close(self) -> None:
        """Free the model; calling it again does nothing."""
        if self._context:
            self._lib.llama_free(self._context)
        if self._model:
            self._lib.llama_model_free(self._model)
        self._context = self._model = None

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
        name = self.metadata.get("general.name", "")
        template = self.metadata.get("tokenizer.chat_template") or known_template(name)
        if not template:
            raise PetoolError("the GGUF file lacks the key tokenizer.chat_template", _AGAIN)
        return Chat(
            lambda texts: [self.encode(text) for text in texts],
            template,
            self._token_text(self._special("bos")),
            self._token_text(self._end),
            self._end,
        )

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
        known = found.isdecimal() and int(found) < self._lib.llama_vocab_n_tokens(self._vocab)
        return int(found) if known else -1

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
        buffer, decoder = ctypes.create_string_buffer(1024), codecs.getincrementaldecoder("utf-8")("replace")
        found = []
        for token in ids:
            length = self._lib.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, True)
            found.append(decoder.decode(buffer.raw[: max(length, 0)]))
        return [*found[:-1], found[-1] + decoder.decode(b"", final=True)] if found else []

    def stop_ids(self) -> frozenset[int]:
        """The ids that end a reply."""
        count = self._lib.llama_vocab_n_tokens(self._vocab)
        return frozenset(token for token in range(count) if self._lib.llama_vocab_is_eog(self._vocab, token))

    def constrainer(self) -> Constrainer:
        """Makes constraints for this model's tokenizer; takes under a second, so keep it."""
        from llguidance.llamacpp import lltokenizer_from_vocab

        eos = self._end
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # it uses an old name of a function
            return Constrainer(lltokenizer_from_vocab(self._vocab, eos_token=eos))

    def generate(
        self,
        ids: Sequence[int],
        max_tokens: int,
        constraint: Constraint | None = None,
        reuse: bool = False,
        watch: Callable[[str], None] | None = None,
    ) -> Reply:
        """Decode greedily from `ids` until an end token or `max_tokens` new tokens, under `constraint` if given.

        With `reuse`, what the memory shares with `ids` is not read again. `watch` gets the reply's text as it grows.
        Raises PetoolError if the prompt and the reply do not fit the context, or the engine fails.
        """
        if len(ids) + max_tokens > self.n_ctx:
            raise PetoolError(
                f"{len(ids)} prompt tokens and {max_tokens} for the reply exceed the context of {self.n_ctx}",
                "trim the history or open a larger context",
            )
        started = time.perf_counter()
        # What a constraint forces at the very start is read together with the prompt.
        head = constraint.forced() if constraint else []
        head = head[: head.index(constraint.eos_id)] if constraint and constraint.eos_id in head else head
        if constraint:
            constraint.accept(head[:max_tokens])
        reused = self.read([*ids, *head[:max_tokens]], reuse)
        prefilled = time.perf_counter()
        reply, finish, forced = self._decode(head[:max_tokens], max_tokens, constraint, watch)
        ended = time.perf_counter()
        times = (prefilled - started, ended - prefilled)
        confidence = constraint.confidence if constraint else None
        return Reply(self.decode(reply), tuple(reply), finish, len(ids), *times, forced, reused, confidence)

    def read(self, ids: Sequence[int], reuse: bool = True) -> int:
        """Read `ids` so that the next token can be chosen; returns how many of them the memory held already.

        With `exact_reuse` set, the logits are those of a reading from the start, to the bit: matrix products of few
        rows round otherwise than those of many, so no part is shorter than it would be there, or than _TILE.
        """
        step = self.settings.ubatch  # one matrix product a call, so that Ctrl-C is heard in between
        shared = min(common_length(self._held, ids), len(ids) - 1) if reuse else 0
        shared = _exact_start(shared, len(ids), step) if self.exact_reuse else shared
        self._keep(shared)
        offset = shared
        while offset < len(ids):
            end = offset // step * step + step if self.exact_reuse else offset + step
            self._eval(ids[offset:end])
            offset = min(end, len(ids))
        return shared

    def adopt(self, ids: Sequence[int]) -> None:
        """Take over what is held of `ids` elsewhere; see `SlotModel`."""

    def _keep(self, length: int) -> None:
        """Drop all but the first `length` ids from memory."""
        memory = self._lib.llama_get_memory(self._context)
        if length == 0 or not self._lib.llama_memory_seq_rm(memory, self._seq, length, -1):
            self._lib.llama_memory_clear(memory, True)
            length = 0
        del self._held[length:]

    def state(self, length: int) -> memoryview:
        """The engine's state after the first `length` ids in memory; the others are dropped."""
        if not 0 < length <= len(self._held):
            raise PetoolError(f"no state after {length} tokens: the memory holds {len(self._held)}")
        self._keep(length)
        size = self._lib.llama_state_seq_get_size(self._context, self._seq)
        buffer = (ctypes.c_uint8 * size)()
        written = self._lib.llama_state_seq_get_data(self._context, buffer, size, self._seq)
        if written != size:
            raise PetoolError(f"llama.cpp gave {written} of {size} bytes of its state")
        return memoryview(buffer).cast("B")

    def restore(self, ids: Sequence[int], data: memoryview) -> bool:
        """Put a state of `state` back, as read after `ids`; False if the engine refuses it, and the memory is empty."""
        import numpy as np

        self._keep(0)
        address = np.frombuffer(data, dtype=np.uint8).ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        taken = self._lib.llama_state_seq_set_data(self._context, address, data.nbytes, self._seq)
        top = self._lib.llama_memory_seq_pos_max(self._lib.llama_get_memory(self._context), self._seq)
        if taken != data.nbytes or top != len(ids) - 1:
            self._keep(0)
            return False
        self._held = list(ids)
        return True

    @property
    def held(self) -> Sequence[int]:
        """The ids in the engine's memory."""
        return self._held

    def _decode(
        self,
        reply: list[int],
        max_tokens: int,
        constraint: Constraint | None,
        watch: Callable[[str], None] | None,
    ) -> tuple[list[int], str, int]:
        """Reply ids without the end token, why it ended, and how many ids were forced; `reply` is read already."""
        forced_tokens = len(reply)
        while len(reply) < max_tokens:
            forced = constraint.forced() if constraint else []
            choose = constraint.choose if constraint else lambda logits: int(logits.argmax())
            step = (forced or [choose(self._logits(-1))])[: max_tokens - len(reply)]
            if constraint:
                constraint.accept(step)
            ended = self._lib.llama_vocab_is_eog(self._vocab, step[-1])
            step = step[:-1] if ended else step
            reply = reply + step
            forced_tokens += len(step) if forced else 0
            if watch:
                watch(self.decode(reply))
            if ended:
                return reply, "stop", forced_tokens
            if len(reply) < max_tokens:
                self._eval(step)
        return reply, "length", forced_tokens

    def _logits(self, place: int) -> Any:
        """Logits after the token at `place` of the last batch, shape (vocabulary,); valid until the next batch."""
        import numpy as np

        size = self._lib.llama_vocab_n_tokens(self._vocab)
        return np.ctypeslib.as_array(self._lib.llama_get_logits_ith(self._context, place), shape=(size,))

    def shares(self, ids: Sequence[int], choices: Sequence[Sequence[int]]) -> list[float]:
        """Each choice's probability among them as the continuation of `ids`: the product of those of its ids, each
        renormalised over the ids that a choice can go on with (see `Constraint`). None of the choices is kept.

        Choices that share a beginning share its reading; none is the beginning of another. Raises PetoolError if the
        engine fails.
        """
        import numpy as np

        self.read(ids)
        found, path, rows = {}, list[int](), [self._logits(-1).astype(np.float64)]
        for choice in sorted({tuple(choice) for choice in choices}):
            shared = min(common_length(path, choice), len(choice) - 1, len(rows) - 1)
            self._keep(len(ids) + shared)
            path, rows = list(choice), rows[: shared + 1]
            if fresh := path[shared:-1]:  # what follows the last token does not matter
                self._eval(fresh, every=True)
                rows += [self._logits(place).astype(np.float64) for place in range(len(fresh))]
            share = 1.0
            for depth, row in enumerate(rows):
                others = {other[depth] for other in choices if list(other[:depth]) == path[:depth]}
                share /= float(np.exp(row[list(others)] - row[path[depth]]).sum())
            found[choice] = share
        self._keep(len(ids))
        return [found[tuple(choice)] for choice in choices]

    def _eval(self, ids: Sequence[int], every: bool = False) -> None:
        """Read `ids` after what is held; logits of the last one, or of `every` one, can be had then."""
        lib, count = self._lib, len(ids)
        if self.check:
            self.check()
        lib.llama_set_abort_callback(self._context, self._abort if count > _TILE else self._no_abort, None)
        batch = lib.llama_batch_init(count, 0, 1)
        try:
            batch.n_tokens = count
            for place, token in enumerate(ids):
                batch.token[place] = token
                batch.pos[place] = len(self._held) + place
                batch.n_seq_id[place] = 1
                batch.seq_id[place][0] = 0
                batch.logits[place] = every or place == count - 1
            with held_signals() as self._signals:
                code = lib.llama_decode(self._context, batch)
        finally:
            lib.llama_batch_free(batch)
        if raised := self._raised:
            self._raised = None
            self._keep(len(self._held))
            raise raised
        if code != 0:
            self._keep(0)
            raise PetoolError(f"llama.cpp failed to decode (code {code}): {first_error()}")
        self._held += ids


def _exact_start(shared: int, length: int, step: int) -> int:
    """The most of `shared` ids to keep so that the rest of `length` is read as a reading from the start reads it.

    That one reads parts of `step` ids and a last one, each in tiles of _TILE rows. The part from here to the next
    multiple of `step` must begin with a tile and have as many rows as there, or at least one tile.
    """
    start = shared // step * step
    rows = min(start + step, length) - start
    return max(start, min(shared, start + rows - _TILE) // _TILE * _TILE)
