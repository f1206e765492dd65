"""A GGUF file, and a LoRA file on top of it if wanted, in llama.cpp: logits of given answers, and greedy replies.

Scoring uses petool_lite.inference; this shows what scoring does not need, the logits of every answer token.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petool_lite.base import check_gguf
from petool_lite.errors import PetoolError
from petool_lite.inference.llama_open import Closing, open_context, open_model
from petool_lite.inference.settings import EngineSettings
from petool_lite.llama_log import first_error

_BATCH = 512


@dataclass(frozen=True)
class Outcome:
    """`logits`: float32 numpy (answer tokens, vocabulary). `reply`: greedy ids; `stopped`: it ended by itself."""

    logits: Any
    reply: tuple[int, ...]
    stopped: bool


class Evaluator(Closing):
    """One loaded file with one context of `n_ctx` tokens. Use as a context manager."""

    def __init__(self, path: Path, n_ctx: int, lora: Path | None = None) -> None:
        """Load `path`; raises PetoolError if it, or the LoRA file, does not load."""
        self._context: Any = None
        self._lib, self._model = open_model(path)
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        self._size = self._lib.llama_vocab_n_tokens(self._vocab)
        try:
            self._context = open_context(self._lib, self._model, n_ctx, EngineSettings(ubatch=_BATCH))
        except PetoolError:
            self.close()
            raise
        if lora is not None:
            self._apply(lora)

    def _apply(self, lora: Path) -> None:
        check_gguf(lora)
        adapter = self._lib.llama_adapter_lora_init(self._model, str(lora).encode())
        if not adapter:
            self.close()
            raise PetoolError(f"llama.cpp cannot apply {lora}: {first_error()}", "this is a fault of the export")
        adapters = (self._lib.llama_adapter_lora_p_ctypes * 1)(adapter)
        if self._lib.llama_set_adapters_lora(self._context, adapters, 1, (ctypes.c_float * 1)(1.0)) != 0:
            self.close()
            raise PetoolError(f"llama.cpp cannot apply {lora}: {first_error()}", "this is a fault of the export")

    def close(self) -> None:
        """Free the model and its adapters; calling it again does nothing."""
        if self._context:
            self._lib.llama_free(self._context)
        if self._model:
            self._lib.llama_model_free(self._model)
        self._context = self._model = None

    def run(self, prompt: Sequence[int], answer: Sequence[int], max_reply: int) -> Outcome:
        """Logits for each token of `answer` after `prompt`, and what the model says greedily after `prompt` itself."""
        import numpy as np

        memory = self._lib.llama_get_memory(self._context)
        self._lib.llama_memory_clear(memory, True)
        for first in range(0, len(prompt), _BATCH):
            self._decode(prompt[first : first + _BATCH], first, every=False)
        start = self._logits(-1)
        given = list(answer[:-1])
        parts = [start]
        for first in range(0, len(given), _BATCH):
            self._decode(given[first : first + _BATCH], len(prompt) + first, every=True)
            parts += [self._logits(index) for index in range(len(given[first : first + _BATCH]))]
        self._lib.llama_memory_seq_rm(memory, 0, len(prompt), -1)
        reply: list[int] = []
        token = int(start.argmax())
        while not self._lib.llama_vocab_is_eog(self._vocab, token) and len(reply) < max_reply:
            reply.append(token)
            self._decode([token], len(prompt) + len(reply) - 1, every=False)
            token = int(self._logits(-1).argmax())
        return Outcome(np.stack(parts), tuple(reply), bool(self._lib.llama_vocab_is_eog(self._vocab, token)))

    def _logits(self, index: int) -> Any:
        import numpy as np

        pointer = self._lib.llama_get_logits_ith(self._context, index)
        return np.ctypeslib.as_array(pointer, shape=(self._size,)).copy()

    def _decode(self, ids: Sequence[int], position: int, every: bool) -> None:
        """Append `ids` at `position`; keep the logits of each, or of the last only."""
        batch = self._lib.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for index, token in enumerate(ids):
                batch.token[index], batch.pos[index] = token, position + index
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
                batch.logits[index] = every or index == len(ids) - 1
            code = self._lib.llama_decode(self._context, batch)
        finally:
            self._lib.llama_batch_free(batch)
        if code != 0:
            raise PetoolError(f"llama.cpp failed to decode (code {code}): {first_error()}")
