"""Scores: pure functions over results rows; imports no model library. `published` is the paper's scorer, `spanning` has
its match span lines (as for the published 3B result), `strict` wants one JSON call alone, `as_asked` takes a number
that the data cut to a whole one as the request says it, `ast` is BFCL's; where no tool fits, a text is right by all."""

import json
from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, comb, log, sqrt
from typing import Any

from petool_lite.bench.bfcl import arguments_accepted
from petool_lite.data.answers import function_words
from petool_lite.data.entries import Call
from petool_lite.inference.constrain import heated
from petool_lite.inference.parse import CallFailure, read_answer
from petool_lite.prompt.render import CALL_START
from petool_lite.scorer import Pair, published_form, read_published, score_reply

SCORERS = ("published", "spanning", "strict", "as_asked", "ast")
METRICS, METRIC_WORDS = ("tool", "param", "joint"), ("tool", "parameters", "both")
_FIGURES = {metric: (metric, "") for metric in METRICS}  # name: the metric, and its scorer if not the one that counts
_FIGURES |= {f"{metric}_as_asked": (metric, "as_asked") for metric in METRICS[1:]}
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
_TEMPERATURES = [10 ** (step / 40) for step in range(-40, 41)]
_Z = 1.959964  # 97.5 % point of the normal distribution


@dataclass(frozen=True)
class Score:
    """One reply, scored."""

    pairs: Mapping[str, Pair]  # by each scorer that can say something
    scorer: str  # the one that counts
    call: Mapping[str, Any] | None  # that was read
    call_text: str  # canonical, or the text without a call
    function: str  # what groups entries
    confidence: float | None = None  # the probability of what was chosen

    def right(self, metric: str, scorer: str = "") -> bool:
        """Whether `metric` (tool, param, joint) is right, by the scorer that counts unless another is named."""
        pair = self.pairs[scorer or self.scorer]
        return all(pair) if metric == "joint" else pair[METRICS.index(metric)]


def canonical(value: Any) -> str:
    """JSON text that is equal for equal JSON values: keys in order, 1.0 and 1 the same number, true no number."""
    plain = json.loads(json.dumps(value), parse_float=lambda text: int(n) if (n := float(text)).is_integer() else n)
    return json.dumps(plain, sort_keys=True)


def score_row(row: Mapping[str, Any]) -> Score:
    """Score one row; one without a reply (too long, engine error) is wrong by every scorer."""
    reply, gold = row.get("reply", "") if row["status"] == "ok" else "", row["gold"]
    call, strict = None, (False, False)
    with suppress(CallFailure, RecursionError):
        answer = read_answer(reply, row.get("finish", "stop"))
        if isinstance(answer, Call):
            call = {"tool_name": answer.name, "parameters": dict(answer.arguments)}
            same = canonical(call["parameters"]) == canonical(gold.get("parameters"))
            strict = (answer.name == gold.get("tool_name"), same)
    text = reply if row["style"] == "published" else published_form(reply)
    found = read_published(text, spanning=True) if call is None else None
    if found and isinstance(found["tool_name"], str) and isinstance(found["parameters"], dict):
        call = {key: found[key] for key in ("tool_name", "parameters")}
    told = canonical(call) if call is not None else f"no call: {reply}"
    published = score_reply(text, gold)
    function = row["facts"].get("function") or function_words(gold.get("tool_name", "")) or row.get("entry_id", "")
    more = (call, told, function, row.get("confidence"))
    if "no_call" in gold:
        return Score(dict.fromkeys((*SCORERS, "no_call"), published), "no_call", *more)
    spanning = score_reply(text, gold, spanning=True) if "\n" in text else published
    pairs = {"published": published, "spanning": spanning, "strict": strict}
    if "accept" in row:
        pairs["ast"], accept = (False, False), row["accept"]
        if call is not None and reply.count(CALL_START.strip()) < 2:  # BFCL counts the calls first
            arguments = json.loads(json.dumps(call["parameters"]))  # BFCL asks for the very types dict and list
            right = arguments_accepted(arguments, accept["values"], accept["schema"])
            pairs["ast"] = (call["tool_name"] == accept["name"], right)
        return Score(pairs, "ast", *more)
    pairs["as_asked"] = published if published[1] else score_reply(text, gold, request=row.get("query", ""))
    return Score(pairs, "published", *more)


def error_class(row: Mapping[str, Any], score: Score) -> str:
    """The class of a row, a key of CLASSES, by the scorer that counts."""
    if row["status"] != "ok":
        return str(row["status"])
    if score.right("joint"):
        return "right"
    if score.call is None:
        return "cut_off" if row["finish"] == "length" else "no_call"
    name, facts, gold = score.call["tool_name"], row["facts"], row["gold"]
    if score.scorer == "no_call":
        return "needless_call"
    if name != gold["tool_name"]:
        if name not in facts["offered"]:
            return "invented_tool"
        same = facts["same_job"]
        return "wrong_tool" if not same else "wrong_provider" if name in same else "wrong_function"
    found, wanted = score.call["parameters"], gold["parameters"]
    accepted = row["accept"]["values"] if "accept" in row else {key: [value] for key, value in wanted.items()}
    if any(key not in found and ("accept" not in row or "" not in values) for key, values in accepted.items()):
        return "missing_parameter"
    if found.keys() - accepted.keys():
        return "extra_parameter"
    other = score.scorer == "published" and canonical(found) == canonical(wanted)
    return "other_form" if other else "wrong_parameter"


def accuracies(scores: Sequence[Score], scorer: str = "") -> dict[str, Any]:
    """tool_acc, param_acc, joint_acc in percent, where scored also as asked, and 95 % intervals by function."""
    found: dict[str, Any] = {}
    for name, (metric, own) in _FIGURES.items():
        if not own or (not scorer and all(own in score.pairs for score in scores)):
            found |= _share(name, [score.right(metric, own or scorer) for score in scores], scores)
    return found


def _share(name: str, flags: Sequence[bool], scores: Sequence[Score]) -> dict[str, Any]:
    """NAME_acc and NAME_ci: the share of true flags in percent, and its interval by function."""
    effect = design_effect(flags, [score.function for score in scores])
    interval = list(wilson(sum(flags) / effect, len(flags) / effect))
    return {f"{name}_acc": _percent(sum(flags), len(flags)), f"{name}_ci": interval}


def _percent(count: int, n: int) -> float:
    return round(100 * count / n, 4) if n else 0.0


def summary(rows: Sequence[Mapping[str, Any]], scores: Sequence[Score]) -> dict[str, Any]:
    """What is to be said of one variant: n, the figures that count, those of the other scorers, and counts; failures of
    the engine are left out of n. `cases`: where a tool fits, where none does, and each kind that the data knows."""
    good = [pair for pair in zip(rows, scores, strict=True) if pair[0]["status"] != "engine_error"]
    scored = [score for _, score in good]
    counts = {score.scorer for score in scored}
    scorer = next((name for name in ("ast", "published", "no_call") if name in counts), "published")
    others = [name for name in SCORERS if name != scorer and all(name in score.pairs for score in scored)]
    cases: dict[str, list[Score]] = {}
    for row, score in good:
        fits = "none fits" if score.scorer == "no_call" else "a tool fits"
        for case in (fits, row["kind"]) if "kind" in row else (fits,):
            cases.setdefault(case, []).append(score)

    def counted(found: Sequence[Score]) -> dict[str, Any]:
        called = _share("called", [score.call is not None for score in found], found)
        return {"n": len(found), **accuracies(found), **called}

    return {
        **{"n": len(good), "functions": len({score.function for score in scored}), "scorer": scorer},
        **accuracies(scored),
        **{name: accuracies(scored, name) for name in others},
        "cases": {name: counted(found) for name, found in cases.items()},
        "calibration": calibration(scored),
        "no_call": sum(score.call is None for score in scored),
        "cut_off": sum(row["status"] == "ok" and row["finish"] == "length" for row in rows),
        "too_long": sum(row["status"] == "too_long" for row in rows),
        "engine_errors": len(rows) - len(good),
        "history_trimmed": sum(row.get("history_dropped", 0) > 0 for row in rows),
    }


def calibration(scores: Sequence[Score]) -> dict[str, Any] | None:
    """How well the chosen tools' probabilities say how often they are right; None where a score has none. `ece_fitted`
    is the error on half of the functions with the `temperature` that is likeliest on the other half."""
    known = [(score.confidence, score) for score in scores if score.confidence is not None]
    if not known or len(known) < len(scores):
        return None
    second = {*sorted({score.function for score in scores})[1::2]}
    pairs = [(share, score.right("tool"), score.function in second) for share, score in known]
    fit, held = ([(share, right) for share, right, half in pairs if half == other] for other in (False, True))

    def loss(temperature: float) -> float:
        found = ((heated(share, temperature), right) for share, right in fit)
        return -sum(log(share if right else 1 - share) for share, right in found)

    best = min(_TEMPERATURES, key=loss)
    fitted = calibration_error([(heated(share, best), right) for share, right in held])
    errors = {"ece": calibration_error([*fit, *held]), "ece_fitted": fitted}
    return {"n": len(known), "temperature": round(best, 4), **errors}


def calibration_error(pairs: Sequence[tuple[float, bool]]) -> float:
    """The expected calibration error of pairs of a probability and whether it came true (Naeini et al. 2015). The gap
    between mean probability and share of true ones in each of ten bins of equal width, weighted by their sizes."""
    gaps = dict.fromkeys(range(10), 0.0)
    for share, right in pairs:
        gaps[min(9, int(share * 10))] += share - right
    return round(sum(map(abs, gaps.values())) / len(pairs), 4) if pairs else 0.0


def paired(first: Mapping[Any, Score], second: Mapping[Any, Score]) -> dict[str, Any]:
    """Paired tests on the entries that both scored: for each figure how many only one has right, second minus first in
    points, its 95 % interval by function, and p of McNemar's test. `agreement`: share of the same calls."""
    common = [key for key in first if key in second]
    same = sum(first[key].call_text == second[key].call_text for key in common)
    found: dict[str, Any] = {"n": len(common), "agreement": _percent(same, len(common))}
    asked = all("as_asked" in scores[key].pairs for key in common for scores in (first, second))
    functions = [first[key].function for key in common]
    for name, (metric, scorer) in _FIGURES.items():
        if scorer and not asked:
            continue
        gains = [second[key].right(metric, scorer) - first[key].right(metric, scorer) for key in common]
        lost, won, effect = gains.count(-1), gains.count(1), design_effect(gains, functions)
        interval = list(paired_interval(lost / effect, won / effect, len(common) / effect))
        counts = {"first_only": lost, "second_only": won, "difference": _percent(won - lost, len(common))}
        found[name] = counts | {"ci": interval, "p": mcnemar(lost, won)}
    return found


def design_effect(values: Sequence[float], groups: Sequence[Hashable]) -> float:
    """How many times fewer independent observations `values` are worth, as those of a group stand or fall together: the
    variance of their mean with whole groups drawn, over that with single values drawn (Kish 1965), at least 1. An
    interval of n observations is then that of n / effect (Korn & Graubard 1998)."""
    n, sums = len(values), dict.fromkeys(groups, 0.0)
    mean = sum(values) / n if n else 0.0
    for value, group in zip(values, groups, strict=True):
        sums[group] += value - mean
    apart, count = sum((value - mean) ** 2 for value in values), len(sums)
    if apart == 0 or count < 2:
        return 1.0
    together = sum(value**2 for value in sums.values()) * count / (count - 1)
    return max(1.0, together / (apart * n / (n - 1)))


def wilson(successes: float, n: float) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion, in percent (Wilson 1927); (0, 100) without observations."""
    if n == 0:
        return 0.0, 100.0
    share = successes / n
    centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2)) / (1 + _Z**2 / n)
    return round(100 * max(0.0, centre - half), 4), round(100 * min(1.0, centre + half), 4)


def mcnemar(first_only: int, second_only: int) -> float:
    """Two-sided p of the exact McNemar test (1947): twice the smaller binomial tail of discordant pairs, at most 1."""
    n = first_only + second_only
    tail = sum(comb(n, index) for index in range(min(first_only, second_only) + 1))
    return min(1.0, float(Fraction(2 * tail, 2**n)))


def paired_interval(first_only: float, second_only: float, n: float) -> tuple[float, float]:
    """95 % interval of second minus first, paired proportions, in points; from Agresti & Min 2005. Each of the four
    cells is raised by 1/2, which keeps the interval honest for few discordant pairs."""
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
