"""Two folders of results, variant by variant, on the entries that both scored."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from petool_lite.bench.report import WORDS, Table, accuracies_cells, p_text
from petool_lite.bench.results import Results, check_same_data, load_folder
from petool_lite.bench.score import METRICS, accuracies, paired
from petool_lite.console import print_table
from petool_lite.errors import USAGE, PetoolError


def compare_folders(old: Path, new: Path, variant: str | None = None, against: str | None = None) -> dict[str, Any]:
    """Scores of two folders on the entries that both scored, paired tests, and ids of entries that flipped: of variants
    of equal names, or of `variant` and `against`. Raises PetoolError where nothing compares."""
    one, two = ({item.name: item for item in load_folder(folder)} for folder in (old, new))
    if against is not None and variant is None:
        raise PetoolError("--against needs --variant", "name the variant of the first folder too", USAGE)
    pairs = [(name, name) for name in one if name in two] if variant is None else [(variant, against or variant)]
    if not pairs and len(one) == len(two) == 1:
        pairs = list(zip(one, two, strict=True))
    if not pairs or not all(name in one and other in two for name, other in pairs):
        what = f"no variant to compare: {old} has {', '.join(one)}, {new} has {', '.join(two)}"
        raise PetoolError(what, "name two: --variant NAME --against NAME")
    found = [_compared(one[name], two[other]) for name, other in pairs]
    return {"schema": 3, "first": str(old), "second": str(new), "variants": found}


def _compared(old: Results, new: Results) -> dict[str, Any]:
    setting, other = old.meta["setting"], new.meta["setting"]
    if setting != other:
        what = f"{old.path} is of the {setting} setting, {new.path} of the {other} setting"
        raise PetoolError(what, "only results of one setting compare")
    check_same_data({item.path: item.meta for item in (old, new)})
    before, after = old.by_entry, new.by_entry
    common = [key for key in before if key in after]
    if not common:
        raise PetoolError(f"{old.path} and {new.path} have no scored entry in common", "score the same entries")
    prompts = [[item.triples[key][0].get("prompt_sha256") for key in common] for item in (old, new)]
    return {
        **{"first": old.name, "second": new.name, "setting": setting},
        "entries": [len(before), len(after)],
        "other_prompts": sum(was != now for was, now in zip(*prompts, strict=True)),
        "scores": [accuracies([scores[key] for key in common]) for scores in (before, after)],
        **paired(before, after),
        "flipped": [key for key in common if any(before[key].right(one) != after[key].right(one) for one in METRICS)],
    }


def print_comparison(found: Mapping[str, Any]) -> None:
    """What `bench compare` found, on stdout."""
    for table in map(_comparison, found["variants"]):
        print_table(table.title, table.columns, table.rows, "\n".join(table.notes))


def _comparison(item: Mapping[str, Any]) -> Table:
    before, after = item["scores"]
    asked = "param_as_asked" in item and any(one["param_as_asked_acc"] != one["param_acc"] for one in (before, after))
    rows = []
    for metric in WORDS if asked else METRICS:
        test, figures = item[metric], (accuracies_cells(scores, metric)[0] for scores in (before, after))
        change = f"{test['difference']:+.1f} ({test['ci'][0]:+.1f} to {test['ci'][1]:+.1f})"
        entries = f"+{test['second_only']} -{test['first_only']}"
        rows.append((WORDS[metric], *figures, change, entries, p_text(test["p"])))
    notes = [
        f"n {item['n']:,} of {item['entries'][0]:,} and {item['entries'][1]:,}, "
        f"the same call in {item['agreement']:.1f} %, another prompt in {item['other_prompts']:,}",
        f"{len(item['flipped']):,} entries flipped: their ids are in --json, their replies in each report.html",
        "difference in points with its 95 % interval by function, entries won and lost, exact McNemar test",
    ]
    name = " → ".join(dict.fromkeys((item["first"], item["second"])))
    columns = ("right, %", "first", "second", "difference", "entries", "p")
    return Table("comparison", f"{name}, on the same entries", columns, rows, notes)
