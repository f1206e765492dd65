"""Checks of a finished GGUF: same token ids as in training, same answers as the merged model, replies that end."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from petool_lite.export.other_server import OtherServer
from petool_lite.export.reference import Reference
from petool_lite.export.source import Source

from petool_lite.console import Report
from petool_lite.data.entries import Call, Entry
from petool_lite.data.files import load_dataset
from petool_lite.data.petoolbench import published_entry
from petool_lite.errors import PetoolError
from petool_lite.inference.llama import LlamaModel
from petool_lite.models import Base
from petool_lite.prompt import render
from petool_lite.prompt.render import Example, Layout, chat_from_directory
from petool_lite.recipe import Recipe

Trial = tuple[list[dict[str, Any]], list[str], list[Example], str]
PROMPTS, REPLIES = 50, 20
_CONSIDERED = 200  # held-out entries among which the shortest are taken
STOPPED = 0.9  # share of greedy replies that must end by themselves
# GGUF type -> least top-1 agreement and largest mean KL divergence (nats a token) on answer tokens
_LIMITS = {"bf16": (0.98, 0.01), "f16": (0.98, 0.01), "q8_0": (0.97, 0.02), "q6_k": (0.96, 0.03)}
_LOW_BITS = (0.9, 0.15)


def trial(base: Base, recipe: Recipe, wording: Mapping[str, Sequence[str]], report: Report) -> Trial:
    """Requests and their texts for token ids, the shortest rows with answers, and the data's name: of the recipe's own
    held-out entries, filled up with generated ones. `wording` is that of the run's published prompts, by setting."""
    chat = chat_from_directory(base.directory)
    data, name, setting = recipe.data, recipe.bench.data, recipe.data.one_setting
    made: Sequence[Entry] = load_dataset(f"demo:test:{PROMPTS}").entries
    try:
        entries: Sequence[Entry] = load_dataset(name, setting).entries[:_CONSIDERED]
    except PetoolError as error:  # a run may be exported where its test data is not
        entries, name = made, f"demo:test:{PROMPTS}"
        report(f"checking with generated entries, since {error.message}", 0, 0, "")
    if data.style == "published":
        words = wording.get(setting, ("", "", ""))
        entries, made = (
            tuple(item if item.published else published_entry(item, words, setting) for item in group)
            for group in (entries, made)
        )
    layout = Layout(data.style, recipe.model.max_tokens)
    requests = [render.entry_request(chat, entry, data.style) for entry in [*entries, *made][:PROMPTS]]
    texts = [render.render_messages(chat, **request) for request in requests]
    usable = [entry for entry in entries if isinstance(entry.answer, Call)] or made
    rows = [row for row in render.examples(chat, usable, layout) if row is not None]
    return requests, texts, sorted(rows, key=lambda row: len(row.ids))[:REPLIES], name


def check_files(
    paths: Mapping[str, Path], source: Source, tried_on: Trial, max_reply: int | None, report: Report
) -> dict[str, dict[str, Any]]:
    """The figures of each file of `source`, by type; the model is run, too, unless `max_reply`, the most tokens of a
    reply, is None. Raises PetoolError naming each fault."""
    requests, texts, rows, _ = tried_on
    figures: dict[str, dict[str, Any]] = {}
    for number, (name, path) in enumerate(paths.items(), 1):
        figures[name] = {"prompts_with_equal_ids": check_ids(path, source, texts)}
        report("checking token ids", number, len(paths), name)
    if OtherServer.installed():
        name, path = min(paths.items(), key=lambda item: item[1].stat().st_size)  # all have the same template
        figures[name]["prompts_llama_cpp_renders_alike"] = check_rendering(path, requests, texts)
    if max_reply is None:
        return figures
    wanted = Reference(source).answer_logits(rows, report)
    for name, path in paths.items():
        logits, ended = list[Any](), 0
        with Evaluator(path, max(len(row.ids) for row in rows) + max_reply + 1) as model:
            for number, row in enumerate(rows, 1):
                found, stopped = model.run(row.ids[: row.answer_start], row.ids[row.answer_start :], max_reply)
                logits, ended = [*logits, found], ended + stopped
                report(f"running {name} in llama.cpp", number, len(rows), "")
        figures[name] |= {"replies": len(rows), "replies_stopped": ended}
        figures[name] |= {"against_transformers": agreement(wanted, logits)}
    if faults := [fault for name, found in figures.items() for fault in shortfalls(name, found)]:
        hint = "train longer, or take a larger type; --verify quick leaves out what runs the model"
        raise PetoolError("the export is not right: " + "; ".join(faults), hint)
    return figures


def check_ids(path: Path, source: Source, texts: Sequence[str]) -> int:
    """How many texts have the same token ids in llama.cpp, transformers and training; raises PetoolError if not all.
    Also checks the chat template and the end token."""
    from transformers import AutoTokenizer

    trained = chat_from_directory(source.base.directory)
    template = trained.template if source.template is None else source.template
    tokenizer = AutoTokenizer.from_pretrained(source.base.directory)
    with LlamaModel(path, vocab_only=True) as model:
        exported = model.chat()
        if (exported.template, exported.eos_id) != (template, trained.eos_id):
            raise PetoolError(f"{path.name}: chat template or end token differ from the base's")
        for text in texts:
            ids, decode = exported.encode(text), exported.decode or model.decode
            others = trained.encode(text), list(tokenizer(text, add_special_tokens=False)["input_ids"])
            for name, other in zip(("training", "transformers"), others, strict=True):
                _check_equal(ids, other, decode, f"{path.name}: llama.cpp and {name} disagree on a prompt")
    return len(texts)


def check_rendering(path: Path, requests: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> int:
    """How many requests llama.cpp's own engine renders to training's ids; raises PetoolError if not all."""
    server, what = OtherServer(path), f"{path.name}: llama.cpp's server and training make other prompts"
    with LlamaModel(path, vocab_only=True) as model:
        for request, text in zip(requests, texts, strict=True):
            _check_equal(server.ids(request), model.encode(text), model.decode, what)
    return len(texts)


def _check_equal(ids: Sequence[int], other: Sequence[int], decode: Any, what: str) -> None:
    """Raise PetoolError that says `what`, and the first differing token on both sides with its text."""
    if ids == other:
        return
    place = render.common_length(ids, other)
    shown = [f"{side[place]} {decode([side[place]])!r}" if place < len(side) else "nothing" for side in (ids, other)]
    raise PetoolError(f"{what}: token {place} of {len(ids)} and {len(other)} is {shown[0]} and {shown[1]}")


class Evaluator(LlamaModel):
    """One GGUF file: logits of every token of given answers, which scoring does not need, and greedy replies."""

    def run(self, prompt: Sequence[int], answer: Sequence[int], max_reply: int) -> tuple[Any, bool]:
        """Logits for each token of `answer` after `prompt`, float32 numpy (answer tokens, vocabulary), and whether the
        greedy reply to `prompt` ends by itself within `max_reply` tokens."""
        import numpy as np

        self.read(prompt, reuse=False)
        parts = [self._logits().copy()[None]]
        for _ in range(max_reply):
            token = int(self._logits().argmax())
            if self.ends(token):
                break
            self._eval([token])
        ended = self.ends(int(self._logits().argmax()))
        self._keep(len(prompt))
        step = self.settings.ubatch
        for first in range(0, len(answer) - 1, step):
            given = answer[:-1][first : first + step]
            self._eval(given[:1], given[1:])
            places = range(len(self.held) - len(given), len(self.held))
            parts.append(np.stack([self._logits(place) for place in places]))
        return np.concatenate(parts), ended


def agreement(wanted: Sequence[Any], found: Sequence[Any]) -> dict[str, Any]:
    """Over all answer tokens: how often the likeliest token is the same, and the mean KL(wanted || found) in nats."""
    import torch
    from torch.nn.functional import kl_div

    logs = [torch.cat([torch.as_tensor(row) for row in rows]).double().log_softmax(1) for rows in (wanted, found)]
    same = (logs[0].argmax(1) == logs[1].argmax(1)).double().mean()
    divergence = kl_div(logs[1], logs[0], reduction="batchmean", log_target=True)
    return {"tokens": len(logs[0]), "top1": round(float(same), 4), "kl": float(f"{divergence:.3g}")}


def shortfalls(name: str, figures: dict[str, Any]) -> list[str]:
    """What of a file's figures lies below its threshold, in words."""
    faults, against = [], figures["against_transformers"]
    stopped, count = figures["replies_stopped"], figures["replies"]
    if stopped < STOPPED * count:
        faults.append(f"{stopped} of {count} greedy replies stop at the end token, fewer than {STOPPED:.0%}")
    least, most = _LIMITS.get(name, _LOW_BITS)
    if against["top1"] < least:
        faults.append(f"top-1 agreement with transformers {against['top1']}, below {least}")
    if not against["kl"] <= most:
        faults.append(f"KL divergence from transformers {against['kl']}, above {most}")
    return [f"{name}: {fault}" for fault in faults]
