"""A base model with its adapter through transformers' modules on a GPU: token ids in, greedy replies out, in batches.

Prompts are sorted by length, so that a batch's memory is about as long as each of its prompts, and decoded together
by `inference.decoder`. Replies come when their batch is done.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from petool_lite.errors import MACHINE, PetoolError
from petool_lite.families import end_tokens
from petool_lite.inference.constrain import Constraint
from petool_lite.inference.decoder import ROWS, Decoder, Memory, Steps
from petool_lite.inference.llama import Reply
from petool_lite.prompt.render import Chat

BATCH = ROWS
_MEMORY_TOKENS = 262_144  # prompt and reply tokens of a batch, at most: 30 GB for a 3B model
_LENGTH_STEP = 256  # memories grow in steps, so that batches of like lengths share a CUDA graph


def left_padded(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Any, Any]:
    """Prompts as one tensor (prompts, longest), padded on the left as generation needs it, and its attention mask."""
    import torch

    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def gpu_available() -> bool:
    """Whether torch finds a GPU."""
    import torch

    return bool(torch.cuda.is_available())


def _own_gpu() -> str:
    """This process's GPU: under torchrun or accelerate the one of its place on this machine."""
    import torch

    place, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if place >= count:
        raise PetoolError(f"process {place + 1} has no GPU of its own: torch finds {count}", "start fewer", MACHINE)
    return f"cuda:{place}"


def stop_ids(directory: Path, chat: Chat) -> frozenset[int]:
    """The ids that end a reply: the same ones as llama.cpp's for the GGUF file of the same model."""
    return frozenset({chat.eos_id, *end_tokens(directory).values()})


def load_causal_model(directory: Path, adapter: Path | None, precision: str, device: str) -> Any:
    """A transformers model in bfloat16 with its adapter merged ("bf16"), or in 4 bits with the adapter on it ("nf4").

    The 4-bit form is the one that training sees: NF4 with double quantization, adapter and arithmetic in bfloat16.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": {"": device}, "use_safetensors": True}
    if precision == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model: Any = AutoModelForCausalLM.from_pretrained(directory, **options)
    if adapter is not None:
        from peft import PeftModel

        merge = precision != "nf4"  # a merged weight is summed in float32 and rounded once
        model = PeftModel.from_pretrained(model, str(adapter), autocast_adapter_dtype=merge)
        model = model.merge_and_unload() if merge else model.to(torch.bfloat16)
    return model.eval()


@dataclass
class _Row:
    """One reply in the making; `forced` ids are known ahead of the model."""

    index: int
    constraint: Constraint | None
    length: int
    ids: list[int] = field(default_factory=list)
    forced: list[int] = field(default_factory=list)
    finish: str = ""

    def bits(self, width: int) -> Any:
        """The allowed next ids as `width` bytes, bit i of byte j for id 8j + i."""
        import numpy as np

        row: Any = np.zeros(width, dtype=np.uint8)
        if self.constraint and not self.finish and not self.forced:
            self.forced = self.constraint.forced()
            if not self.forced:
                bits = self.constraint.bits()[:width]  # the head may be padded beyond the tokenizer's ids
                row[: bits.size] = bits
        return row

    def accept(self, chosen: int, stops: frozenset[int]) -> None:
        """Go on by the chosen id, or by the one that is forced; `stops` end the reply."""
        if self.finish:
            return
        token = self.forced.pop(0) if self.forced else chosen
        if self.constraint:
            self.constraint.accept([token])
        if token in stops:
            self.finish = "stop"
            return
        self.ids.append(token)
        if len(self.ids) >= self.length:
            self.finish = "length"


@dataclass(frozen=True)
class Job:
    """What is asked of every prompt: the longest reply, its end tokens, ids to text, and the constraint by index.

    `lengths` by index are for measuring speed: replies of at most so many tokens (without `stops`, of just so many).
    """

    max_tokens: int
    eos_id: int
    stops: frozenset[int]
    decode: Callable[[list[int]], str]
    constrain: Callable[[int], Constraint] | None = None
    lengths: Sequence[int] | None = None


class GpuModel:
    """A loaded model. Raises PetoolError where there is no GPU, or the model does not fit it."""

    def __init__(
        self, directory: Path, adapter: Path | None, precision: str = "bf16", device: str | None = None
    ) -> None:
        """`precision` is "bf16" or "nf4"; `device` None is this process's GPU (LOCAL_RANK's under torchrun)."""
        import torch

        if device is None and not torch.cuda.is_available():
            raise PetoolError("the GPU variants need a GPU, and torch finds none", "bench the GGUF variants", MACHINE)
        device = device or _own_gpu()
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
            torch.cuda.reset_peak_memory_stats()
            # Partial sums stay in float32, so that a product's rounding depends less on how it is split.
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        try:
            self.model = load_causal_model(directory, adapter, precision, device)
        except torch.OutOfMemoryError as error:
            raise PetoolError(f"{directory} does not fit the GPU's memory", "bench the NF4 variant", MACHINE) from error
        self._decoder = Decoder(self.model)
        self._buffers: list[Any] = []
        self._room = 0
        self._steps: Steps | None = None

    def generate(self, prompts: Sequence[Sequence[int]], job: Job, batch: int = BATCH) -> Iterator[tuple[int, Reply]]:
        """Yield (index, reply) for every prompt, the longest first; `batch` replies are decoded together.

        The time of a batch is shared by its entries: reading by prompt length, decoding equally.
        """
        import torch

        plan = self._plan(prompts, job, batch)
        self._reserve(max((len(group) * length for group, length in plan), default=0))
        for group, length in plan:
            with torch.inference_mode():
                try:
                    replies = self._batch([prompts[index] for index in group], group, length, job)
                except torch.OutOfMemoryError as error:
                    hint = "give a smaller --batch, or bench the NF4 variant"
                    raise PetoolError(f"the GPU's memory is full after {length} tokens", hint, MACHINE) from error
            yield from replies

    def _plan(self, prompts: Sequence[Sequence[int]], job: Job, batch: int) -> list[tuple[list[int], int]]:
        """Indices of each batch, the longest prompts first, and the tokens of one of its sequences."""
        budget = _MEMORY_TOKENS
        if self._decoder.device.type == "cuda":
            import torch

            held = sum(buffer.nbytes for buffer in self._buffers)
            free = 0.7 * (torch.cuda.mem_get_info()[0] + held)
            budget = min(budget, int(free / self._decoder.token_bytes))
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        plan = []
        while order:
            length = -(-(len(prompts[order[0]]) + job.max_tokens) // _LENGTH_STEP) * _LENGTH_STEP
            count = max(1, min(batch, budget // length))
            plan.append((order[:count], length))
            del order[:count]
        return plan

    def _reserve(self, tokens: int) -> None:
        if tokens > self._room:
            self._steps, self._buffers = None, []
            self._buffers, self._room = self._decoder.buffers(tokens), tokens

    def _steps_for(self, slots: int, length: int) -> Steps:
        """The last batch's steps where the shape is the same, and with them its CUDA graph."""
        held = self._steps
        if held is None or (held.memory.slots, held.memory.length) != (slots, length):
            held = Steps(self._decoder, Memory(self._buffers, slots, length))
        self._steps = held
        return held

    def _batch(
        self, prompts: Sequence[Sequence[int]], group: Sequence[int], length: int, job: Job
    ) -> list[tuple[int, Reply]]:
        started = time.perf_counter()
        steps = self._steps_for(len(prompts), length)
        rows = [self._row(index, job) for index in group]
        read = [[*prompt, *row.ids] for prompt, row in zip(prompts, rows, strict=True)]
        forced = [len(row.ids) for row in rows]
        logits = self._read_all(read, steps.memory)
        if logits.is_cuda:
            import torch

            torch.cuda.synchronize()
        prefilled = time.perf_counter()
        positions = [len(ids) - 1 for ids in read]
        while True:
            tokens = self._choose(logits, rows)
            for place, (row, token) in enumerate(zip(rows, tokens, strict=True)):
                positions[place] += not row.finish
                row.accept(token, job.stops)
            if all(row.finish for row in rows):
                break
            last = [row.ids[-1] if row.ids else job.eos_id for row in rows]
            logits = steps(last, positions)
        ended = time.perf_counter()
        total, share = sum(map(len, read)), (ended - prefilled) / len(rows)
        return [
            (
                row.index,
                Reply(
                    job.decode(row.ids),
                    tuple(row.ids),
                    row.finish,
                    len(prompt),
                    (prefilled - started) * len(ids) / total,
                    share,
                    head,
                ),
            )
            for row, prompt, ids, head in zip(rows, prompts, read, forced, strict=True)
        ]

    def _row(self, index: int, job: Job) -> _Row:
        """A fresh reply; what a constraint forces at its very start is read together with the prompt."""
        constraint = job.constrain(index) if job.constrain else None
        row = _Row(index, constraint, job.lengths[index] if job.lengths else job.max_tokens)
        head = constraint.forced() if constraint else []
        head = head[: head.index(job.eos_id)] if job.eos_id in head else head
        if constraint:
            row.ids = head[: row.length - 1]
            constraint.accept(row.ids)
        return row

    def _read_all(self, read: Sequence[Sequence[int]], memory: Memory) -> Any:
        import torch

        return torch.stack([self._decoder.read(ids, memory, slot) for slot, ids in enumerate(read)])

    def _choose(self, logits: Any, rows: Sequence[_Row]) -> list[int]:
        """The likeliest allowed id of each row; masks are made while the GPU is still at work on `logits`."""
        import numpy as np
        import torch

        if any(row.constraint for row in rows):
            width = (logits.shape[1] + 7) // 8
            packed = np.stack([row.bits(width) for row in rows])
            shifts = torch.arange(8, device=logits.device, dtype=torch.uint8)
            bits = torch.from_numpy(packed).to(logits.device)
            allowed = ((bits.unsqueeze(-1) >> shifts) & 1).flatten(1)[:, : logits.shape[1]].bool()
            logits = logits.masked_fill(~allowed, float("-inf"))
        found: list[int] = logits.argmax(dim=1).tolist()
        return found

    def flips(self, prompts: Sequence[Sequence[int]], job: Job, batch: int, sample: int) -> tuple[int, int]:
        """How many replies of one batch differ from those of the same prompts alone, and how many were compared.

        The batch holds prompts from the middle of the length order; `sample` of them, spread over it, run alone.
        """
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        start = max(0, (len(order) - batch) // 2)
        group = order[start : start + batch]
        together = {index: reply.ids for index, reply in self._only(prompts, group, job, batch)}
        chosen = group[:: max(1, len(group) // max(1, sample))][:sample]
        alone = {index: reply.ids for index, reply in self._only(prompts, chosen, job, 1)}
        return sum(together[index] != ids for index, ids in alone.items()), len(alone)

    def _only(
        self, prompts: Sequence[Sequence[int]], indices: Sequence[int], job: Job, batch: int
    ) -> Iterator[tuple[int, Reply]]:
        """Like `generate` for some of the prompts, under their own indices."""
        from dataclasses import replace

        constrain, lengths = job.constrain, job.lengths
        part = replace(
            job,
            constrain=(lambda place: constrain(indices[place])) if constrain else None,
            lengths=[lengths[index] for index in indices] if lengths else None,
        )
        for place, reply in self.generate([prompts[index] for index in indices], part, batch):
            yield indices[place], reply

    def forget_peak(self) -> None:
        """Count `peak_memory_gb` from now on."""
        import torch

        if self._decoder.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def peak_memory_gb(self) -> float:
        """The most GPU memory that tensors took since loading or `forget_peak`, in GiB; 0 on a CPU."""
        import torch

        return torch.cuda.max_memory_allocated() / 2**30 if self._decoder.device.type == "cuda" else 0.0
