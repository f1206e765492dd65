"""Scoring: pure functions over results rows; imports no model library.

Three scorers read every reply. `published` is the paper's, `spanning` the same with a match over several lines (the
published 3B result used it), `strict` is petool-lite's own: the whole reply is one JSON call, compared as JSON.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from petool_lite.bench.stats import mcnemar, paired_interval, wilson

from petool_lite.inference.parse import CallFailure, read_call
from petool_lite.scorer import published_call, score_reply

SCORERS = ("published", "spanning", "strict")
METRICS = ("tool", "param", "joint")

Pair = tuple[bool, bool]  # tool right, parameters right


def canonical(value: Any) -> str:
    """JSON text that is equal for equal JSON values: keys in order, 1.0 and 1 the same number, true no number."""
    return json.dumps(json.loads(json.dumps(value), parse_float=_number), sort_keys=True)


def _number(text: str) -> float | int:
    value = float(text)
    return int(value) if value.is_integer() else value


@dataclass(frozen=True)
class Mark:
    """One reply, scored: a pair a scorer, the call that was read (None without one) and its canonical text.

    `call` is the strict reading, or where there is none that of the spanning scorer.
    """

    published: Pair
    spanning: Pair
    strict: Pair
    call: Mapping[str, Any] | None
    call_text: str

    def right(self, metric: str, scorer: str = "published") -> bool:
        """Whether `metric` (tool, param, joint) is right by `scorer`."""
        pair: Pair = getattr(self, scorer)
        return all(pair) if metric == "joint" else pair[METRICS.index(metric)]


def mark_row(row: Mapping[str, Any]) -> Mark:
    """Score one row; one without a reply (too long, engine error) is wrong by every scorer."""
    reply, gold = row.get("reply", "") if row["status"] == "ok" else "", row["gold"]
    call, strict = None, (False, False)
    try:
        read = read_call(reply, row.get("finish", "stop"))
        same = canonical(read.parameters) == canonical(gold["parameters"])
        call, strict = (
            {"tool_name": read.tool_name, "parameters": read.parameters},
            (
                read.tool_name == gold["tool_name"],
                same,
            ),
        )
    except (CallFailure, RecursionError):
        found = published_call(reply, spanning=True)
        if found and isinstance(found["tool_name"], str) and isinstance(found["parameters"], dict):
            call = {key: found[key] for key in ("tool_name", "parameters")}
    published = _scored(reply, gold, False)
    text = canonical(call) if call is not None else f"no call: {reply}"
    return Mark(published, published if "\n" not in reply else _scored(reply, gold, True), strict, call, text)


def _scored(reply: str, gold: Mapping[str, Any], spanning: bool) -> Pair:
    try:
        return score_reply(reply, gold, spanning)
    except RecursionError:  # comparing what the parser just managed to nest
        return False, False


def percent(count: int, n: int) -> float:
    """`count` of `n` in percent; 0 of nothing."""
    return round(100 * count / n, 4) if n else 0.0


def accuracies(marks: Sequence[Mark], scorer: str = "published") -> dict[str, Any]:
    """tool_acc, param_acc, joint_acc in percent and their 95 % Wilson intervals, over all `marks`."""
    found: dict[str, Any] = {}
    for metric in METRICS:
        count = sum(mark.right(metric, scorer) for mark in marks)
        found[f"{metric}_acc"] = percent(count, len(marks))
        found[f"{metric}_ci"] = list(wilson(count, len(marks)))
    return found


def score_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Scores of one variant: n, the published figures, those of the other scorers, and counts.

    Rows whose engine failed are counted apart and left out of n; prompts that do not fit count as wrong.
    """
    good = [row for row in rows if row["status"] != "engine_error"]
    marks = [mark_row(row) for row in good]
    return summary(rows, marks)


def summary(rows: Sequence[Mapping[str, Any]], marks: Sequence[Mark]) -> dict[str, Any]:
    """What score_rows returns, from all rows and the marks of those whose engine did not fail."""
    answered = [row for row in rows if row["status"] == "ok"]
    return {
        "n": len(marks),
        **accuracies(marks),
        **{scorer: accuracies(marks, scorer) for scorer in SCORERS[1:]},
        "no_call": sum(mark.call is None for mark in marks),
        "cut_off": sum(row["finish"] == "length" for row in answered),
        "too_long": sum(row["status"] == "too_long" for row in rows),
        "engine_errors": len(rows) - len(marks),
        "history_trimmed": sum(row.get("history_dropped", 0) > 0 for row in rows),
    }


def compare_marks(first: Mapping[Any, Mark], second: Mapping[Any, Mark]) -> dict[str, Any]:
    """Paired tests of two variants on the entries that both scored, by the published scorer.

    For each metric: entries that only the first or only the second has right, the difference second minus first in
    points with its 95 % interval, and p of the exact McNemar test. `agreement` is the share with the same call.
    """
    common = [key for key in first if key in second]
    found: dict[str, Any] = {"n": len(common)}
    same = sum(first[key].call_text == second[key].call_text for key in common)
    found["agreement"] = percent(same, len(common))
    found["agreement_ci"] = list(wilson(same, len(common)))
    for metric in METRICS:
        pairs = [(first[key].right(metric), second[key].right(metric)) for key in common]
        lost, won = pairs.count((True, False)), pairs.count((False, True))
        found[metric] = {
            "first_only": lost,
            "second_only": won,
            "difference": round(100 * (won - lost) / len(common), 4) if common else 0.0,
            "ci": list(paired_interval(lost, won, len(common))),
            "p": mcnemar(lost, won),
        }
    return found
