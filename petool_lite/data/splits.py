"""Splits by function: a test of preference is only fair on functions that training never asked for. Users differ in the
published entries, requests do not: so whole groups of related entries are dealt out."""

import random
from collections.abc import Sequence

from petool_lite.data.answers import function_words
from petool_lite.data.entries import Call, Entry
from petool_lite.errors import USAGE, PetoolError


def function_groups(entries: Sequence[Entry]) -> list[int]:
    """A group number for each entry, counted from 0: the same for entries tied by any chain of the same function, right
    tool or query (apart from space and case). One without a function is tied by its right tool's function words."""
    keys = function_keys(entries, entries)
    parent = list(range(len(entries)))
    first: dict[str, int] = {}

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = index = parent[parent[index]]
        return index

    for index, entry in enumerate(entries):
        for key in (*keys[index], *(f"tool {name}" for name in _called(entry)), f"query {_plain(entry.query)}"):
            parent[root(index)] = root(first.setdefault(key, index))
    numbers: dict[int, int] = {}
    return [numbers.setdefault(root(index), len(numbers)) for index in range(len(entries))]


def folds(entries: Sequence[Entry], count: int, seed: int) -> list[list[int]]:
    """Deal the groups of `function_groups` to `count` folds: ascending indices into `entries`. The largest group goes
    first, each to the smallest fold; `seed` breaks ties. Raises PetoolError where there are fewer groups than folds."""
    numbers = function_groups(entries)
    dealt: list[list[int]] = [[] for _ in {*numbers}]
    for index, number in enumerate(numbers):
        dealt[number].append(index)
    if not 1 <= count <= len(dealt):
        raise PetoolError(f"cannot make {count} folds of {len(dealt)} functions", "make fewer: --folds N", USAGE)
    rng = random.Random(f"folds-{seed}")
    rng.shuffle(dealt)
    dealt.sort(key=len, reverse=True)
    result: list[list[int]] = [[] for _ in range(count)]
    for members in dealt:
        smallest = min(len(fold) for fold in result)
        rng.choice([fold for fold in result if len(fold) == smallest]).extend(members)
    return [sorted(fold) for fold in result]


def leaks(train: Sequence[Entry], test: Sequence[Entry]) -> dict[str, list[str]]:
    """What `test` shares with `train`: functions (by their words where they have no number), tools that are a right
    answer in both, and queries apart from space and case. Kinds that are not shared are left out."""
    asked = [{key for keys in function_keys(side, [*train, *test]) for key in keys} for side in (train, test)]
    right = [{name for entry in side for name in _called(entry)} for side in (train, test)]
    queries = {_plain(entry.query) for entry in train}
    again = {entry.query for entry in test if _plain(entry.query) in queries}
    shared = {"functions": asked[0] & asked[1], "right_tools": right[0] & right[1], "queries": again}
    return {kind: sorted(values) for kind, values in shared.items() if values}


def function_keys(entries: Sequence[Entry], scope: Sequence[Entry]) -> list[list[str]]:
    """The functions of each entry; words count only where some entry of `scope` has nothing but words."""
    loose = {function_words(name) for entry in scope if entry.function is None for name in _called(entry)}
    return [
        ([] if entry.function is None else [f"function {entry.function}"])
        + [words for words in map(function_words, _called(entry)) if words in loose]
        for entry in entries
    ]


def _called(entry: Entry) -> list[str]:
    return [entry.answer.name] if isinstance(entry.answer, Call) else []


def _plain(query: str) -> str:
    return " ".join(query.lower().split())
