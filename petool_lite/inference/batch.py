"""Several sequences in one llama.cpp context, decoded together: what `serve --slots` runs.

Each slot has a thread that reads and writes as if it were alone; where it would decode, it hands its tokens over and
waits. One thread puts what is waiting into one batch (continuous batching): the weights are read once for all.
A slot's prompt is taken from another slot as far as that holds it already, which copies nothing.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from petool_lite.errors import PetoolError
from petool_lite.inference.constrain import Constraint
from petool_lite.inference.llama import LlamaModel, Reply
from petool_lite.inference.llama_open import first_error, open_context
from petool_lite.prompt.render import common_length

_GATHER_S = 0.01  # that a batch waits for slots that are choosing a token
_SHORT = 64  # tokens: reads of fewer go before those of more, and are not interrupted


@dataclass(eq=False)
class _Job:
    """Tokens that a slot wants read; `rows` are the logits after that at place `first`, and after all that follow."""

    model: "SlotModel"
    ids: Sequence[int]
    first: int
    taken: int = 0
    rows: list[Any] = field(default_factory=list)
    error: BaseException | None = None
    done: threading.Event = field(default_factory=threading.Event)


class SlotModel(LlamaModel):
    """One sequence of the shared context; for one thread at a time."""

    def __init__(self, slots: "Slots", base: LlamaModel, number: int) -> None:
        """`number` is the sequence's."""
        self.__dict__.update(base.__dict__)
        self._slots, self._seq, self.held = slots, number, list[int]()
        self._rows, self._first = list[Any](), 0  # logits of the last batch, and the place of the first of them

    def close(self) -> None:
        """Nothing: the shared context is the base's."""

    def generate(
        self,
        ids: Sequence[int],
        max_tokens: int,
        constraint: Constraint | None = None,
        reuse: bool = False,
        watch: Callable[[str], None] | None = None,
    ) -> Reply:
        """See LlamaModel."""
        with self._slots.writing():
            return super().generate(ids, max_tokens, constraint, reuse, watch)

    def adopt(self, ids: Sequence[int]) -> None:
        """Hold what another slot holds of `ids`, where that is more."""
        with self._slots.lock:
            best = max(self._slots.models, key=lambda model: common_length(model.held, ids))
            shared = common_length(best.held, ids)
            if shared > common_length(self.held, ids):
                self._keep(0)
                memory = self._lib.llama_get_memory(self._context)
                self._lib.llama_memory_seq_cp(memory, best._seq, self._seq, 0, shared)
                self.held = best.held[:shared]

    def state(self, length: int) -> memoryview:
        """See LlamaModel."""
        with self._slots.lock:
            return super().state(length)

    def restore(self, ids: Sequence[int], data: memoryview) -> bool:
        """See LlamaModel."""
        with self._slots.lock:
            return super().restore(ids, data)

    def _keep(self, length: int) -> None:
        with self._slots.lock:
            memory = self._lib.llama_get_memory(self._context)
            if not self._lib.llama_memory_seq_rm(memory, self._seq, length, -1):
                self._lib.llama_memory_seq_rm(memory, self._seq, -1, -1)
                length = 0
            del self.held[length:]

    def _reserve(self, length: int) -> None:
        if length > self.n_ctx:
            raise PetoolError(f"{length} tokens exceed the context of {self.n_ctx}", "open a larger context")

    def _eval(self, ids: Sequence[int], guess: Sequence[int] = ()) -> None:
        if self.check:
            self.check()
        self._reserve(len(self.held) + len(ids) + len(guess))
        self._first = len(self.held) + len(ids) - 1
        self._rows = self._slots.decode(self, [*ids, *guess], len(ids) - 1)

    def _logits(self, place: int = -1) -> Any:
        return self._rows[place - self._first if place >= 0 else -1]


class Slots:
    """The slots of a model, and the thread that decodes for them. `close` it before the model."""

    def __init__(self, base: LlamaModel, count: int) -> None:
        """Put a context of `count` sequences, of `base.n_ctx` tokens each, in the place of the model's own.

        Raises PetoolError where there is no memory for it.
        """
        self._lib = base._lib
        if base._context:
            self._lib.llama_free(base._context)
            base._context = None
        base._context = open_context(self._lib, base._model, base.n_ctx * count, base.settings, count)
        self.lock = threading.RLock()  # held while the context works, or is changed
        self.models = [SlotModel(self, base, number) for number in range(count)]
        self._vocabulary = self._lib.llama_vocab_n_tokens(base._vocab)
        self._batch = self._lib.llama_batch_init(base.settings.ubatch, 0, 1)
        self._most, self._context = base.settings.ubatch, base._context
        self._abort = self._lib.ggml_abort_callback(self._wanted_no_more)
        self._ready, self._waiting, self._running = threading.Condition(), list[_Job](), list[_Job]()
        self._writing, self._closed = 0, False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._lib.llama_set_abort_callback(self._context, self._abort, None)

    def close(self) -> None:
        """End the thread; no slot may be in use."""
        with self._ready:
            self._closed = True
            self._ready.notify()
        self._thread.join()
        self._lib.llama_batch_free(self._batch)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """While a slot reads and writes a reply, batches wait a moment for it."""
        with self._ready:
            self._writing += 1
        try:
            yield
        finally:
            with self._ready:
                self._writing -= 1

    def decode(self, model: SlotModel, ids: Sequence[int], first: int) -> list[Any]:
        """Read `ids`; the logits after that at place `first` and all that follow, each of shape (vocabulary,).

        Raises PetoolError where the engine fails, and what the model's `check` raises.
        """
        job = _Job(model, ids, first)
        with self._ready:
            self._waiting.append(job)
            self._ready.notify()
        job.done.wait()
        if job.error:
            raise job.error
        return job.rows

    def _run(self) -> None:
        while True:
            with self._ready:
                self._ready.wait_for(lambda: self._waiting or self._closed)
                self._ready.wait_for(lambda: len(self._waiting) >= self._writing, _GATHER_S)
                jobs, self._waiting = self._waiting, []
            if self._closed:
                return
            try:
                self._step(sorted(jobs, key=lambda job: len(job.ids) >= _SHORT))
            except Exception as error:  # else those who wait would wait for ever
                for job in jobs:
                    job.error = error
            for job in jobs:
                if job.error or job.taken == len(job.ids):
                    job.done.set()
            with self._ready:  # what found no room goes first among its kind
                self._waiting = [job for job in jobs if not job.done.is_set()] + self._waiting

    def _step(self, jobs: Sequence[_Job]) -> None:
        """Decode as many tokens of the jobs as a batch has room for, in their order."""
        parts, room = list[tuple[_Job, int]](), self._most
        for job in jobs:
            if count := min(len(job.ids) - job.taken, room):
                parts.append((job, count))
                room -= count
        with self.lock:
            rows = self._fill(parts)
            self._running = [job for job, _ in parts]
            code = self._lib.llama_decode(self._context, self._batch)
            for job, count in parts:
                if code == 0 and not job.error:
                    job.model.held += job.ids[job.taken : job.taken + count]
                    job.taken += count
                    job.rows += [self._row(place) for place in rows[id(job)]]
                else:
                    job.model._keep(len(job.model.held))  # what this batch read of it
            if code != 0 and not any(job.error for job, _ in parts):
                for job, _ in parts:
                    job.model._keep(0)
                    job.error = PetoolError(f"llama.cpp failed to decode (code {code}): {first_error()}")

    def _fill(self, parts: Sequence[tuple[_Job, int]]) -> dict[int, list[int]]:
        """Put tokens into the batch; returns for each job the places whose logits it wants."""
        batch, place = self._batch, 0
        wanted: dict[int, list[int]] = {id(job): [] for job, _ in parts}
        for job, count in parts:
            start = len(job.model.held)
            for index in range(count):
                wants = job.taken + index >= job.first
                batch.token[place], batch.pos[place] = job.ids[job.taken + index], start + index
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, job.model._seq
                batch.logits[place] = wants
                if wants:
                    wanted[id(job)].append(place)
                place += 1
        batch.n_tokens = place
        return wanted

    def _row(self, place: int) -> Any:
        import numpy as np

        found = self._lib.llama_get_logits_ith(self._context, place)
        return np.ctypeslib.as_array(found, shape=(self._vocabulary,)).copy()

    def _wanted_no_more(self, data: Any) -> bool:
        """Called by llama.cpp amid a batch; a large one takes seconds. The others of the batch are read again."""
        if self._batch.n_tokens < _SHORT:
            return False
        for job in self._running:
            try:
                if job.model.check and not job.error:
                    job.model.check()
            except BaseException as error:
                job.error = error
        return any(job.error for job in self._running)
