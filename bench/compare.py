"""Two folders of results, variant by variant, on the entries that both scored."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from petool_lite.bench.report import Scored, Table, accuracy, p_text, score_results, show
from petool_lite.bench.results import Results, check_same_data, load_folder
from petool_lite.bench.score import METRICS, Score, accuracies, paired

from petool_lite.errors import USAGE, PetoolError

SCHEMA = 3
_WORDS = {
    **dict(zip(METRICS, ("tool", "parameters", "both"), strict=True)),
    **{"param_as_asked": "parameters as asked", "joint_as_asked": "both as asked"},
}
_FLIPS = 12  # entries shown in a terminal; all are in the --json document


def compare_folders(
    first: Path, second: Path, variant: str | None = None, against: str | None = None
) -> dict[str, Any]:
    """What changed from `first` to `second`: scores on the common entries, paired tests, entries that flipped.

    Variants of equal names are compared, or `variant` of the first with `against` of the second; a folder's only
    variant needs no name. Raises PetoolError where setting, data or right answers differ or no entry is common.
    """
    one, two = ({item.name: item for item in load_folder(folder)} for folder in (first, second))
    if against is not None and variant is None:
        raise PetoolError("--against needs --variant", "name the variant of the first folder too", USAGE)
    if variant is not None:
        pairs = [(_named(one, variant, first), _named(two, against or variant, second))]
    else:
        pairs = [(one[name], two[name]) for name in one if name in two]
        if not pairs and len(one) == len(two) == 1:
            pairs = [(next(iter(one.values())), next(iter(two.values())))]
    if not pairs:
        raise PetoolError(
            f"no variant is in both: {', '.join(one)} in {first}, {', '.join(two)} in {second}",
            "name two: --variant NAME --against NAME",
        )
    found = [_compared(old, new) for old, new in pairs]
    return {"schema": SCHEMA, "first": str(first), "second": str(second), "variants": found}


def _named(results: Mapping[str, Results], name: str, folder: Path) -> Results:
    if name not in results:
        raise PetoolError(f"{folder} has no variant {name}", f"it has {', '.join(results)}")
    return results[name]


def _compared(old: Results, new: Results) -> dict[str, Any]:
    if old.meta["setting"] != new.meta["setting"]:
        raise PetoolError(
            f"{old.path} is of the {old.meta['setting']} setting, {new.path} of the {new.meta['setting']} setting",
            "only results of one setting compare",
        )
    check_same_data([old, new])
    one, two = score_results(old), score_results(new)
    before, after = one.by_entry, two.by_entry
    common = [key for key in before if key in after]
    if not common:
        raise PetoolError(f"{old.path} and {new.path} have no scored entry in common", "score the same entries")
    hashes = {row["entry_id"]: row.get("prompt_sha256") for row in old.rows}
    other = [
        row for row in new.rows if row.get("prompt_sha256") != hashes.get(row["entry_id"], row.get("prompt_sha256"))
    ]
    return {
        "first": old.name,
        "second": new.name,
        "setting": old.meta["setting"],
        "entries": [len(before), len(after)],
        "other_prompts": len(other),
        "scores": [_accuracies([scores[key] for key in common]) for scores in (before, after)],
        **paired(before, after),
        "flipped": _flipped(one, two, common),
    }


def _accuracies(scores: Sequence[Score]) -> dict[str, Any]:
    """The figures that count and, where they are scored, those of parameters and both as asked."""
    if not all("as_asked" in score.pairs for score in scores):
        return accuracies(scores)
    asked = accuracies(scores, "as_asked")
    more = {f"{metric}_as_asked_{what}": asked[f"{metric}_{what}"] for metric in METRICS[1:] for what in ("acc", "ci")}
    return accuracies(scores) | more


def _flipped(one: Scored, two: Scored, common: Sequence[str]) -> list[dict[str, Any]]:
    """Entries whose verdict on the tool or on the parameters changed, in the order of the data."""
    before, after = ({triple[0]["entry_id"]: triple for triple in item.triples()} for item in (one, two))
    found = []
    for key in common:
        (row, old, name), (other, new, now) = before[key], after[key]
        gained = sum(new.pairs[new.scorer]) - sum(old.pairs[old.scorer])
        if old.pairs[old.scorer] != new.pairs[new.scorer]:
            found.append(
                {
                    "entry_id": key,
                    "change": "better" if gained > 0 else "worse" if gained else "other",
                    "classes": [name, now],
                    "gold": row["gold"],
                    "replies": [row.get("reply", ""), other.get("reply", "")],
                }
            )
    return found


def print_comparison(found: Mapping[str, Any]) -> None:
    """What `bench compare` found, on stdout."""
    for item in found["variants"]:
        show(_comparison(item))
        if item["flipped"]:
            show(_flips(item))


def _comparison(item: Mapping[str, Any]) -> Table:
    rows = []
    for metric, words in _WORDS.items():
        if metric not in item or (metric.endswith("as_asked") and not _asked(item)):
            continue
        test, (before, after) = item[metric], item["scores"]
        change = f"{test['difference']:+.1f} ({test['ci'][0]:+.1f} to {test['ci'][1]:+.1f})"
        flips = f"+{test['second_only']} -{test['first_only']}"
        rows.append((words, accuracy(before, metric), accuracy(after, metric), change, flips, p_text(test["p"])))
    notes = [f"n {item['n']:,}, the same call in {item['agreement']:.1f} %"]
    if item["entries"] != [item["n"], item["n"]]:
        notes[0] += f"; the first scored {item['entries'][0]:,} entries, the second {item['entries'][1]:,}"
    if item["other_prompts"]:
        notes.append(f"{item['other_prompts']:,} entries have another prompt (style, template or trimming)")
    notes.append("difference in points with its 95 % interval by function, entries won and lost, exact McNemar test")
    name = item["first"] if item["first"] == item["second"] else f"{item['first']} → {item['second']}"
    columns = ("right, %", "first", "second", "difference", "entries", "p")
    return Table("comparison", f"{name}, on the same entries", columns, rows, notes)


def _asked(item: Mapping[str, Any]) -> bool:
    """Whether any number was given as the request says it, where the data cut it."""
    return any(scores["param_as_asked_acc"] != scores["param_acc"] for scores in item["scores"])


def _flips(item: Mapping[str, Any]) -> Table:
    rows = [
        (
            flip["entry_id"],
            flip["change"],
            " → ".join(name.replace("_", " ") for name in dict.fromkeys(flip["classes"])),
        )
        for flip in item["flipped"][:_FLIPS]
    ]
    left = len(item["flipped"]) - len(rows)
    notes = [f"{left:,} more, and every reply: --json" if left else "the replies: --json"]
    return Table("flipped", f"{len(item['flipped']):,} entries flipped", ("entry", "now", "class"), rows, notes)
