"""Replies from llama.cpp on a CPU, from transformers' modules on a GPU, or from a rule: (index, row) by entry.

Every engine gets the same token ids, the same end tokens and the same limit, and chooses greedily.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petool_lite.bench.baselines import rule_call
from petool_lite.bench.rows import ids_sha256, reply_row, unread_row
from petool_lite.bench.variants import Variant

from petool_lite.console import Report
from petool_lite.data.entries import Entry
from petool_lite.errors import PetoolError
from petool_lite.inference.constrain import Constrainer, Constraint
from petool_lite.inference.llama import LlamaModel
from petool_lite.inference.parse import failure
from petool_lite.prompt.render import (
    Chat,
    Layout,
    chat_from_directory,
    common_length,
    prompt_ids,
    recorded_style,
    spread,
)

UNKNOWN_STYLE = "published"
FLIP_SAMPLE = 16  # entries that are decoded alone as well
Rows = Iterator[tuple[int, dict[str, Any]]]


@dataclass(frozen=True)
class Prompts:
    """Entries by index, the ids of those that fit the context, and how much history each of these lost."""

    entries: Mapping[int, Entry]
    setting: str
    ids: Mapping[int, list[int]]
    dropped: Mapping[int, int]

    @property
    def misfits(self) -> list[int]:
        """Indices of the entries whose prompt is too long even without history."""
        return [index for index in self.entries if index not in self.ids]

    def tools(self, index: int) -> Any:
        """The candidates of an entry."""
        return self.entries[index].prompt(self.setting).tools


def fitted(chat: Chat, entries: Mapping[int, Entry], layout: Layout, report: Report) -> Prompts:
    """Render all prompts; what does not fit loses old history."""
    found = {index: prompt_ids(chat, entry, layout) for index, entry in entries.items()}
    fits = {index: pair for index, pair in found.items() if pair}
    trimmed = sum(lost > 0 for _, lost in fits.values())
    lengths = ", ".join(f"{name} {value:,}" for name, value in spread([len(ids) for ids, _ in fits.values()]).items())
    told = f"{len(found):,} prompts, {trimmed:,} trimmed, {len(found) - len(fits):,} too long; tokens {lengths}"
    report(told, 0, 0, "")
    ids = {index: pair[0] for index, pair in fits.items()}
    return Prompts(entries, layout.setting, ids, {index: pair[1] for index, pair in fits.items()})


def model_style(model: Path) -> str:
    """The prompt style that a GGUF file names, or the published one; raises PetoolError if it does not load."""
    with LlamaModel(model, vocab_only=True) as vocabulary:
        style, layout = (vocabulary.metadata.get(f"petool_lite.prompt_{name}") for name in ("style", "layout"))
        return recorded_style(style, layout) or UNKNOWN_STYLE


def rule_rows(variant: Variant, entries: Mapping[int, Entry], setting: str) -> Rows:
    """What a rule answers; it reads no tokens and takes no time worth counting."""
    for index, entry in entries.items():
        call = rule_call(variant.name, entry, setting).to_json()
        row = unread_row("ok") | {"reply": call}
        yield index, row | {"failure": failure(call, entry.prompt(setting).tools, "stop")}


def llama_rows(
    variant: Variant, entries: Mapping[int, Entry], setting: str, max_reply_tokens: int, report: Report
) -> Rows:
    """Replies of a GGUF file, in the order of the prompts' ids: neighbours then share the longest beginnings."""
    with LlamaModel(variant.weights, vocab_only=True) as vocabulary:
        layout = Layout(setting, str(variant.style), vocabulary.train_ctx - max_reply_tokens)
        prompts = fitted(vocabulary.chat(), entries, layout, report)
    for index in prompts.misfits:
        yield index, unread_row("too_long")
    order = sorted(prompts.ids, key=lambda index: prompts.ids[index])
    longest = max((len(ids) for ids in prompts.ids.values()), default=0)
    with LlamaModel(variant.weights, n_ctx=longest + max_reply_tokens) as model:
        model.exact_reuse = True  # a reply must not depend on which entry came before
        constrainer = model.constrainer() if variant.decoding == "constrained" else None
        for index in order:
            ids = prompts.ids[index]
            held = common_length(model.held, ids)
            started = time.perf_counter()
            try:
                constraint = constrainer.start(prompts.tools(index)) if constrainer else None
                reply = model.generate(ids, max_reply_tokens, constraint, reuse=True)
            except PetoolError as error:
                facts = {"error": error.message, "seconds": round(time.perf_counter() - started, 4)}
                yield index, unread_row("engine_error") | facts | _asked(prompts, index)
                continue
            row = reply_row(reply, ids, entries[index], setting)
            row["cached_tokens"] = min(held, reply.reused_tokens)
            yield index, row | {"cold": row["cached_tokens"] == 0, "batch": 1} | _asked(prompts, index)


def _asked(prompts: Prompts, index: int) -> dict[str, Any]:
    ids = prompts.ids[index]
    return {
        "prompt_sha256": ids_sha256(ids),
        "prompt_tokens": len(ids),
        "history_dropped": prompts.dropped[index],
    }


class GpuEngine:
    """The last model that was loaded on the GPU, kept for the next variant of the same weights."""

    def __init__(self, device: str | None = None) -> None:
        """`device` None is this process's GPU; "cpu" is for tests."""
        self._device = device
        self._key: tuple[Any, ...] = ()
        self._model: Any = None

    def load(self, variant: Variant) -> Any:
        """The variant's model. Raises PetoolError where there is no GPU."""
        from petool_lite.inference.gpu import GpuModel

        key = (variant.weights, variant.adapter, variant.precision)
        if key != self._key:
            self._key, self._model = (), None  # the old one goes before the new one comes
            self._model = GpuModel(variant.weights, variant.adapter, variant.precision, self._device)
            self._key = key
        self._model.forget_peak()
        return self._model

    def rows(
        self,
        variant: Variant,
        entries: Mapping[int, Entry],
        setting: str,
        max_reply_tokens: int,
        told: dict[str, Any],
        report: Report,
    ) -> Rows:
        """Replies in batches of which the check found no reply changed; `told` gets the meta's "gpu" facts."""
        from petool_lite.inference.gpu import Job, stop_ids

        chat = chat_from_directory(variant.weights)
        config = json.loads((variant.weights / "config.json").read_text())
        layout = Layout(setting, str(variant.style), config["max_position_embeddings"] - max_reply_tokens)
        prompts = fitted(chat, entries, layout, report)
        for index in prompts.misfits:
            yield index, unread_row("too_long")
        indices = list(prompts.ids)
        constrain = None
        if variant.decoding == "constrained":
            constrainer = Constrainer.from_directory(variant.weights, chat.eos_id)

            def constrain(place: int) -> Constraint:
                return constrainer.start(prompts.tools(indices[place]))

        assert chat.decode is not None  # a chat from a directory has one
        job = Job(max_reply_tokens, chat.eos_id, stop_ids(variant.weights, chat), chat.decode, constrain)
        model = self.load(variant)
        texts = [prompts.ids[index] for index in indices]
        if "batch" not in told:
            told |= checked_batch(model, texts, job, variant.batch, report)
        first = True
        for place, reply in model.generate(texts, job, told["batch"]):
            index = indices[place]
            row = reply_row(reply, texts[place], entries[index], setting)
            yield index, row | {"cold": first, "batch": told["batch"]} | _asked(prompts, index)
            first = False
        told["memory_gb"] = round(model.peak_memory_gb(), 3)


def checked_batch(
    model: Any, prompts: Sequence[Sequence[int]], job: Any, wanted: int, report: Report
) -> dict[str, Any]:
    """The largest batch, from `wanted` down by halves, in which no reply of a sample differs from the same prompt's
    alone; with how many were compared, and the differing ones of every size that was tried."""
    size, tried = max(1, min(wanted, len(prompts))), {}
    flips = checked = 0
    while size > 1:
        flips, checked = model.flips(prompts, job, size, FLIP_SAMPLE)
        tried[str(size)] = flips
        report(f"batches of {size}: {flips} of {checked} replies differ from those decoded alone", 0, 0, "")
        if not flips:
            break
        size //= 2
    return {"batch": size, "flips": flips if size > 1 else 0, "flips_checked": checked, "flips_by_batch": tried}
