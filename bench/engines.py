"""Replies from llama.cpp on a CPU, from transformers on a GPU, from an endpoint or a rule: (index, row) by entry."""

import hashlib
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from petool_lite.bench.variants import ENDPOINT, GPU, LLAMA, Variant, rule_call
from petool_lite.console import Report
from petool_lite.data.entries import NO_TOOL, Entry
from petool_lite.data.files import Dataset
from petool_lite.errors import USAGE, PetoolError
from petool_lite.families import read_json
from petool_lite.inference.constrain import Constrainer, Constraint
from petool_lite.inference.llama import LlamaModel, Reply
from petool_lite.inference.parse import failure
from petool_lite.prompt import render
from petool_lite.prompt.render import Chat, Layout, Rendered, prompt_ids

UNREAD: dict[str, Any] = {
    **dict.fromkeys(("prompt_tokens", "reply_tokens", "cached_tokens", "history_dropped"), 0),
    **dict.fromkeys(("prefill_s", "decode_s", "seconds"), 0.0),
    **{"reply": "", "finish": "stop", "failure": None, "cold": False, "batch": 1},
}
Rows = Iterator[tuple[int, dict[str, Any]]]


@dataclass(frozen=True)
class Task:
    """What every variant is asked: entries, the longest reply, how many, which shard; `fresh` starts files over."""

    dataset: Dataset
    max_reply_tokens: int
    limit: int | None = None
    shard: tuple[int, int] | None = None
    fresh: bool = False

    @property
    def text(self) -> bool | str:
        """The answer without a call that is allowed: the data's own sentence, any text if it has several, or none. A
        test that lists what it accepts allows one in all its parts, as BFCL does."""
        texts = {entry.answer for entry in self.dataset.entries if isinstance(entry.answer, str)}
        texts |= {NO_TOOL} if any(entry.accepted for entry in self.dataset.entries) else set()
        return texts.pop() if len(texts) == 1 else bool(texts)

    @property
    def facts(self) -> dict[str, Any]:
        """PEToolBench's setting, "none" for other data, and where the entries came from, as results record it."""
        data = {key: getattr(self.dataset, key) for key in ("source", "sha256", "total")}
        return {"setting": self.dataset.entries[0].setting or "none", "data": data}

    def entries(self) -> dict[int, Entry]:
        """This task's entries by their place in the data; raises PetoolError where one has no right answer."""
        first, step = self.shard or (0, 1)
        chosen = self.dataset.entries[: self.limit]
        found = {index: entry for index, entry in enumerate(chosen) if index % step == first}
        source = self.dataset.source
        if not found:
            raise PetoolError(f"{source}: shard {first}/{step} has no entry", "make fewer shards", USAGE)
        unanswered = next((entry.id for entry in found.values() if entry.answer is None), None)
        if unanswered is not None:
            raise PetoolError(f"{source}: entry {unanswered} has no right answer to score against", "use labelled data")
        return found


@dataclass
class Work:
    """Entries by index that a variant is to answer, and the prompts of those that fit its context."""

    variant: Variant
    task: Task
    entries: Mapping[int, Entry]
    prompts: dict[int, Rendered] = field(default_factory=dict)

    def render(self, chat: Chat, context: int, report: Report) -> Rows:
        """Make all prompts, with less old history where the context is short; yields rows of those still too long."""
        layout = Layout(str(self.variant.style), context - self.task.max_reply_tokens)
        found = {index: prompt_ids(chat, entry, layout) for index, entry in self.entries.items()}
        self.prompts = {index: prompt for index, prompt in found.items() if prompt}
        trimmed = sum(prompt.history_dropped > 0 for prompt in self.prompts.values())
        lengths = render.spread([len(prompt.ids) for prompt in self.prompts.values()])
        told = ", ".join(f"{name} {value:,}" for name, value in lengths.items())
        lost = f"{trimmed:,} trimmed, {len(found) - len(self.prompts):,} too long"
        report(f"{len(found):,} prompts, {lost}; tokens {told}", 0, 0, "")
        for index in found.keys() - self.prompts.keys():
            yield index, {"status": "too_long"} | UNREAD

    def start(self, constrainer: Constrainer, index: int) -> Constraint:
        """The constraint of the reply to an entry."""
        return constrainer.start(self.entries[index].tools, str(self.variant.style), self.task.text)

    def asked(self, index: int) -> dict[str, Any]:
        """What a row says of an entry's prompt."""
        ids, dropped = self.prompts[index].ids, self.prompts[index].history_dropped
        digest = hashlib.sha256(struct.pack(f"<{len(ids)}I", *ids)).hexdigest()  # the same for every engine
        return {"prompt_sha256": digest, "prompt_tokens": len(ids), "history_dropped": dropped}

    def answered(self, index: int, reply: Reply) -> dict[str, Any]:
        """What a row says of a model's reply to an entry."""
        sure, prefill, decode = reply.confidence, reply.prefill_s, reply.decode_s
        return self.asked(index) | {
            **{"status": "ok", "reply": reply.text, "reply_tokens": len(reply.ids), "finish": reply.finish},
            "failure": failure(reply.text, self.entries[index].tools, reply.finish, bool(self.task.text)),
            "confidence": sure if sure is None else round(sure, 6),
            "cached_tokens": reply.reused_tokens,
            **{"prefill_s": round(prefill, 4), "decode_s": round(decode, 4), "seconds": round(prefill + decode, 4)},
        }


def model_style(model: Path) -> str | None:
    """The prompt style that a GGUF file names, if it does; raises PetoolError if it does not load."""
    with LlamaModel(model, vocab_only=True) as vocabulary:
        style, layout = (vocabulary.metadata.get(f"petool_lite.prompt_{name}") for name in ("style", "layout"))
        return render.recorded_style(style, layout)


def work_rows(work: Work, told: dict[str, Any], report: Report) -> Rows:
    """The replies to all entries of `work`, as they come; `told` gets the meta's "gpu" facts."""
    if work.variant.engine == GPU:
        return _gpu_rows(work, told, report)
    if work.variant.engine == ENDPOINT:
        from petool_lite.bench.endpoint import endpoint_rows

        return endpoint_rows(work, report)
    if work.variant.engine == LLAMA:
        return _llama_rows(work, report)
    # a rule reads no tokens and takes no time worth counting
    calls = ((index, rule_call(work.variant.name, entry)) for index, entry in work.entries.items())
    return ((index, UNREAD | {"status": "ok", "reply": render.answer_text(call, "published")}) for index, call in calls)


def _llama_rows(work: Work, report: Report) -> Rows:
    """Replies of a GGUF file, in the order of the prompts' ids: neighbours then share the longest beginnings."""
    file, longest_reply = work.variant.model, work.task.max_reply_tokens
    with LlamaModel(file, vocab_only=True) as vocabulary:
        yield from work.render(vocabulary.chat(), vocabulary.train_ctx, report)
    longest = max((len(prompt.ids) for prompt in work.prompts.values()), default=0)
    with LlamaModel(file, n_ctx=longest + longest_reply) as model:
        model.exact_reuse = True  # a reply must not depend on which entry came before
        constrainer = model.constrainer() if work.variant.decoding == "constrained" else None
        for index, prompt in sorted(work.prompts.items(), key=lambda item: item[1].ids):
            try:
                constraint = work.start(constrainer, index) if constrainer else None
                reply = model.generate(prompt.ids, longest_reply, constraint, reuse=True)
            except PetoolError as error:
                yield index, UNREAD | work.asked(index) | {"status": "engine_error", "error": error.message}
                continue
            yield index, work.answered(index, reply) | {"cold": reply.reused_tokens == 0, "batch": 1}


def _gpu_rows(work: Work, told: dict[str, Any], report: Report) -> Rows:
    """Replies of a model directory, in batches, which may change the rounding; raises PetoolError without a GPU."""
    from petool_lite.inference.gpu import GpuModel

    variant, folder = work.variant, work.variant.model
    chat = render.chat_from_directory(folder)
    yield from work.render(chat, read_json(folder / "config.json")["max_position_embeddings"], report)
    indices, constrained = list(work.prompts), variant.decoding == "constrained"
    constrainer: Any = Constrainer.from_directory(folder, chat.eos_id) if constrained else None
    constrain = (lambda place: work.start(constrainer, indices[place])) if constrained else None
    model = GpuModel(folder, variant.adapter, variant.precision, variant.device)
    texts = [work.prompts[index].ids for index in indices]
    told["batch"] = variant.batch
    replies = model.generate(texts, work.task.max_reply_tokens, constrain, variant.batch)
    for number, (place, reply) in enumerate(replies):
        yield indices[place], work.answered(indices[place], reply) | {"cold": number == 0, "batch": variant.batch}
        told["memory_gb"] = round(model.peak_memory_gb(), 3)
