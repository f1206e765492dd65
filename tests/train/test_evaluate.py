"""Evaluation by generation: what is read, how replies are scored, which adapter stays, when it stops."""

import json
from contextlib import nullcontext
from dataclasses import asdict

import pytest

from petool_lite.console import silent
from petool_lite.data.entries import Call
from petool_lite.data.files import load_dataset
from petool_lite.errors import PetoolError
from petool_lite.prompt.render import Layout, chat_from_directory, prompt_ids
from petool_lite.recipe import load_recipe
from petool_lite.train import evaluate
from petool_lite.train.evaluate import EvaluationSet, Score, best_score, check_evaluation, load_evaluation_set

HELD_OUT = ["train.eval_every=1", "train.eval_data=demo:test:5", "model.max_tokens=2000", "bench.max_reply_tokens=8"]


def test_the_prompts_are_those_of_bench(smollm2) -> None:
    chat = chat_from_directory(smollm2.directory)
    held_out = load_evaluation_set(load_recipe("demo", HELD_OUT)[1], chat, silent)
    entries = load_dataset("demo:test:5", "rating").entries
    layout = Layout("petool", 2000 - 8)
    assert held_out.rows == tuple((prompt_ids(chat, entry, layout).ids, entry.answer) for entry in entries)
    short = load_evaluation_set(load_recipe("demo", [*HELD_OUT, "model.max_tokens=40"])[1], chat, silent)
    assert (len(short.rows), short.too_long) == (0, 5), "too long is wrong, not left out"


def test_a_reply_is_scored_by_its_tool_and_its_arguments(smollm2, monkeypatch) -> None:
    chat, said = chat_from_directory(smollm2.directory), '{"name": "%s", "arguments": {"q": %s}}'
    replies = [said % given for given in (("a", 1), ("b", 1), ("a", 2), ("a", 3))] + ['{"name": "a", "argum']
    written = [chat.encode(reply) for reply in (*replies, "None of them.", replies[0])]
    rights = [Call("a", {"q": 1})] * 5 + ["No tool fits."] * 2
    held_out = EvaluationSet(tuple(([n], right) for n, right in enumerate(rights)), 3, chat, 100, 8)
    monkeypatch.setattr(evaluate, "greedy_ids", lambda _, prompts, *more: [written[n] for (n,) in prompts])
    for name in ("generating", "computing"):
        monkeypatch.setattr(evaluate, name, nullcontext)
    found = evaluate.evaluate(held_out, None, 1, silent)
    assert (found.n, found.tool_acc, found.param_acc, found.joint_acc) == (10, 40, 30, 20)


def test_the_best_is_the_highest_joint_then_tool_then_latest(tmp_path) -> None:
    assert best_score(tmp_path) is None
    for step, joint, tool in ((2, 50.0, 0.0), (4, 60.0, 70.0), (6, 60.0, 70.0), (8, 60.0, 65.0)):
        (folder := tmp_path / "best" / f"step-{step}").mkdir(parents=True)
        (folder / "eval.json").write_text(json.dumps(asdict(Score(step, 100, tool, 0.0, joint, 1.0))))
    assert best_score(tmp_path).step == 6


def test_settings_that_do_not_fit_are_refused_early() -> None:
    for pairs, message in (
        (["train.eval_every=5"], "needs entries to score"),
        (["train.early_stop=2"], "needs evaluations"),
        (["train.eval_every=5", "train.eval_data=nowhere.json"], "no such data file"),
        ([*HELD_OUT[:2], "model.max_tokens=100", "bench.max_reply_tokens=100"], "no room for a prompt"),
    ):
        with pytest.raises(PetoolError, match=message):
            check_evaluation(load_recipe("demo", pairs)[1])
