"""Prove a finished GGUF: same token ids as in training, same answers as the merged model, replies that end.

Every figure is returned for export.json; one below its threshold fails the export and is named.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petool_lite.export.evaluate import Evaluator, Outcome
from petool_lite.export.reference import Reference, Row
from petool_lite.export.stream import Source
from petool_lite.export.weights import open_weights

from petool_lite.console import Report
from petool_lite.data.demo import generate
from petool_lite.data.entries import Entry, parse_entry
from petool_lite.data.files import load_dataset
from petool_lite.errors import PetoolError
from petool_lite.inference.llama import LlamaModel
from petool_lite.models import Base
from petool_lite.prompt.render import Layout, chat_from_directory, examples, prompt_text
from petool_lite.recipe import Recipe

LEVELS = ("full", "quick")
PROMPTS, REPLIES = 50, 20
_CONSIDERED = 200  # held-out entries among which the shortest are taken
STOPPED = 0.9  # share of greedy replies that must end by themselves
# GGUF type -> least top-1 agreement and largest mean KL divergence (nats a token) on answer tokens
_LIMITS = {"bf16": (0.98, 0.01), "f16": (0.98, 0.01), "q8_0": (0.97, 0.02), "q6_k": (0.96, 0.03)}
_LOW_BITS = (0.9, 0.15)


@dataclass(frozen=True)
class Trial:
    """What the files are tried on: texts for token ids, and rows with answers, the shortest of the held-out entries."""

    texts: list[str]
    rows: list[Row]
    source: str


def prepare_trial(base: Base, recipe: Recipe, report: Report) -> Trial:
    """Prompts of the recipe's held-out entries in its own style; generated ones fill up what is missing."""
    chat = chat_from_directory(base.directory)
    layout = Layout(recipe.data.one_setting, recipe.data.style, recipe.model.max_tokens)
    try:
        entries: Sequence[Entry] = load_dataset(recipe.bench.data, layout.setting, _CONSIDERED).entries
        name = recipe.bench.data
    except PetoolError as error:  # a run may be exported where its test data is not
        entries, name = (), f"demo:test:{PROMPTS}"
        report(f"checking with generated entries, since {error.message}", 0, 0, "")
    demo = [
        parse_entry(row, layout.setting, "demo", index)
        for index, row in enumerate(generate("test", PROMPTS) if len(entries) < PROMPTS else [])
    ]
    texts = [prompt_text(chat, entry, layout) for entry in [*entries, *demo][:PROMPTS]]
    usable = [entry for entry in entries if entry.gold is not None] or demo
    rows = [Row(row.ids, row.answer_start) for row in examples(chat, usable, layout) if row is not None]
    return Trial(texts, sorted(rows, key=lambda row: len(row.ids))[:REPLIES], name)


def check_ids(path: Path, base: Base, texts: Sequence[str]) -> int:
    """How many texts have the same token ids in llama.cpp, transformers and training; raises PetoolError if not all.

    Also checks the chat template and the end token.
    """
    from transformers import AutoTokenizer

    trained = chat_from_directory(base.directory)
    tokenizer = AutoTokenizer.from_pretrained(base.directory)
    with LlamaModel(path, vocab_only=True) as model:
        exported = model.chat()
        if (exported.template, exported.eos_id) != (trained.template, trained.eos_id):
            raise PetoolError(f"{path.name}: chat template or end token differ from the base's")
        for text in texts:
            ids = exported.encode(text)
            for name, other in (("training", trained.encode(text)), ("transformers", _ids(tokenizer, text))):
                if ids != other:
                    raise PetoolError(f"{path.name}: llama.cpp and {name} disagree on a prompt: {_where(ids, other)}")
    return len(texts)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _where(ids: Sequence[int], other: Sequence[int]) -> str:
    place = next((i for i, (a, b) in enumerate(zip(ids, other, strict=False)) if a != b), min(len(ids), len(other)))
    return f"token {place} of {len(ids)} and {len(other)}"


def reference_logits(source: Source, trial: Trial, report: Report) -> list[Any]:
    """What the merged model in transformers says of each answer token of the trial."""
    with open_weights(source.tensors) as reader:
        return Reference(source, reader).answer_logits(trial.rows, report)


def verify_ids(paths: dict[str, Path], base: Base, trial: Trial, report: Report) -> dict[str, dict[str, Any]]:
    """The checks that run no model: type -> figures."""
    checks: dict[str, dict[str, Any]] = {}
    for number, (name, path) in enumerate(paths.items(), 1):
        checks[name] = {"prompts_with_equal_ids": check_ids(path, base, trial.texts)}
        report("checking token ids", number, len(paths), name)
    return checks


def verify_answers(
    paths: dict[str, Path], wanted: list[Any], trial: Trial, max_reply: int, report: Report
) -> dict[str, dict[str, Any]]:
    """Let every file answer and compare with `wanted`, the merged model's logits: type -> figures.

    Raises PetoolError naming each figure below its threshold.
    """
    checks: dict[str, dict[str, Any]] = {}
    whole = None
    for name in sorted(paths, key=lambda name: name != "bf16"):  # the others are compared with bf16 where it is there
        outcomes = run_file(paths[name], trial, max_reply, report, name)
        found = [outcome.logits for outcome in outcomes]
        checks[name] = {
            "replies": len(outcomes),
            "replies_stopped": sum(outcome.stopped for outcome in outcomes),
            "against_transformers": agreement(wanted, found),
        }
        if name == "bf16":
            whole = found
        elif whole is not None:
            checks[name]["against_bf16"] = agreement(whole, found)
    faults = [fault for name, figures in checks.items() for fault in shortfalls(name, figures)]
    if faults:
        raise PetoolError(
            "the export is not right: " + "; ".join(faults),
            "train longer, or take a larger type; --verify quick leaves out what runs the model",
        )
    return checks


def run_file(
    path: Path, trial: Trial, max_reply: int, report: Report, name: str, lora: Path | None = None
) -> list[Outcome]:
    """Let llama.cpp answer the trial's rows."""
    longest = max(len(row.ids) for row in trial.rows)
    outcomes = []
    with Evaluator(path, longest + max_reply + 1, lora) as model:
        for number, row in enumerate(trial.rows, 1):
            outcomes.append(model.run(row.ids[: row.answer_start], row.answer, max_reply))
            report(f"running {name} in llama.cpp", number, len(trial.rows), "")
    return outcomes


def agreement(wanted: Sequence[Any], found: Sequence[Any]) -> dict[str, Any]:
    """Over all answer tokens: how often the likeliest token is the same, and the mean KL(wanted || found) in nats."""
    import numpy as np

    reference, other = np.concatenate(wanted).astype(np.float64), np.concatenate(found).astype(np.float64)
    logs = [_log_softmax(logits) for logits in (reference, other)]
    divergence = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(axis=1)
    same = reference.argmax(axis=1) == other.argmax(axis=1)
    return {"tokens": len(same), "top1": round(float(same.mean()), 4), "kl": float(f"{divergence.mean():.3g}")}


def _log_softmax(logits: Any) -> Any:
    import numpy as np

    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def shortfalls(name: str, figures: dict[str, Any]) -> list[str]:
    """What of a file's figures lies below its threshold, in words."""
    faults = []
    if figures.get("replies_stopped", 0) < STOPPED * figures.get("replies", 0):
        faults.append(
            f"{name}: {figures['replies_stopped']} of {figures['replies']} greedy replies stop at the end token, "
            f"fewer than {STOPPED:.0%}"
        )
    least, most = _LIMITS.get(name, _LOW_BITS)
    for key in ("against_transformers", "against_bf16"):
        if key not in figures:
            continue
        against = key.removeprefix("against_")
        if figures[key]["top1"] < least:
            faults.append(f"{name} against {against}: top-1 agreement {figures[key]['top1']}, below {least}")
        if not figures[key]["kl"] <= most:
            faults.append(f"{name} against {against}: KL divergence {figures[key]['kl']}, above {most}")
    return faults
