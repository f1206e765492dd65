"""Checks of a finished GGUF: same token ids as in training, same answers as the merged model, replies that end.

Every figure is returned for export.json; one below its threshold fails the export and is named.
"""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from petool_lite.inference.llama_open import first_error
from petool_lite.models import Base
from petool_lite.prompt import render
from petool_lite.prompt.render import Example, Layout, chat_from_directory, entry_request, examples
from petool_lite.recipe import Recipe

PROMPTS, REPLIES = 50, 20
_CONSIDERED = 200  # held-out entries among which the shortest are taken
STOPPED = 0.9  # share of greedy replies that must end by themselves
# GGUF type -> least top-1 agreement and largest mean KL divergence (nats a token) on answer tokens
_LIMITS = {"bf16": (0.98, 0.01), "f16": (0.98, 0.01), "q8_0": (0.97, 0.02), "q6_k": (0.96, 0.03)}
_LOW_BITS = (0.9, 0.15)


@dataclass(frozen=True)
class Trial:
    """What the files are tried on: requests and the texts that training makes of them, for token ids, and rows with
    answers, the shortest of the held-out entries."""

    requests: list[dict[str, Any]]
    texts: list[str]
    rows: list[Example]
    source: str


def prepare_trial(base: Base, recipe: Recipe, wording: Mapping[str, Sequence[str]], report: Report) -> Trial:
    """Prompts of the recipe's held-out entries in its own style; generated ones fill up what is missing. `wording` is
    what the run learned around the arrays of the published prompt, by setting."""
    chat = chat_from_directory(base.directory)
    data, layout = recipe.data, Layout(recipe.data.style, recipe.model.max_tokens)
    entries: Sequence[Entry] = ()
    name = recipe.bench.data
    try:
        entries = load_dataset(name, data.one_setting).entries[:_CONSIDERED]
    except PetoolError as error:  # a run may be exported where its test data is not
        name = f"demo:test:{PROMPTS}"
        report(f"checking with generated entries, since {error.message}", 0, 0, "")
    made: Sequence[Entry] = () if len(entries) >= PROMPTS else load_dataset(f"demo:test:{PROMPTS}").entries
    if data.style == "published":
        words = wording.get(data.one_setting, ("", "", ""))
        entries, made = (
            [item if item.published else published_entry(item, words, data.one_setting) for item in group]
            for group in (entries, made)
        )
    requests = [entry_request(chat, entry, data.style) for entry in [*entries, *made][:PROMPTS]]
    texts = [render.render_messages(chat, **request) for request in requests]
    usable = [entry for entry in entries if isinstance(entry.answer, Call)] or made
    rows = [row for row in examples(chat, usable, layout) if row is not None]
    return Trial(requests, texts, sorted(rows, key=lambda row: len(row.ids))[:REPLIES], name)


class Checks:
    """The checks of one export: `figures` by file type as they are found."""

    def __init__(self, source: Source, trial: Trial, max_reply: int, report: Report) -> None:
        """Files of `source` are tried on `trial`, with replies of at most `max_reply` tokens."""
        self.source, self.trial, self.max_reply, self.report = source, trial, max_reply, report
        self.figures: dict[str, dict[str, Any]] = {}
        self._wanted: list[Any] = []  # the merged model's own logits, which every file is compared with

    def run(self, paths: Mapping[str, Path], level: str) -> None:
        """Check the files, by type; at level "full" with the model run. Raises PetoolError naming each fault."""
        for number, (name, path) in enumerate(paths.items(), 1):
            self.figures[name] = {"prompts_with_equal_ids": check_ids(path, self.source, self.trial.texts)}
            self.report("checking token ids", number, len(paths), name)
        if OtherServer.installed():
            name, path = min(paths.items(), key=lambda item: item[1].stat().st_size)  # all have the same template
            self.figures[name]["prompts_llama_cpp_renders_alike"] = check_rendering(path, self.trial)
        if level != "full":
            return
        self._wanted = Reference(self.source).answer_logits(self.trial.rows, self.report)
        for name, path in paths.items():
            outcomes = self._outcomes(path, self.max_reply, name)
            stopped = sum(outcome.stopped for outcome in outcomes)
            self.figures[name] |= {"replies": len(outcomes), "replies_stopped": stopped} | self._against(outcomes)
        faults = [fault for name, figures in self.figures.items() for fault in shortfalls(name, figures)]
        if faults:
            hint = "train longer, or take a larger type; --verify quick leaves out what runs the model"
            raise PetoolError("the export is not right: " + "; ".join(faults), hint)

    def run_lora(self, path: Path, type_name: str, base_file: Path) -> None:
        """Compare the base's file with the LoRA file on it in llama.cpp to the merged model; after a full `run`."""
        outcomes = self._outcomes(base_file, 0, f"base {type_name} + LoRA", path)
        self.figures["lora"] = {"base_file": base_file.name} | self._against(outcomes)
        if faults := shortfalls(type_name, self.figures["lora"]):
            raise PetoolError(f"the LoRA file is not right: {'; '.join(faults)}", "this is a fault of the export")

    def _against(self, outcomes: list["Outcome"]) -> dict[str, Any]:
        return {"against_transformers": agreement(self._wanted, [outcome.logits for outcome in outcomes])}

    def _outcomes(self, path: Path, max_reply: int, name: str, lora: Path | None = None) -> list["Outcome"]:
        rows, outcomes = self.trial.rows, []
        with Evaluator(path, max(len(row.ids) for row in rows) + max_reply + 1, lora) as model:
            for number, row in enumerate(rows, 1):
                outcomes.append(model.run(row.ids[: row.answer_start], row.ids[row.answer_start :], max_reply))
                self.report(f"running {name} in llama.cpp", number, len(rows), "")
        return outcomes


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
            ids = exported.encode(text)
            others = trained.encode(text), list(tokenizer(text, add_special_tokens=False)["input_ids"])
            for name, other in zip(("training", "transformers"), others, strict=True):
                if ids != other:
                    where = _first_difference(ids, other, exported.decode or model.decode)
                    raise PetoolError(f"{path.name}: llama.cpp and {name} disagree on a prompt: {where}")
    return len(texts)


def check_rendering(path: Path, trial: Trial) -> int:
    """How many requests llama.cpp's own engine renders to training's ids; raises PetoolError if not all."""
    server = OtherServer(path)
    with LlamaModel(path, vocab_only=True) as model:
        for request, text in zip(trial.requests, trial.texts, strict=True):
            found, ids = server.ids(request), model.encode(text)
            if found != ids:
                where = _first_difference(found, ids, model.decode)
                raise PetoolError(f"{path.name}: llama.cpp's server and training make other prompts: {where}")
    return len(trial.texts)


def _first_difference(ids: Sequence[int], other: Sequence[int], decode: Any) -> str:
    """The first differing token on both sides, with its text."""
    place = render.common_length(ids, other)
    shown = [f"{side[place]} {decode([side[place]])!r}" if place < len(side) else "nothing" for side in (ids, other)]
    return f"token {place} of {len(ids)} and {len(other)} is {shown[0]} and {shown[1]}"


@dataclass(frozen=True)
class Outcome:
    """`logits`: float32 numpy (answer tokens, vocabulary). `reply`: greedy ids; `stopped`: it ended by itself."""

    logits: Any
    reply: tuple[int, ...]
    stopped: bool


class Evaluator(LlamaModel):
    """One GGUF file with a LoRA file applied, if given: logits of given answers, and greedy replies. Scoring uses
    petool_lite.inference as it is; this adds what scoring does not need, logits of every answer token."""

    def __init__(self, path: Path, n_ctx: int, lora: Path | None = None) -> None:
        """Load both; `n_ctx` holds a prompt with its answer or reply. Raises PetoolError if one does not load."""
        super().__init__(path, n_ctx)
        if lora is None:
            return
        self._reserve(self.n_ctx)  # a context that grew later would be one without the adapter
        adapter = self._lib.llama_adapter_lora_init(self._model, str(lora).encode())
        adapters = (self._lib.llama_adapter_lora_p_ctypes * 1)(adapter) if adapter else None
        scales = (ctypes.c_float * 1)(1.0)
        if not adapters or self._lib.llama_set_adapters_lora(self.context.pointer, adapters, 1, scales) != 0:
            self.close()
            raise PetoolError(f"llama.cpp cannot apply {lora}: {first_error()}", "this is a fault of the export")

    def run(self, prompt: Sequence[int], answer: Sequence[int], max_reply: int) -> Outcome:
        """Logits for each token of `answer` after `prompt`, and what the model says greedily after `prompt` itself."""
        import numpy as np

        self.read(prompt, reuse=False)
        parts = [self._logits().copy()[None]]
        reply, ended = list[int](), False
        while len(reply) <= max_reply and not ended:  # one more than is kept, to see whether the reply ends there
            token = int(self._logits().argmax())
            ended = self.ends(token)
            reply += [] if ended else [token]
            if not ended and len(reply) <= max_reply:
                self._eval([token])
        self._keep(len(prompt))
        step = self.settings.ubatch
        for first in range(0, len(answer) - 1, step):
            given = answer[:-1][first : first + step]
            self._eval(given[:1], given[1:])
            places = range(len(self.held) - len(given), len(self.held))
            parts.append(np.stack([self._logits(place) for place in places]))
        return Outcome(np.concatenate(parts), tuple(reply[:max_reply]), ended)


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
    if (stopped := figures.get("replies_stopped", 0)) < STOPPED * (count := figures.get("replies", 0)):
        faults.append(f"{stopped} of {count} greedy replies stop at the end token, fewer than {STOPPED:.0%}")
    least, most = _LIMITS.get(name, _LOW_BITS)
    if against["top1"] < least:
        faults.append(f"top-1 agreement with transformers {against['top1']}, below {least}")
    if not against["kl"] <= most:
        faults.append(f"KL divergence from transformers {against['kl']}, above {most}")
    return [f"{name}: {fault}" for fault in faults]
