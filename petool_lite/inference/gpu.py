"""A base model with its adapter through transformers' generate: token ids in, greedy replies out, in batches. Prompts
of like lengths are decoded together. Every family that transformers loads runs as its own code has it, but for how
prompts are read (a few at a time, without a mask) and how one token attends (heads that share keys at once). In 16 bits
a reply may differ with its batch, since products of other shapes round otherwise."""

import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from copy import deepcopy
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

from petool_lite.errors import MACHINE, PetoolError, in_words
from petool_lite.families import end_tokens
from petool_lite.inference.constrain import Constraint
from petool_lite.inference.llama import Reply
from petool_lite.prompt.render import chat_from_directory

Constrain = Callable[[int], Constraint] | None  # the constraint of a prompt's reply, by the prompt's index
BATCH = 64  # replies decoded together, at most
_BATCH_TOKENS = 262_144  # prompt and reply tokens of a batch, at most
_READ_TOKENS = 16_384  # of prompts that are read at once, at most, or one prompt


def gpu_available() -> bool:
    """Whether torch finds a GPU."""
    import torch

    return bool(torch.cuda.is_available())


def gpu_facts() -> dict[str, Any] | None:
    """The GPU's name and memory in GiB, and whether it multiplies in bfloat16; None without torch or a GPU."""
    try:
        import torch
    except ImportError:
        return None
    if not gpu_available():
        return None
    free, total = (round(size / 2**30, 1) for size in torch.cuda.mem_get_info())
    name, bf16 = torch.cuda.get_device_name(), torch.cuda.is_bf16_supported()
    return {"name": name, "memory_gb": total, "free_gb": free, "bf16": bf16}


def own_gpu() -> str:
    """This process's GPU: under torchrun or accelerate the one of its place on this machine."""
    import torch

    place, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if place >= count:
        raise PetoolError(f"process {place + 1} has no GPU of its own: torch finds {count}", "start fewer", MACHINE)
    return f"cuda:{place}"


def four_bits(**more: Any) -> Any:
    """NF4 with double quantization and arithmetic in bfloat16, as transformers takes it."""
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16, **more,
    )  # fmt: skip


def load_causal_model(directory: Path, adapter: Path | None, precision: str, device: str) -> Any:
    """A transformers model in bfloat16 with its adapter merged ("bf16"), or in 4 bits with its adapter ("nf4"), as
    training sees it. Its head is in float32: rounded to bfloat16, two tokens often have the same logit."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    options: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": {"": device}, "use_safetensors": True}
    if precision == "nf4":
        options["quantization_config"] = four_bits()
    model: Any = AutoModelForCausalLM.from_pretrained(directory, **options)
    model.generation_config = GenerationConfig()  # the files' own is for sampling
    if adapter is not None:
        from peft import PeftModel

        merge = precision != "nf4"  # a merged weight is summed in float32 and rounded once
        model = PeftModel.from_pretrained(model, str(adapter), autocast_adapter_dtype=merge)
        model = model.merge_and_unload() if merge else model.to(torch.bfloat16)
    head = deepcopy(model.get_output_embeddings()).float()
    head.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    model.set_output_embeddings(head)
    return model.eval()


def batches(lengths: Sequence[int], tokens: int, most: int = BATCH) -> Iterator[list[int]]:
    """Indices of sequences of like lengths, the longest first; each batch pads to at most `tokens`, or is one."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    while order:
        size = max(1, min(most, tokens // lengths[order[0]]))
        yield order[:size]
        del order[:size]


def greedy_ids(
    model: Any,
    prompts: Sequence[Sequence[int]],
    stops: Collection[int],
    most: int,
    steps: Any = None,
    cache: Any = None,
) -> list[list[int]]:
    """The likeliest ids after each prompt, one batch of them, up to one of `stops`, which is left out, or `most` ids.
    `steps` is a logits processor, `cache` what `_read` has read, for a model of transformers' own layers."""
    import torch

    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    ids = [[min(stops)] * count + list(prompt) for count, prompt in zip(padding, prompts, strict=True)]
    mask = [[0] * count + [1] * (longest - count) for count in padding]
    output = model.generate(
        input_ids=torch.tensor(ids, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        past_key_values=cache,
        max_new_tokens=most,
        do_sample=False,
        repetition_penalty=1.0,  # some bases' own settings have one, which a greedy choice would obey
        eos_token_id=sorted(stops),
        pad_token_id=min(stops),
        logits_processor=[steps] if steps else [],
    )
    return [list(takewhile(lambda token: token not in stops, reply)) for reply in output[:, longest:].tolist()]


def _read(model: Any, prompts: Sequence[Sequence[int]]) -> Any:
    """Keys and values of all ids of each prompt but the last, as a cache padded on the left; None for single ids. They
    are read some at a time and padded behind, where nothing that counts sees it: so without a mask of all with all."""
    import torch
    from transformers import DynamicCache

    lengths = [len(prompt) - 1 for prompt in prompts]
    longest, layers = max(lengths), list[tuple[Any, Any]]()
    if not longest:
        return None
    for part in batches([max(1, length) for length in lengths], _READ_TOKENS):
        size = max(1, *(lengths[row] for row in part))
        ids = [[*prompts[row][:-1], *[0] * (size - lengths[row])] for row in part]
        found = DynamicCache()
        with torch.inference_mode():
            model.get_decoder()(torch.tensor(ids, device=model.device), past_key_values=found, use_cache=True)
        for number, layer in enumerate(found.layers):
            if number == len(layers):
                shape = len(prompts), layer.keys.shape[1], longest, layer.keys.shape[3]
                layers.append((layer.keys.new_zeros(shape), layer.values.new_zeros(shape)))
            for place, row in enumerate(part):
                for target, source in zip(layers[number], (layer.keys, layer.values), strict=True):
                    target[row, :, longest - lengths[row] :] = source[place, :, : lengths[row]]
    filled = DynamicCache()
    for number, (keys, values) in enumerate(layers):
        filled.update(keys, values, number)
    return filled


@cache
def _grouped() -> str:
    """Name of an attention for transformers' layers in which one token's heads that share keys are rows of one product:
    transformers repeats the keys of all tokens for each of them, wherever prompts are padded."""
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **more: Any) -> Any:
        batch, heads, length, size = query.shape
        if length > 1:
            return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **more)
        rows = query.view(batch, key.shape[1], heads // key.shape[1], size)
        found = torch.nn.functional.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scaling)
        return found.view(batch, 1, heads, size), None

    name = "petool_lite_grouped"
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


class _Steps:
    """What generate calls with the logits of every step: notes when the prompts are read, and masks each row."""

    def __init__(self, constraints: Sequence[Constraint]) -> None:
        """One constraint for each row of the batch, or none at all."""
        self._constraints, self.prefilled = constraints, 0.0
        self._forced: list[list[int]] = [[] for _ in constraints]  # the only way on, which comes one id a step

    def __call__(self, ids: Any, logits: Any) -> Any:
        """Logits (rows, vocabulary) with what a row's constraint forbids at minus infinity; `ids` (rows, tokens)."""
        import numpy as np
        import torch

        if not self.prefilled:
            if logits.is_cuda:
                torch.cuda.synchronize()
            self.prefilled = time.perf_counter()
        elif self._constraints:
            for row, token in enumerate(ids[:, -1].tolist()):
                if not self._constraints[row].finished:  # what follows then is padding
                    self._constraints[row].accept([token])
                    self._forced[row] = self._forced[row][1:]
        if not self._constraints:
            return logits
        allowed = np.zeros(tuple(logits.shape), dtype=bool)
        for row, constraint in enumerate(self._constraints):
            if not constraint.finished and not self._forced[row]:
                self._forced[row] = constraint.forced()
            if constraint.finished:
                allowed[row] = True
            elif self._forced[row]:
                allowed[row, self._forced[row][0]] = True
            else:
                allowed[row] = constraint.allowed(allowed.shape[1])  # none beyond the tokenizer's ids
                if constraint.choosing:
                    constraint.weigh(logits[row].float().cpu().numpy(), allowed[row])
        return logits.masked_fill(~torch.from_numpy(allowed).to(logits.device), float("-inf"))


class GpuModel:
    """A loaded model; `stops` are the ids that end its replies, llama.cpp's for the GGUF file of the same model."""

    def __init__(
        self, directory: Path, adapter: Path | None, precision: str = "bf16", device: str | None = None
    ) -> None:
        """`precision` is "bf16" or "nf4"; `device` None is this process's GPU (LOCAL_RANK's under torchrun). Raises
        PetoolError where there is no GPU, or the model does not fit it."""
        import torch

        self._chat = chat_from_directory(directory)
        self.stops = frozenset({self._chat.eos_id, *end_tokens(directory).values()})
        if device is None and not gpu_available():
            raise PetoolError("the GPU variants need a GPU, and torch finds none", "bench the GGUF variants", MACHINE)
        device = device or own_gpu()
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        full, hint = f"{directory} does not fit the GPU's memory", "bench the NF4 variant"
        with in_words(full, hint, torch.OutOfMemoryError, exit_code=MACHINE):
            self.model = load_causal_model(directory, adapter, precision, device)
            self.model.set_attn_implementation(_grouped())

    def generate(
        self, prompts: Sequence[Sequence[int]], most: int, constrain: Constrain = None, batch: int = BATCH
    ) -> Iterator[tuple[int, Reply]]:
        """Yield (index, reply) for every prompt, the longest first; at most `batch` replies of up to `most` tokens are
        decoded together. The time of a batch is shared by its entries: reading by prompt length, decoding by reply
        length. Raises PetoolError where the GPU's memory is full."""
        import torch

        hint = "give a smaller --batch, or bench the NF4 variant"
        with in_words("the GPU's memory is full", hint, torch.OutOfMemoryError, exit_code=MACHINE):
            for group in batches([len(prompt) + most for prompt in prompts], self._room(prompts), batch):
                made = map(constrain, group) if constrain else ()
                yield from zip(group, self._batch([prompts[index] for index in group], most, made), strict=True)

    def _room(self, prompts: Sequence[Sequence[int]]) -> int:
        """Tokens of a batch that half of the free GPU memory holds, by what reading the longest prompt alone takes."""
        import torch

        if self.model.device.type != "cuda" or not prompts:
            return _BATCH_TOKENS
        longest = max(prompts, key=len)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        held, free = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
        greedy_ids(self.model, [longest], self.stops, 1, cache=_read(self.model, [longest]))
        taken = torch.cuda.max_memory_allocated() - held
        return min(_BATCH_TOKENS, int(free / 2 / taken * len(longest)))

    def _batch(self, prompts: Sequence[Sequence[int]], most: int, made: Iterable[Constraint]) -> Iterator[Reply]:
        started, constraints = time.perf_counter(), [*made]
        steps = _Steps(constraints)
        replies = greedy_ids(self.model, prompts, self.stops, most, steps, _read(self.model, prompts))
        prefill, decode = steps.prefilled - started, time.perf_counter() - steps.prefilled
        read, written = sum(map(len, prompts)), sum(len(ids) + 1 for ids in replies)
        sure: list[Any] = [one.confidence for one in constraints] or [None] * len(prompts)
        assert self._chat.decode is not None  # a chat from a directory has one
        for prompt, ids, confidence in zip(prompts, replies, sure, strict=True):
            finish = "stop" if len(ids) < most else "length"
            times = prefill * len(prompt) / read, decode * (len(ids) + 1) / written
            yield Reply(self._chat.decode(ids), tuple(ids), finish, len(prompt), *times, confidence=confidence)

    def peak_memory_gb(self) -> float:
        """The most GPU memory that tensors took since the last `generate` began, in GiB; 0 on a CPU."""
        import torch

        return torch.cuda.max_memory_allocated() / 2**30 if self.model.device.type == "cuda" else 0.0
