"""Two folders of results, variant by variant, on the entries that both scored."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from petool_lite.bench.report import Scored, score_results
from petool_lite.bench.results import Results, check_same_data, load_folder
from petool_lite.bench.score import accuracies, compare_marks

from petool_lite.errors import USAGE, PetoolError

SCHEMA = 1


def compare_folders(
    first: Path, second: Path, variant: str | None = None, against: str | None = None
) -> dict[str, Any]:
    """What changed from `first` to `second`: scores on the common entries, paired tests, entries that flipped.

    Variants of equal names are compared, or `variant` of the first with `against` of the second; a folder's only
    variant needs no name. Raises PetoolError where setting, data or right answers differ or no entry is common.
    """
    one, two = load_folder(first), load_folder(second)
    pairs = _pairs(one, two, first, second, variant, against)
    return {
        "schema": SCHEMA,
        "first": str(first),
        "second": str(second),
        "variants": [_compared(old, new) for old, new in pairs],
    }


def _pairs(
    one: Sequence[Results], two: Sequence[Results], first: Path, second: Path, variant: str | None, against: str | None
) -> list[tuple[Results, Results]]:
    if variant is not None:
        return [(_named(one, variant, first), _named(two, against or variant, second))]
    if against is not None:
        raise PetoolError("--against needs --variant", "name the variant of the first folder too", USAGE)
    common = [(old, new) for old in one for new in two if old.name == new.name]
    if not common and len(one) == len(two) == 1:
        common = [(one[0], two[0])]
    if not common:
        raise PetoolError(
            f"no variant is in both: {_names(one)} in {first}, {_names(two)} in {second}",
            "name two: --variant NAME --against NAME",
        )
    return common


def _named(results: Sequence[Results], name: str, folder: Path) -> Results:
    found = next((item for item in results if item.name == name), None)
    if found is None:
        raise PetoolError(f"{folder} has no variant {name}", f"it has {_names(results)}")
    return found


def _names(results: Sequence[Results]) -> str:
    return ", ".join(item.name for item in results)


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
    return {
        "first": old.name,
        "second": new.name,
        "setting": old.meta["setting"],
        "entries": [len(before), len(after)],
        "other_prompts": _other_prompts(old, new),
        "scores": [accuracies([marks[key] for key in common]) for marks in (before, after)],
        **compare_marks(before, after),
        "flipped": _flipped(one, two, common),
    }


def _other_prompts(old: Results, new: Results) -> int:
    """Common entries whose prompt is not the same, token for token."""
    hashes = {row["entry_id"]: row.get("prompt_sha256") for row in old.rows}
    return sum(row["entry_id"] in hashes and row.get("prompt_sha256") != hashes[row["entry_id"]] for row in new.rows)


def _flipped(one: Scored, two: Scored, common: Sequence[str]) -> list[dict[str, Any]]:
    """Entries whose verdict on the tool or on the parameters changed, in the order of the data."""
    before, after = _by_entry(one), _by_entry(two)
    found = []
    for key in common:
        (row, mark, name), (other, now, now_name) = before[key], after[key]
        if mark.published != now.published:
            change = "better" if sum(now.published) > sum(mark.published) else "worse"
            if sum(now.published) == sum(mark.published):
                change = "other"
            found.append(
                {
                    "entry_id": key,
                    "change": change,
                    "classes": [name, now_name],
                    "gold": row["gold"],
                    "replies": [row.get("reply", ""), other.get("reply", "")],
                }
            )
    return found


def _by_entry(item: Scored) -> dict[str, Any]:
    found = zip(item.results.rows, item.marks, item.classes, strict=True)
    return {row["entry_id"]: (row, mark, name) for row, mark, name in found}
