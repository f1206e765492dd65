"""Evaluation by generation while training: greedy tool calls on held-out entries, and the best weights so far."""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from petool_lite.console import Report
from petool_lite.data.entries import Answer
from petool_lite.data.files import source_sha256
from petool_lite.data.petoolbench import published_call
from petool_lite.errors import PetoolError
from petool_lite.inference.gpu import batches, greedy_ids
from petool_lite.models import Base
from petool_lite.prompt.prepare import load_learned
from petool_lite.prompt.render import Chat, Layout, prompt_ids
from petool_lite.recipe import Recipe
from petool_lite.runs import draft, write_json
from petool_lite.scorer import published_form, score_reply
from petool_lite.train.load import computing, generating, save_trained
from petool_lite.train.records import append_row, disk_errors


@dataclass(frozen=True)
class EvaluationSet:
    """Held-out prompts as token ids, each with its right answer; entries too long for the model count as wrong.
    `batch_tokens` bounds the prompt tokens that are padded and read together, `reply_tokens` one reply."""

    rows: tuple[tuple[list[int], Answer], ...]
    too_long: int
    chat: Chat
    batch_tokens: int
    reply_tokens: int


@dataclass(frozen=True)
class Score:
    """The result of one evaluation: accuracies in percent over `n` entries."""

    step: int
    n: int
    tool_acc: float
    param_acc: float
    joint_acc: float
    seconds: float

    @property
    def rank(self) -> tuple[float, float]:
        """What makes one better: joint accuracy, then tool accuracy."""
        return self.joint_acc, self.tool_acc


def check_evaluation(recipe: Recipe) -> None:
    """Refuse settings of the evaluation that do not fit together, or data that is not there."""
    settings = recipe.train
    if settings.early_stop and not settings.eval_every:
        raise PetoolError("train.early_stop needs evaluations", "--set train.eval_every=STEPS")
    if not settings.eval_every:
        return
    if not settings.eval_data:
        raise PetoolError("train.eval_every needs entries to score", "--set train.eval_data=FILE or demo:test:40")
    if recipe.model.max_tokens <= recipe.bench.max_reply_tokens:
        raise PetoolError("bench.max_reply_tokens leaves no room for a prompt", "raise model.max_tokens")
    source_sha256(settings.eval_data)


def load_evaluation_set(recipe: Recipe, chat: Chat, report: Report) -> EvaluationSet | None:
    """The recipe's held-out entries, rendered as training renders them; None where nothing is to be evaluated."""
    settings, most, reply = recipe.train, recipe.model.max_tokens, recipe.bench.max_reply_tokens
    if not settings.eval_every:
        return None
    sets = zip(*(item.entries for item in load_learned(recipe.data, settings.eval_data)), strict=False)
    entries = [each[number % len(each)] for number, each in enumerate(sets)]  # of several settings each has its turn
    found: list[tuple[list[int], Answer]] = []
    for entry in entries:
        if entry.answer is None:
            raise PetoolError(f"{settings.eval_data}: entry {entry.id} has no right answer", "use a labelled file")
        if fitted := prompt_ids(chat, entry, Layout(recipe.data.style, most), reserve=reply):
            found.append((fitted.ids, entry.answer))
    too_long = len(entries) - len(found)
    more = f", {too_long} of them too long for {most} tokens" if too_long else ""
    report(f"evaluating on {len(entries)} entries every {settings.eval_every} steps{more}", 0, 0, "")
    return EvaluationSet(tuple(found), too_long, chat, most, reply)


def evaluate(held_out: EvaluationSet, model: Any, step: int, report: Report) -> Score:
    """Greedy replies of `model`, scored; the model, its modes and all random numbers stay as they were."""
    import torch

    started, total, decode = time.perf_counter(), len(held_out.rows), held_out.chat.decode
    assert decode is not None  # a chat from a directory has one
    report("evaluating", 0, total, f"step {step}")
    scores: list[tuple[bool, bool, bool]] = []  # tool, parameters, both
    # no_grad, not inference_mode: a buffer that a layer makes here, such as rotary angles, serves training later
    with same_randomness(), generating(model), torch.no_grad(), computing(model):
        for batch in batches([len(prompt) for prompt, _ in held_out.rows], held_out.batch_tokens):
            prompts, answers = zip(*(held_out.rows[index] for index in batch), strict=True)
            replies = greedy_ids(model, prompts, {held_out.chat.eos_id}, held_out.reply_tokens)
            for ids, right in zip(replies, answers, strict=True):
                tool, parameters = score_reply(published_form(decode(ids)), published_call(right) or {"no_call": right})
                scores.append((tool, parameters, tool and parameters))
            joint = 100 * sum(both for *_, both in scores) / len(scores)
            report("evaluating", len(scores), total, f"step {step}, joint {joint:.1f} %")
    n = total + held_out.too_long
    tools, arguments, joints = (round(100 * sum(score[part] for score in scores) / n, 2) for part in range(3))
    return Score(step, n, tools, arguments, joints, round(time.perf_counter() - started, 2))


def same_randomness() -> Any:
    """Put torch's random numbers back as they were; nothing here draws others."""
    import torch

    return torch.random.fork_rng(devices=range(torch.cuda.device_count()))


def best_score(run: Path) -> Score | None:
    """The score of the adapter or model kept in `run`/best, or None."""
    scores = [Score(**json.loads(path.read_text())) for path in run.glob("best/step-*/eval.json")]
    return max(scores, key=lambda score: (score.rank, score.step), default=None)


def keep_best(run: Path, base: Base, held_out: EvaluationSet, model: Any, step: int, report: Report) -> dict[str, Any]:
    """Evaluate `model`, keep its weights in `run`/best/step-N if none were better; returns the row of eval.jsonl."""
    score = evaluate(held_out, model, step, report)
    append_row(run / "eval.jsonl", asdict(score))
    best, told = best_score(run), "the best so far"
    if best is not None and score.rank < best.rank:  # of equals the one that has learned longer
        told = f"the best is step {best.step}'s {best.joint_acc:.1f} %"
    else:
        target = run / "best" / f"step-{step}"
        with disk_errors(run, f"best/{target.name}"), draft(target) as folder:
            save_trained(model, folder, base)
            write_json(folder / "eval.json", asdict(score))
        for other in {*run.glob("best/step-*")} - {target}:
            shutil.rmtree(other)
    accuracies = f"tool {score.tool_acc:.1f} %, parameters {score.param_acc:.1f} %, joint {score.joint_acc:.1f} %"
    report(f"step {step}: {accuracies} of {score.n} in {score.seconds:.0f} s; {told}", 0, 0, "")
    return asdict(score)


def waited(rows: Sequence[Mapping[str, Any]]) -> int:
    """How many rows of eval.jsonl have passed since the one that was better than all before it."""
    ranks = [Score(**row).rank for row in rows]
    return len(ranks) - 1 - ranks.index(max(ranks)) if ranks else 0
