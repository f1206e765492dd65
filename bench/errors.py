"""Why a reply is wrong: one class a row, and for the right tool what is wrong with each parameter."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from petool_lite.bench.score import Mark, accuracies, canonical

# every scored row has exactly one; "right" are those that count as right in joint_acc
CLASSES = {
    "right": "tool and parameters right",
    "other_form": "right call in a form that the published scorer does not read",
    "preference_mismatch": "right job, wrong provider",
    "function_mismatch": "another job",
    "invented_tool": "a tool that was not offered",
    "missing_parameter": "right tool, a parameter is missing",
    "extra_parameter": "right tool, a parameter too many",
    "wrong_parameter": "right tool, a wrong value",
    "bad_format": "no call to be read",
    "cut_off": "reached the reply limit before a call was complete",
    "too_long": "the prompt exceeds the context",
    "engine_error": "the engine failed; not scored",
}
FAULTS = {
    "missing_default": "left out, the right value is the declared default",
    "missing_other": "left out",
    "undeclared": "not declared by the tool",
    "unasked": "declared, but not in the right call",
    "wrong_type": "right value, wrong type",
    "forgotten_default": "other than the declared default, which is right",
    "kept_default": "the declared default, another value is right",
    "copied_wrongly": "another value",
}


def parameter_faults(call: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, str]:
    """Each wrong parameter of a call of the right tool, and its kind (FAULTS), by JSON comparison."""
    gold, found = row["gold"]["parameters"], call["parameters"]
    defaults, declared = row["facts"]["defaults"], row["facts"]["declared"]
    faults = {}
    for name, value in gold.items():
        if name not in found:
            default = name in defaults and _same(defaults[name], value)
            faults[name] = "missing_default" if default else "missing_other"
        elif canonical(found[name]) != canonical(value):
            faults[name] = _value_fault(found[name], value, defaults.get(name, _NO_DEFAULT))
    faults |= {name: "unasked" if name in declared else "undeclared" for name in found if name not in gold}
    return faults


_NO_DEFAULT = object()


def _value_fault(found: Any, gold: Any, default: Any) -> str:
    if _text(found) == _text(gold):
        return "wrong_type"
    if default is not _NO_DEFAULT and default != "" and _same(default, gold):
        return "forgotten_default"
    if default is not _NO_DEFAULT and default != "" and _same(default, found):
        return "kept_default"
    return "copied_wrongly"


def _text(value: Any) -> str:
    """A value as its text, whatever its type: "2", 2 and 2.0 are one, and so are "true", "True" and true."""
    text = value if isinstance(value, str) else canonical(value)
    try:
        return canonical(json.loads(text.lower() if text in ("True", "False") else text))
    except (ValueError, RecursionError):
        return text


def _same(one: Any, other: Any) -> bool:
    """Equal as texts: defaults are declared as texts for any type."""
    return _text(one) == _text(other)


def error_class(row: Mapping[str, Any], mark: Mark) -> tuple[str, dict[str, str]]:
    """The class of a row (see CLASSES), and the faults of its parameters where the tool is right."""
    if row["status"] != "ok":
        return row["status"], {}
    if all(mark.published):
        return "right", {}
    if mark.call is None:
        return ("cut_off" if row["finish"] == "length" else "bad_format"), {}
    name, facts = mark.call["tool_name"], row["facts"]
    if name != row["gold"]["tool_name"]:
        if name not in facts["offered"]:
            return "invented_tool", {}
        return ("preference_mismatch" if name in facts["same_job"] else "function_mismatch"), {}
    faults = parameter_faults(mark.call, row)
    kinds = set(faults.values())
    if not kinds:
        return "other_form", {}
    if kinds & {"missing_default", "missing_other"}:
        return "missing_parameter", faults
    return ("extra_parameter" if kinds & {"undeclared", "unasked"} else "wrong_parameter"), faults


def history_bin(row: Mapping[str, Any]) -> str:
    """Length of the history in calls, in steps."""
    length = row["facts"]["history_length"]
    return next((name for top, name in _LENGTHS if length <= top), "more than 50")


_LENGTHS = ((0, "none"), (5, "1-5"), (10, "6-10"), (15, "11-15"), (20, "16-20"), (50, "21-50"))


def equals_bin(row: Mapping[str, Any]) -> str:
    """How many offered tools do the right tool's job, itself included."""
    count = len(row["facts"]["same_job"])
    return str(max(1, count)) if count < 7 else "7 or more"


def liked_bin(row: Mapping[str, Any]) -> str:
    """Share of likes among the ratings of the right provider in this history."""
    share = row["facts"].get("liked_share")
    if share is None:
        return "never rated"
    return "0 %" if share <= 0 else "100 %" if share >= 1 else "1-50 %" if share <= 0.5 else "51-99 %"


_ORDERS = {
    "history_length": [*(name for _, name in _LENGTHS), "more than 50"],
    "equal_tools": [*map(str, range(1, 7)), "7 or more"],
    "liked_share": ["never rated", "0 %", "1-50 %", "51-99 %", "100 %"],
}
BREAKDOWNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "history_length": history_bin,
    "equal_tools": equals_bin,
    "liked_share": liked_bin,
}


def breakdown(rows: Sequence[Mapping[str, Any]], marks: Sequence[Mark], classes: Sequence[str], name: str) -> list[Any]:
    """Accuracies and error classes of the parts that BREAKDOWNS[name] makes of scored rows, in order, none empty."""
    parts: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        parts.setdefault(BREAKDOWNS[name](row), []).append(index)
    return [
        {
            "part": part,
            "n": len(parts[part]),
            **accuracies([marks[index] for index in parts[part]]),
            "classes": count_classes(classes[index] for index in parts[part]),
        }
        for part in _ORDERS[name]
        if part in parts
    ]


def count_classes(found: Iterable[str], names: Iterable[str] = CLASSES) -> dict[str, int]:
    """How often each name occurs, in the order of `names`, zeros included."""
    counts = Counter(found)
    return {name: counts[name] for name in names}
