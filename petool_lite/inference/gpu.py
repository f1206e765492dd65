"""A base model with its adapter through transformers: token ids in, greedy replies out, in batches. Prompts of like
lengths are read and decoded together, and what a constraint forces is read at once. Every family that transformers
loads runs as its own code has it, but for how keys are kept, and how heads that share them attend. In 16 bits a reply
may differ with its batch, since products of other shapes round otherwise."""

import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field
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
_JUMP = 32  # ids of a reply that are read in one step, at most: the chosen one and what is forced behind it


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


def greedy_ids(model: Any, prompts: Sequence[Sequence[int]], stops: Collection[int], most: int) -> list[list[int]]:
    """The likeliest ids after each prompt, one batch, up to one of `stops`, which is left out, or `most` ids. It is by
    generate: a model that learns has Unsloth's layers or parted ones, which know no other cache."""
    ids = _padded(prompts, -1, "left").to(model.device)
    output = model.generate(
        **{"input_ids": ids.clamp(min=0), "attention_mask": (ids >= 0).long(), "max_new_tokens": most},
        **{"do_sample": False, "eos_token_id": sorted(stops), "pad_token_id": min(stops)},
        repetition_penalty=1.0,  # some bases' own settings have one, which a greedy choice would obey
    )
    return [list(takewhile(lambda token: token not in stops, reply)) for reply in output[:, ids.shape[1] :].tolist()]


def _padded(rows: Iterable[Sequence[int]], value: int, side: str = "right") -> Any:
    """Numbers as a tensor (rows, the longest row's)."""
    import torch

    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, value, side)


class _Cache:
    """Keys and values of a batch, as transformers' layers ask for them. Each row's lie side by side from its first
    place on, so rows go on by any number of ids, and a window is measured in tokens; nothing behind them is seen."""

    def __init__(self, rows: int, room: int) -> None:
        """`room` is for a row's ids and the padding behind them."""
        self._room, self._layers = (rows, room), list[list[Any]]()  # keys and values (rows, room, heads, size)
        self._at, self._seen = (Any, Any), 0

    def read(self, model: Any, ids: Any, rows: Any, places: Any, seen: int = 0, **more: Any) -> Any:
        """What the model's layers make of `ids` (rows, ids) at those `places` of `rows`, by number: hidden states. They
        look at the first `seen` places with a mask in `more`, at 0 each row at itself."""
        self._at, self._seen, decoder = (rows[:, None], places), seen, model.get_decoder()
        return decoder(ids, position_ids=places, past_key_values=self, use_cache=True, **more).last_hidden_state

    def update(self, keys: Any, values: Any, layer: int, *_: Any) -> Any:
        """Keep a layer's (rows, heads, ids, size); returns what they attend to, in the same order."""
        if layer == len(self._layers):
            self._layers.append([part.new_zeros(*self._room, *part.shape[1::2]) for part in (keys, values)])
        for target, source in zip(self._layers[layer], (keys, values), strict=True):
            target[self._at] = source.transpose(1, 2)
        if not self._seen:
            return keys, values
        return [part[:, : self._seen].transpose(1, 2) for part in self._layers[layer]]

    def get_mask_sizes(self, length: int, *_: Any) -> tuple[int, int]:
        return length, 0  # of a prompt: its keys, and where they begin

    def get_query_offset(self, *_: Any) -> int:
        return 0


def _read(model: Any, prompts: Sequence[Sequence[int]], more: int) -> _Cache:
    """Keys and values of all ids of each prompt but the last, with room for `more`. They are read some at a time and
    padded behind, where nothing that counts sees it: so without a mask of all with all."""
    import torch

    lengths = [max(1, len(prompt) - 1) for prompt in prompts]
    cache = _Cache(len(prompts), max(lengths) + more)
    for part in batches(lengths, _READ_TOKENS):
        ids = _padded((prompts[row][:-1] or [0] for row in part), 0).to(model.device)
        places = torch.arange(ids.shape[1], device=ids.device)[None]
        cache.read(model, ids, torch.tensor(part, device=ids.device), places)
    return cache


@cache
def _grouped() -> str:
    """Name of an attention for transformers' layers in which a reply's heads that share keys are rows of one product:
    transformers repeats the keys for each of them. `near` is the mask of a layer with a window, None for prompts."""
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, near: Any = None, **more: Any) -> Any:
        if near is None:
            return sdpa_attention_forward(module, query, key, value, mask, **more)
        rows, seen = query.reshape(*key.shape[:2], -1, key.shape[3]), near if more.get("sliding_window") else mask
        found = torch.nn.functional.scaled_dot_product_attention(rows, key, value, seen, scale=more["scaling"])
        return found.reshape(query.shape).transpose(1, 2), None

    name = "petool_lite_grouped"
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


@dataclass
class _Row:
    """A reply as it grows: the model has read `read` ids, `queue` comes next."""

    queue: list[int]
    read: int
    rule: Constraint | None
    ids: list[int] = field(default_factory=list)
    ended: bool = False

    def take(self, made: list[int], stops: Collection[int], most: int) -> None:
        """Go on by the chosen ids, and by those that the constraint forces behind them, up to a stop or `most`."""
        if self.rule:
            self.rule.accept(made)
            while forced := self.rule.forced():
                self.rule.accept(forced)
                made = made + forced
        kept = [*takewhile(lambda token: token not in stops, made)][: most - len(self.ids)]
        self.ids += kept
        self.ended = len(kept) < len(made) or len(self.ids) == most
        self.queue = [] if self.ended else self.queue + kept


def _step(model: Any, cache: _Cache, rows: Sequence[_Row]) -> tuple[list[_Row], Any]:
    """Read up to _JUMP ids of each queue; the rows that a choice is due for, and their logits (rows, vocabulary)."""
    import torch

    width = min(_JUMP, max(len(row.queue) for row in rows))
    seen = -(-(max(row.read for row in rows) + width) // 8) * 8  # of another width, masks would be copied in each layer
    ends = [(place, len(row.queue) - 1) for place, row in enumerate(rows) if 0 < len(row.queue) <= width]
    table = _padded([[row.read, *row.queue[:width]] for row in rows], 0).to(model.device)
    for row in rows:
        row.read, row.queue = row.read + len(row.queue[:width]), row.queue[width:]
    places = table[:, :1] + torch.arange(width, device=table.device)
    behind = places[..., None] - torch.arange(seen, device=table.device)  # (rows, ids, places)
    decoder, masks = model.get_decoder(), [behind >= 0]
    masks.append(masks[0] & (behind < (getattr(decoder.config, "sliding_window", None) or seen)))
    group = decoder.config.num_attention_heads // decoder.config.num_key_value_heads
    masks = [torch.where(mask, 0.0, -torch.inf).to(decoder.dtype)[:, None].repeat(1, 1, group, 1) for mask in masks]
    every = torch.arange(len(rows), device=table.device)
    hidden = cache.read(model, table[:, 1:], every, places, seen, attention_mask=masks[0], near=masks[1])
    due, last = zip(*ends, strict=True) if ends else ([], [])
    return [rows[place] for place in due], model.get_output_embeddings()(hidden[[*due], [*last]])


def _choose(rows: Sequence[_Row], logits: Any) -> list[int]:
    """The likeliest id for each row, of those that its constraint allows; `logits` is (rows, vocabulary)."""
    import numpy as np
    import torch

    rules = [row.rule for row in rows if row.rule]
    if rules:  # their masks are made while the GPU still computes
        allowed = np.stack([rule.allowed(logits.shape[1]) for rule in rules])  # none beyond the tokenizer's ids
        choosing = [place for place, rule in enumerate(rules) if rule.choosing]
        for place, line in zip(choosing, logits[choosing].float().cpu().numpy(), strict=True):
            rules[place].weigh(line, allowed[place])
        logits.masked_fill_(~torch.from_numpy(allowed).to(logits.device), -torch.inf)
    return [*logits.argmax(-1).tolist()]


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
            torch.backends.cuda.enable_cudnn_sdp(False)  # it would make a plan for every length, 0.1 to 0.4 s each
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
        with torch.inference_mode():
            _read(self.model, [longest], 1)
        taken = torch.cuda.max_memory_allocated() - held
        return min(_BATCH_TOKENS, int(free / 2 / taken * len(longest)))

    def _batch(self, prompts: Sequence[Sequence[int]], most: int, made: Iterable[Constraint]) -> Iterator[Reply]:
        import torch

        started, prefilled = time.perf_counter(), 0.0
        with ThreadPoolExecutor(1) as other, torch.inference_mode():
            making = other.submit(list, made)  # while the GPU reads
            cache = _read(self.model, prompts, most + _JUMP + 8)
            rules: Sequence[Constraint | None] = making.result() or [None] * len(prompts)
            rows = [_Row([prompt[-1]], len(prompt) - 1, rule) for prompt, rule in zip(prompts, rules, strict=True)]
            for row in rows:
                row.take([], self.stops, most)
            while not all(row.ended for row in rows):
                due, logits = _step(self.model, cache, rows)
                for row, token in zip(due, _choose(due, logits), strict=True):
                    row.take([token], self.stops, most)
                prefilled = prefilled or time.perf_counter()
        ended = time.perf_counter()
        prefill, decode = (prefilled or ended) - started, ended - (prefilled or ended)
        read, written = sum(map(len, prompts)), sum(len(row.ids) + 1 for row in rows)
        assert self._chat.decode is not None  # a chat from a directory has one
        for prompt, row in zip(prompts, rows, strict=True):
            finish = "stop" if len(row.ids) < most else "length"
            times = prefill * len(prompt) / read, decode * (len(row.ids) + 1) / written
            sure, text = row.rule.confidence if row.rule else None, self._chat.decode(row.ids)
            yield Reply(text, tuple(row.ids), finish, len(prompt), *times, confidence=sure)

    def peak_memory_gb(self) -> float:
        """The most GPU memory that tensors took since the last `generate` began, in GiB; 0 on a CPU."""
        import torch

        return torch.cuda.max_memory_allocated() / 2**30 if self.model.device.type == "cuda" else 0.0
