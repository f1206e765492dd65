"""Scoring: pure functions over results rows; imports no model library. One reply is scored by petool_lite.scorer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from petool_lite.bench.stats import wilson

from petool_lite.scorer import published_call, score_reply


@dataclass(frozen=True)
class Score:
    """Accuracies in percent over `n` rows, each with its 95 % Wilson interval; engine errors are left out of n."""

    n: int
    tool_acc: float
    param_acc: float
    joint_acc: float
    tool_ci: tuple[float, float]
    param_ci: tuple[float, float]
    joint_ci: tuple[float, float]
    no_call: int
    cut_off: int
    too_long: int
    engine_errors: int


def score_rows(rows: Sequence[Mapping[str, Any]]) -> Score:
    """Score results rows (see bench.run); rows whose engine failed are counted apart."""
    good = [row for row in rows if row["status"] != "engine_error"]
    marks = [score_reply(row.get("reply", ""), row["gold"]) for row in good]
    tool, param = sum(pair[0] for pair in marks), sum(pair[1] for pair in marks)
    joint, n = sum(all(pair) for pair in marks), len(good)

    def percent(count: int) -> float:
        return round(100 * count / n, 2) if n else 0.0

    return Score(
        n=n,
        tool_acc=percent(tool),
        param_acc=percent(param),
        joint_acc=percent(joint),
        tool_ci=wilson(tool, n),
        param_ci=wilson(param, n),
        joint_ci=wilson(joint, n),
        no_call=sum(published_call(row.get("reply", "")) is None for row in good),
        cut_off=sum(row.get("finish") == "length" for row in good),
        too_long=sum(row["status"] == "too_long" for row in good),
        engine_errors=len(rows) - n,
    )
