"""A llama.cpp context, and the one place that fills its batches. Each slot of `serve --slots` has a thread that works
as if it were alone; one more puts the tokens that they decode next into one batch (continuous batching): weights are
read once for all. What several slots hold of the same prompt is held once: a token looks at the cells of all slots."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from petool_lite.errors import PetoolError
from petool_lite.inference.llama_open import EngineSettings, first_error, held_signals
from petool_lite.places import default_threads
from petool_lite.prompt.render import common_length

if TYPE_CHECKING:
    from petool_lite.inference.llama import LlamaModel

_BATCH = 2048  # the most tokens in one call of llama_decode
_KV_TYPES = {"f16": 1, "q8_0": 8}  # ggml's numbers
_GATHER_S = 0.01  # that a batch waits for slots that are choosing a token
_SHORT = 64  # tokens: reads of fewer go before those of more, and are not interrupted


@dataclass(eq=False)
class _Job:
    """Tokens that a model reads next, `taken` of them so far; see `Context.read`."""

    model: "LlamaModel"
    ids: Sequence[int]
    first: int
    taken: int = 0
    rows: list[Any] = field(default_factory=list)
    error: BaseException | None = None
    done: threading.Event = field(default_factory=threading.Event)

    @property
    def over(self) -> bool:
        return self.error is not None or self.taken == len(self.ids)

    def ahead(self) -> list[int]:
        """All that the model holds when the first row is had."""
        return [*self.model.held, *self.ids[self.taken : self.first]]


class Context:
    """A context for one model; `size` in tokens, 0 while it is not open. `lock` is held while it works or changes."""

    def __init__(self, lib: Any, model: Any, settings: EngineSettings) -> None:
        """For llama.cpp's `model`; `open` it before anything is read."""
        self._lib, self._model, self._settings = lib, model, settings
        self.pointer: Any = None
        self.size = 0
        self.lock = threading.RLock()
        self._vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
        self._running: list[_Job] = []
        self._signals: list[int] = []  # that came amid a batch
        self._abort, self._no_abort = lib.ggml_abort_callback(self._unwanted), lib.ggml_abort_callback()

    def open(self, size: int, sequences: int = 1) -> None:
        """Have room for `size` tokens, which the sequences share. Raises PetoolError where there is no memory."""
        lib, settings, options = self._lib, self._settings, self._lib.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = size, _BATCH, settings.ubatch
        options.n_seq_max, options.kv_unified = sequences, True
        options.n_threads = settings.threads_decode or default_threads()
        options.n_threads_batch = settings.threads_prefill or default_threads()
        options.flash_attn_type = int(settings.flash_attention)  # 0 is disabled, 1 enabled, -1 as llama.cpp likes
        options.type_k = options.type_v = _KV_TYPES[settings.kv_type]
        with held_signals():
            self.pointer = lib.llama_init_from_model(self._model, options)
        if not self.pointer:
            raise PetoolError(f"llama.cpp cannot open a context of {size} tokens: {first_error()}", "use less")
        self._batch, self.size = lib.llama_batch_init(settings.ubatch, 0, 1), size

    def close(self) -> None:
        """Free it; calling it again does nothing."""
        if self.pointer:
            self._lib.llama_batch_free(self._batch)
            self._lib.llama_free(self.pointer)
        self.pointer, self.size = None, 0

    def share(self, model: "LlamaModel", ids: Sequence[int]) -> None:
        """Let `model` hold what others hold of `ids`: here there is no other."""

    def read(self, model: "LlamaModel", ids: Sequence[int], first: int) -> list[Any]:
        """Read `ids` behind what `model` holds; the logits, (vocabulary,) each, after that at place `first` and all
        that follow. Raises PetoolError where the engine fails, and what the model's `check` raises."""
        self._run(job := _Job(model, ids, first))
        if job.error:
            raise job.error
        return job.rows

    def _run(self, job: _Job) -> None:
        while not job.over:
            self._step([job])

    def _step(self, jobs: Sequence[_Job]) -> None:
        """Decode as many tokens of the jobs as a batch has room for, in their order."""
        with self.lock:
            code, parts = -1, self._fill(jobs)
            self._running, self._signals = [job for job, _, _ in parts], []
            if not self._unwanted():
                abort = self._abort if self._batch.n_tokens > _SHORT else self._no_abort
                self._lib.llama_set_abort_callback(self.pointer, abort, None)
                with held_signals() as self._signals:
                    code = self._lib.llama_decode(self.pointer, self._batch)
            broken = code != 0 and not self._signals and not any(job.error for job in self._running)
            for job, end, shift in parts:
                if code == 0 and not job.error:
                    job.rows += [self._row(index + shift) for index in range(max(job.taken, job.first), end)]
                    job.model.held += job.ids[job.taken : end]
                    job.taken = end
                else:  # what this batch read of it
                    job.model._keep(0 if broken else len(job.model.held))
                if broken:
                    job.error = PetoolError(f"llama.cpp failed to decode (code {code}): {first_error()}")

    def _fill(self, jobs: Sequence[_Job]) -> list[tuple[_Job, int, int]]:
        """Fill the batch; for each job in it, up to which of its tokens, and their places beyond their indices."""
        batch, place, parts = self._batch, 0, list[tuple[_Job, int, int]]()
        for job in jobs:
            end = min(len(job.ids), job.taken + self._settings.ubatch - place)
            if end > job.taken:
                parts.append((job, end, place - job.taken))
            start = len(job.model.held) - job.taken
            for index in range(job.taken, end):
                batch.token[place], batch.pos[place] = job.ids[index], start + index
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, job.model.sequence
                batch.logits[place] = index >= job.first
                place += 1
        batch.n_tokens = place
        return parts

    def _row(self, place: int) -> Any:
        import numpy as np

        found = self._lib.llama_get_logits_ith(self.pointer, place)
        return np.ctypeslib.as_array(found, shape=(self._vocabulary,)).copy()

    def _unwanted(self, data: Any = None) -> bool:
        """Whether a job of the batch is no longer wanted: llama.cpp asks amid a large one. Others are read again."""
        for job in self._running:
            try:
                if job.model.check and not job.error:
                    job.model.check()
            except BaseException as error:
                job.error = error
        return bool(self._signals) or any(job.error for job in self._running)


class Slots(Context):
    """A context for several models, and the thread that decodes for them."""

    def __init__(self, lib: Any, model: Any, settings: EngineSettings, models: "Sequence[LlamaModel]") -> None:
        """`models` have a sequence each, of `n_ctx` tokens. Raises PetoolError where there is no memory for them."""
        super().__init__(lib, model, settings)
        self.open(sum(model.n_ctx for model in models), len(models))
        self.models, self._closed = models, False
        self._ready, self._waiting = threading.Condition(), list[_Job]()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread and free the context; no slot may be in use."""
        with self._ready:
            self._closed = True
            self._ready.notify()
        self._thread.join()
        super().close()

    def share(self, model: "LlamaModel", ids: Sequence[int]) -> None:
        """Let `model` hold what another slot holds of `ids`, in that one's cells also as far as it has its own."""
        with self.lock:
            known = {other: common_length(other.held, ids) for other in self.models}
            own = known.pop(model)
            best = max(known, key=lambda other: known[other], default=None)
            memory = self._lib.llama_get_memory(self.pointer)
            if best is None or not (shared := known[best]):
                return
            model._keep(own)
            if self._lib.llama_memory_seq_rm(memory, model.sequence, 0, shared):
                self._lib.llama_memory_seq_cp(memory, best.sequence, model.sequence, 0, shared)
                model.held = list(ids[: max(own, shared)])

    def _run(self, job: _Job) -> None:
        with self._ready:
            self._waiting.append(job)
            self._ready.notify()
        job.done.wait()

    def _serve(self) -> None:
        while True:
            with self._ready:
                self._ready.wait_for(lambda: self._waiting or self._closed)
                self._ready.wait_for(lambda: len(self._waiting) >= sum(item.busy for item in self.models), _GATHER_S)
                jobs, self._waiting = self._waiting, []
            if self._closed:
                return
            try:
                self._step(self._next(jobs))
            except Exception as error:  # else those who wait would wait for ever
                for job in jobs:
                    job.error = error
            for job in jobs:
                if job.over:
                    job.done.set()
            with self._ready:  # what found no room goes first among its kind
                self._waiting = [job for job in jobs if not job.over] + self._waiting

    def _next(self, jobs: Sequence[_Job]) -> list[_Job]:
        """The jobs of the next batch, the short ones first. What one slot has read or is reading no other one reads."""
        long = list[_Job]()
        for job in (job for job in jobs if len(job.ids) >= _SHORT):
            held = len(job.model.held)
            self.share(job.model, job.ahead())
            job.taken += len(job.model.held) - held
            if not any(common_length(job.ahead(), other.ahead()) > len(job.model.held) for other in long):
                long.append(job)
        return [job for job in jobs if len(job.ids) < _SHORT] + long
