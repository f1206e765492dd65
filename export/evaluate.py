"""A GGUF file, and a LoRA file on top of it if wanted, in llama.cpp: logits of given answers, and greedy replies.

Scoring uses petool_lite.inference as it is; this adds what scoring does not need, the logits of every answer token.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petool_lite.errors import PetoolError
from petool_lite.inference.llama import LlamaModel
from petool_lite.inference.llama_log import first_error
from petool_lite.models import check_gguf


@dataclass(frozen=True)
class Outcome:
    """`logits`: float32 numpy (answer tokens, vocabulary). `reply`: greedy ids; `stopped`: it ended by itself."""

    logits: Any
    reply: tuple[int, ...]
    stopped: bool


class Evaluator(LlamaModel):
    """One GGUF file with a LoRA file applied, if given."""

    def __init__(self, path: Path, n_ctx: int, lora: Path | None = None) -> None:
        """Load both; `n_ctx` holds a prompt with its answer or reply. Raises PetoolError if one does not load."""
        super().__init__(path, n_ctx)
        if lora is not None:
            try:
                self._apply(lora)
            except PetoolError:
                self.close()
                raise

    def _apply(self, lora: Path) -> None:
        check_gguf(lora)
        adapter = self._lib.llama_adapter_lora_init(self._model, str(lora).encode())
        adapters = (self._lib.llama_adapter_lora_p_ctypes * 1)(adapter) if adapter else None
        scales = (ctypes.c_float * 1)(1.0)
        if not adapters or self._lib.llama_set_adapters_lora(self._context, adapters, 1, scales) != 0:
            raise PetoolError(f"llama.cpp cannot apply {lora}: {first_error()}", "this is a fault of the export")

    def run(self, prompt: Sequence[int], answer: Sequence[int], max_reply: int) -> Outcome:
        """Logits for each token of `answer` after `prompt`, and what the model says greedily after `prompt` itself."""
        import numpy as np

        self.read(prompt, reuse=False)
        parts = [self._logits(-1).copy()[None]]
        # one more than is kept, to see whether the reply ends there
        reply, finish, _ = self._decode([], max_reply + 1, None, None)
        self._keep(len(prompt))
        step = self.settings.ubatch
        for first in range(0, len(answer) - 1, step):
            given = answer[:-1][first : first + step]
            self._eval(given, every=True)
            parts.append(np.stack([self._logits(place) for place in range(len(given))]))
        return Outcome(np.concatenate(parts), tuple(reply[:max_reply]), finish == "stop")
