"""Scores: pure functions over results rows, their statistics and classes of error; imports no model library.

Three scorers read every reply. `published` is the paper's, `spanning` the same with a match over several lines (the
published 3B result used it), `strict` is petool-lite's own: the whole reply is one JSON call, compared as JSON.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, sqrt
from typing import Any

from petool_lite.data.entries import Call
from petool_lite.inference.parse import CallFailure, read_answer
from petool_lite.scorer import published_form, read_published, score_reply

SCORERS = ("published", "spanning", "strict")
METRICS = ("tool", "param", "joint")
# Every row has exactly one class; "right" are those that count as right in joint_acc.
CLASSES = {
    "right": "tool and parameters right",
    "other_form": "right call in a form that the published scorer does not read",
    "wrong_provider": "a tool that does the right job, of another provider",
    "wrong_function": "a tool that does another job",
    "wrong_tool": "another offered tool; nothing tells whether it does the same job",
    "invented_tool": "a tool that was not offered",
    "missing_parameter": "right tool, a parameter is missing",
    "extra_parameter": "right tool, a parameter too many",
    "wrong_parameter": "right tool, a wrong value",
    "no_call": "no call to be read",
    "needless_call": "a call, where no tool fits",
    "cut_off": "reached the reply limit before a call was complete",
    "too_long": "the prompt exceeds the context",
    "engine_error": "the engine failed; not scored, tried again by the next bench",
}
_Z = 1.959964  # 97.5 % point of the normal distribution

Pair = tuple[bool, bool]  # tool right, parameters right


@dataclass(frozen=True)
class Score:
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


def canonical(value: Any) -> str:
    """JSON text that is equal for equal JSON values: keys in order, 1.0 and 1 the same number, true no number."""
    return json.dumps(json.loads(json.dumps(value), parse_float=_number), sort_keys=True)


def _number(text: str) -> float | int:
    value = float(text)
    return int(value) if value.is_integer() else value


def score_row(row: Mapping[str, Any]) -> Score:
    """Score one row; one without a reply (too long, engine error) is wrong by every scorer.

    Where no tool fits, any reply without a call is right, by every scorer.
    """
    reply, gold = row.get("reply", "") if row["status"] == "ok" else "", row["gold"]
    call, strict = None, (False, False)
    try:
        answer = read_answer(reply, row.get("finish", "stop"))
        if isinstance(answer, Call):
            call = {"tool_name": answer.name, "parameters": dict(answer.arguments)}
            same = canonical(call["parameters"]) == canonical(gold.get("parameters"))
            strict = (answer.name == gold.get("tool_name"), same)
    except (CallFailure, RecursionError):
        pass
    text = reply if row["style"] == "published" else published_form(reply)
    if call is None:
        found = read_published(text, spanning=True)
        if found and isinstance(found["tool_name"], str) and isinstance(found["parameters"], dict):
            call = {key: found[key] for key in ("tool_name", "parameters")}
    told = canonical(call) if call is not None else f"no call: {reply}"
    published = score_reply(text, gold)
    spanning = published if "\n" not in text else score_reply(text, gold, spanning=True)
    return Score(published, spanning, published if "no_call" in gold else strict, call, told)


def error_class(row: Mapping[str, Any], score: Score) -> str:
    """The class of a row, a key of CLASSES."""
    if row["status"] != "ok":
        return str(row["status"])
    if all(score.published):
        return "right"
    if score.call is None:
        return "cut_off" if row["finish"] == "length" else "no_call"
    name, facts, gold = score.call["tool_name"], row["facts"], row["gold"]
    if "no_call" in gold:
        return "needless_call"
    if name != gold["tool_name"]:
        if name not in facts["offered"]:
            return "invented_tool"
        same = facts["same_job"]
        return "wrong_tool" if not same else "wrong_provider" if name in same else "wrong_function"
    found, wanted = score.call["parameters"], gold["parameters"]
    if wanted.keys() - found.keys():
        return "missing_parameter"
    if found.keys() - wanted.keys():
        return "extra_parameter"
    return "other_form" if canonical(found) == canonical(wanted) else "wrong_parameter"


def count_classes(found: Iterable[str]) -> dict[str, int]:
    """How often each class occurs, in the order of CLASSES, zeros included."""
    counts = Counter(found)
    return {name: counts[name] for name in CLASSES}


def percent(count: int, n: int) -> float:
    """`count` of `n` in percent; 0 of nothing."""
    return round(100 * count / n, 4) if n else 0.0


def accuracies(scores: Sequence[Score], scorer: str = "published") -> dict[str, Any]:
    """tool_acc, param_acc, joint_acc in percent and their 95 % Wilson intervals, over all `scores`."""
    found: dict[str, Any] = {}
    for metric in METRICS:
        count = sum(score.right(metric, scorer) for score in scores)
        found[f"{metric}_acc"] = percent(count, len(scores))
        found[f"{metric}_ci"] = list(wilson(count, len(scores)))
    return found


def summary(rows: Sequence[Mapping[str, Any]], scores: Sequence[Score]) -> dict[str, Any]:
    """What is to be said of one variant: n, the published figures, those of the other scorers, and counts.

    Rows whose engine failed are counted apart and left out of n; prompts that do not fit count as wrong.
    """
    good = [score for row, score in zip(rows, scores, strict=True) if row["status"] != "engine_error"]
    return {
        "n": len(good),
        **accuracies(good),
        **{scorer: accuracies(good, scorer) for scorer in SCORERS[1:]},
        "no_call": sum(score.call is None for score in good),
        "cut_off": sum(row["status"] == "ok" and row["finish"] == "length" for row in rows),
        "too_long": sum(row["status"] == "too_long" for row in rows),
        "engine_errors": len(rows) - len(good),
        "history_trimmed": sum(row.get("history_dropped", 0) > 0 for row in rows),
    }


def paired(first: Mapping[Any, Score], second: Mapping[Any, Score]) -> dict[str, Any]:
    """Paired tests of two variants on the entries that both scored, by the published scorer.

    For each metric: entries that only the first or only the second has right, the difference second minus first in
    points with its 95 % interval, and p of the exact McNemar test. `agreement` is the share with the same call.
    """
    common = [key for key in first if key in second]
    same = sum(first[key].call_text == second[key].call_text for key in common)
    found: dict[str, Any] = {"n": len(common), "agreement": percent(same, len(common))}
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


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion, in percent (Wilson 1927); (0, 100) without observations."""
    if n == 0:
        return 0.0, 100.0
    share = successes / n
    centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2)) / (1 + _Z**2 / n)
    return round(100 * max(0.0, centre - half), 4), round(100 * min(1.0, centre + half), 4)


def mcnemar(first_only: int, second_only: int) -> float:
    """Two-sided p of the exact McNemar test: is a coin fair that fell this way in the discordant pairs? (McNemar 1947).

    Twice the smaller binomial tail, at most 1; 1 without discordant pairs.
    """
    n, smaller = first_only + second_only, min(first_only, second_only)
    term = tail = 1  # C(n, 0), in whole numbers: exact for any n
    for index in range(smaller):
        term = term * (n - index) // (index + 1)
        tail += term
    return min(1.0, float(Fraction(2 * tail, 2**n)))


def paired_interval(first_only: int, second_only: int, n: int) -> tuple[float, float]:
    """95 % interval of second minus first, paired proportions, in points; from Agresti & Min 2005.

    Each of the four cells is raised by 1/2, which keeps the interval honest for few discordant pairs.
    """
    if n == 0:
        return -100.0, 100.0
    size = n + 2
    centre = (second_only - first_only) / size
    spread = sqrt(max(0.0, (first_only + second_only + 1) - size * centre**2)) / size
    return round(100 * max(-1.0, centre - _Z * spread), 4), round(100 * min(1.0, centre + _Z * spread), 4)


def quantile(values: Sequence[float], share: float) -> float | None:
    """The value that at least `share` of `values` do not exceed (nearest rank); None without values."""
    ordered = sorted(values)
    return ordered[max(0, ceil(share * len(ordered)) - 1)] if ordered else None
