"""A GGUF model on the CPU through llama.cpp's C interface: tokenize, greedy decode, timings.

The only module that imports llama_cpp for inference. It uses the C interface because the high-level class
cannot turn off `use_extra_bufts`: on machines with AMX those kernels crash in builds by some compilers.
"""

import ctypes
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from petool_lite.base import check_gguf
from petool_lite.errors import PetoolError
from petool_lite.inference.constrain import Constrainer, Constraint
from petool_lite.llama_log import first_error, quiet
from petool_lite.prompt import Chat

_BATCH = 512  # tokens a prefill call, and the widest matrix product


@dataclass(frozen=True)
class Reply:
    """A greedy reply: its text and ids without the end token; `finish` is "stop" or "length"; times in seconds.

    `forced_tokens` of the ids were the only ones that a constraint left, and were not sampled.
    """

    text: str
    ids: tuple[int, ...]
    finish: str
    prompt_tokens: int
    prefill_s: float
    decode_s: float
    forced_tokens: int = 0


def default_threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class LlamaModel:
    """One loaded GGUF file with one context. Use as a context manager; not safe to share between threads."""

    def __init__(self, path: Path, n_ctx: int = 0, threads: int = 0, vocab_only: bool = False) -> None:
        """Load `path`; `n_ctx` in tokens, 0 for the model's own length. Raises PetoolError if it does not load."""
        import llama_cpp

        check_gguf(path)
        quiet(llama_cpp)
        self._lib = llama_cpp
        self._context: Any = None
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        settings.use_extra_bufts = False  # AMX kernels may crash, see the module's docstring
        settings.n_gpu_layers = 0
        settings.vocab_only = vocab_only
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
        if not self._model:
            raise PetoolError(
                f"llama.cpp cannot load {path}: {first_error()}", "the file may be damaged; export it again"
            )
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.metadata = self._read_metadata()
        self.n_ctx = n_ctx or self.train_ctx
        if not vocab_only:
            self._open_context(threads or default_threads())

    def _open_context(self, threads: int) -> None:
        settings = self._lib.llama_context_default_params()
        settings.n_ctx = self.n_ctx
        settings.n_batch = settings.n_ubatch = _BATCH
        settings.n_threads = settings.n_threads_batch = threads
        # Flash attention speeds prefill by a quarter here but halves decode on small models.
        settings.flash_attn_type = self._lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = self._lib.llama_init_from_model(self._model, settings)
        if not self._context:
            self.close()
            raise PetoolError(f"llama.cpp cannot open a context of {self.n_ctx} tokens: {first_error()}", "use less")

    def __enter__(self) -> "LlamaModel":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the model; calling it again does nothing."""
        if self._context:
            self._lib.llama_free(self._context)
        if self._model:
            self._lib.llama_model_free(self._model)
        self._context = self._model = None

    def _read_metadata(self) -> dict[str, str]:
        def read(function: Any, index: int) -> str:
            size = 256
            while True:
                buffer = ctypes.create_string_buffer(size)
                length = function(self._model, index, buffer, size)
                if length < size:
                    return buffer.value.decode("utf-8", "replace")
                size = length + 1

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
        template = self.metadata.get("tokenizer.chat_template")
        if not template:
            raise PetoolError("the GGUF file has no chat template", "export it again from an instruct model")
        eos = self._lib.llama_vocab_eos(self._vocab)
        bos = self._lib.llama_vocab_bos(self._vocab)
        return Chat(
            lambda texts: [self.encode(text) for text in texts],
            template,
            self._token_text(bos),
            self._token_text(eos),
            eos,
        )

    def _token_text(self, token: int) -> str:
        text = self._lib.llama_vocab_get_text(self._vocab, token) if token >= 0 else b""
        return (text or b"").decode("utf-8", "replace")

    def encode(self, text: str) -> list[int]:
        """Token ids; special tokens in the text are read as such, none is added."""
        raw = text.encode()
        buffer = (self._lib.llama_token * (len(raw) + 8))()
        count = self._lib.llama_tokenize(self._vocab, raw, len(raw), buffer, len(buffer), False, True)
        if count < 0:
            raise PetoolError(f"llama.cpp cannot tokenize a text of {len(raw)} bytes")
        return list(buffer[:count])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`."""
        buffer = ctypes.create_string_buffer(1024)
        pieces = []
        for token in ids:
            length = self._lib.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, True)
            pieces.append(buffer.raw[: max(length, 0)])
        return b"".join(pieces).decode("utf-8", "replace")

    def constrainer(self) -> Constrainer:
        """Makes constraints for this model's tokenizer; takes under a second, so keep it."""
        from llguidance.llamacpp import lltokenizer_from_vocab

        eos = self._lib.llama_vocab_eos(self._vocab)
        return Constrainer(lltokenizer_from_vocab(self._vocab, eos_token=eos))

    def generate(self, ids: Sequence[int], max_tokens: int, constraint: Constraint | None = None) -> Reply:
        """Decode greedily from `ids` until an end token or `max_tokens` new tokens, under `constraint` if given.

        Raises PetoolError if the prompt and the reply do not fit the context, or the engine fails.
        """
        if len(ids) + max_tokens > self.n_ctx:
            raise PetoolError(
                f"{len(ids)} prompt tokens and {max_tokens} for the reply exceed the context of {self.n_ctx}",
                "trim the history or open a larger context",
            )
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        started = time.perf_counter()
        for offset in range(0, len(ids), _BATCH):
            self._eval(ids[offset : offset + _BATCH])
        prefilled = time.perf_counter()
        reply, finish, forced = self._decode(max_tokens, constraint)
        ended = time.perf_counter()
        times = (prefilled - started, ended - prefilled)
        return Reply(self.decode(reply), tuple(reply), finish, len(ids), *times, forced)

    def _decode(self, max_tokens: int, constraint: Constraint | None) -> tuple[list[int], str, int]:
        """Reply ids without the end token, why it ended, and how many ids were forced."""
        reply: list[int] = []
        forced_tokens = 0
        while len(reply) < max_tokens:
            forced = constraint.forced() if constraint else []
            step = (forced or [self._choose(constraint)])[: max_tokens - len(reply)]
            if constraint:
                constraint.accept(step)
            ended = self._lib.llama_vocab_is_eog(self._vocab, step[-1])
            step = step[:-1] if ended else step
            reply += step
            forced_tokens += len(step) if forced else 0
            if ended:
                return reply, "stop", forced_tokens
            if len(reply) < max_tokens:
                self._eval(step)
        return reply, "length", forced_tokens

    def _choose(self, constraint: Constraint | None) -> int:
        import numpy as np

        size = self._lib.llama_vocab_n_tokens(self._vocab)
        logits = np.ctypeslib.as_array(self._lib.llama_get_logits_ith(self._context, -1), shape=(size,))
        return constraint.choose(logits) if constraint else int(logits.argmax())

    def _eval(self, ids: Sequence[int]) -> None:
        tokens = (self._lib.llama_token * len(ids))(*ids)
        code = self._lib.llama_decode(self._context, self._lib.llama_batch_get_one(tokens, len(ids)))
        if code != 0:
            raise PetoolError(f"llama.cpp failed to decode (code {code}): {first_error()}")
