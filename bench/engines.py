"""Replies from llama.cpp on a CPU, from transformers on a GPU, or from a rule: (index, row) by entry.

Every engine gets the same token ids, the same end tokens and the same limit, and chooses greedily.
"""

import hashlib
import json
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petool_lite.bench.baselines import rule_call
from petool_lite.bench.variants import Variant

from petool_lite.console import Report
from petool_lite.data.entries import Entry
from petool_lite.errors import PetoolError
from petool_lite.inference.constrain import Constrainer, Constraint
from petool_lite.inference.llama import LlamaModel, Reply
from petool_lite.inference.parse import failure
from petool_lite.prompt.render import (
    Chat,
    Layout,
    Rendered,
    answer_text,
    chat_from_directory,
    common_length,
    prompt_ids,
    recorded_style,
    spread,
)

_UNREAD: dict[str, Any] = {
    **dict.fromkeys(("prompt_tokens", "reply_tokens", "cached_tokens", "history_dropped"), 0),
    **dict.fromkeys(("prefill_s", "decode_s", "seconds"), 0.0),
    **{"reply": "", "finish": "stop", "failure": None, "cold": False, "batch": 1},
}
Rows = Iterator[tuple[int, dict[str, Any]]]


@dataclass(frozen=True)
class Work:
    """Entries by index that a variant is to answer, in at most so many tokens.

    `text` is the answer without a call that is allowed: this sentence, any text (True), or none (False).
    """

    variant: Variant
    entries: Mapping[int, Entry]
    max_reply_tokens: int
    text: bool | str


@dataclass(frozen=True)
class Prompts:
    """Entries by index, and the prompts of those that fit the context.

    `text` is the answer without a call that is allowed, see `Work`.
    """

    entries: Mapping[int, Entry]
    rendered: Mapping[int, Rendered]
    style: str
    text: bool | str

    def misfits(self) -> Rows:
        """Rows of the entries whose prompt is too long even without history."""
        for index in self.entries.keys() - self.rendered.keys():
            yield index, {"status": "too_long"} | _UNREAD

    def start(self, constrainer: Constrainer, index: int) -> Constraint:
        """The constraint of the reply to an entry."""
        return constrainer.start(self.entries[index].tools, self.style, self.text)

    def asked(self, index: int) -> dict[str, Any]:
        """What a row says of an entry's prompt."""
        found = self.rendered[index]
        facts = {"prompt_tokens": len(found.ids), "history_dropped": found.history_dropped}
        return {"prompt_sha256": ids_sha256(found.ids), **facts}

    def answered(self, index: int, reply: Reply) -> dict[str, Any]:
        """What a row says of a model's reply to an entry."""
        return self.asked(index) | {
            "status": "ok",
            "reply": reply.text,
            "reply_tokens": len(reply.ids),
            "finish": reply.finish,
            "failure": failure(reply.text, self.entries[index].tools, reply.finish, bool(self.text)),
            "cached_tokens": min(reply.reused_tokens, len(self.rendered[index].ids)),
            "prefill_s": round(reply.prefill_s, 4),
            "decode_s": round(reply.decode_s, 4),
            "seconds": round(reply.prefill_s + reply.decode_s, 4),
        }


def ids_sha256(ids: Sequence[int]) -> str:
    """SHA-256 of token ids as little-endian uint32, as hex: equal where two engines read the same prompt."""
    return hashlib.sha256(struct.pack(f"<{len(ids)}I", *ids)).hexdigest()


def fitted(chat: Chat, work: Work, context: int, report: Report) -> Prompts:
    """Render all prompts; what does not fit a context of so many tokens loses old history."""
    style = str(work.variant.style)
    layout = Layout(style, context - work.max_reply_tokens)
    found = {index: prompt_ids(chat, entry, layout) for index, entry in work.entries.items()}
    fits = {index: prompt for index, prompt in found.items() if prompt}
    trimmed = sum(prompt.history_dropped > 0 for prompt in fits.values())
    lengths = spread([len(prompt.ids) for prompt in fits.values()])
    told = ", ".join(f"{name} {value:,}" for name, value in lengths.items())
    lost = f"{trimmed:,} trimmed, {len(found) - len(fits):,} too long"
    report(f"{len(found):,} prompts, {lost}; tokens {told}", 0, 0, "")
    return Prompts(work.entries, fits, style, work.text)


def model_style(model: Path) -> str | None:
    """The prompt style that a GGUF file names, if it does; raises PetoolError if it does not load."""
    with LlamaModel(model, vocab_only=True) as vocabulary:
        style, layout = (vocabulary.metadata.get(f"petool_lite.prompt_{name}") for name in ("style", "layout"))
        return recorded_style(style, layout)


def rule_rows(work: Work) -> Rows:
    """What a rule answers; it reads no tokens and takes no time worth counting."""
    for index, entry in work.entries.items():
        call = answer_text(rule_call(work.variant.name, entry), "published")
        yield index, _UNREAD | {"status": "ok", "reply": call}


def llama_rows(work: Work, report: Report) -> Rows:
    """Replies of a GGUF file, in the order of the prompts' ids: neighbours then share the longest beginnings."""
    file, longest_reply = work.variant.weights, work.max_reply_tokens
    with LlamaModel(file, vocab_only=True) as vocabulary:
        prompts = fitted(vocabulary.chat(), work, vocabulary.train_ctx, report)
    yield from prompts.misfits()
    longest = max((len(prompt.ids) for prompt in prompts.rendered.values()), default=0)
    with LlamaModel(file, n_ctx=longest + longest_reply) as model:
        model.exact_reuse = True  # a reply must not depend on which entry came before
        constrainer = model.constrainer() if work.variant.decoding == "constrained" else None
        for index, prompt in sorted(prompts.rendered.items(), key=lambda item: item[1].ids):
            held = common_length(model.held, prompt.ids)
            started = time.perf_counter()
            try:
                constraint = prompts.start(constrainer, index) if constrainer else None
                reply = model.generate(prompt.ids, longest_reply, constraint, reuse=True)
            except PetoolError as error:
                facts = {"status": "engine_error", "error": error.message}
                seconds = round(time.perf_counter() - started, 4)
                yield index, _UNREAD | facts | prompts.asked(index) | {"seconds": seconds}
                continue
            row = prompts.answered(index, reply)
            row["cached_tokens"] = min(held, reply.reused_tokens)
            yield index, row | {"cold": row["cached_tokens"] == 0, "batch": 1}


def gpu_rows(work: Work, told: dict[str, Any], report: Report) -> Rows:
    """Replies of a model directory, decoded in batches; rounding may differ with the batch.

    `told` gets the meta's "gpu" facts. Raises PetoolError where there is no GPU.
    """
    from petool_lite.inference.gpu import GpuModel, Job, stop_ids

    variant, folder = work.variant, work.variant.weights
    chat = chat_from_directory(folder)
    config = json.loads((folder / "config.json").read_text())
    prompts = fitted(chat, work, config["max_position_embeddings"], report)
    yield from prompts.misfits()
    indices = list(prompts.rendered)
    constrain = None
    if variant.decoding == "constrained":
        constrainer = Constrainer.from_directory(folder, chat.eos_id)

        def constrain(place: int) -> Constraint:
            return prompts.start(constrainer, indices[place])

    assert chat.decode is not None  # a chat from a directory has one
    job = Job(work.max_reply_tokens, stop_ids(folder, chat), chat.decode, constrain)
    model = GpuModel(folder, variant.adapter, variant.precision, variant.device)
    texts = [prompts.rendered[index].ids for index in indices]
    told["batch"], first = variant.batch, True
    for place, reply in model.generate(texts, job, variant.batch):
        yield indices[place], prompts.answered(indices[place], reply) | {"cold": first, "batch": variant.batch}
        first = False
        told["memory_gb"] = round(model.peak_memory_gb(), 3)
