"""Folds never share a function, and what two sets share is found and named."""

from dataclasses import replace

from support_published import published_rows

from petool_lite.data.answers import function_words
from petool_lite.data.entries import Call, Entry
from petool_lite.data.files import load_dataset
from petool_lite.data.petoolbench import parse
from petool_lite.data.splits import folds, function_groups, leaks


def demo(split: str = "train", count: int = 120) -> list[Entry]:
    return [parse(row, "rating", str(index)) for index, row in enumerate(published_rows(split, count))]


def check_folds(entries, count: int) -> None:
    dealt = folds(entries, count, seed=3)
    assert sorted(index for fold in dealt for index in fold) == list(range(len(entries)))
    assert dealt == folds(entries, count, seed=3) != folds(entries, count, seed=4)
    groups = function_groups(entries)
    largest = max(groups.count(group) for group in set(groups))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= largest
    for fold in dealt:
        test = [entries[index] for index in fold]
        train = [entries[index] for other in dealt if other is not fold for index in other]
        assert {entry.function for entry in test}.isdisjoint(entry.function for entry in train)
        assert not leaks(train, test)


def test_folds_share_nothing_also_where_functions_have_no_number() -> None:
    check_folds(demo(), 3)
    entries = [replace(entry, function=None) for entry in demo()]
    parts = [[entries[index] for index in fold] for fold in folds(entries, 3, seed=0)]
    words = [{function_words(entry.answer.name) for entry in part} for part in parts]
    assert sum(map(len, words)) == len(set.union(*words))
    assert not leaks(parts[0], [*parts[1], *parts[2]])


def test_published_folds_share_nothing(open_entries) -> None:
    check_folds(load_dataset(str(open_entries), "rating").entries, 5)


def test_a_chain_of_ties_is_one_group() -> None:
    base = demo(count=1)[0]

    def entry(function: str | None, tool: str, query: str) -> Entry:
        return replace(base, function=function, answer=Call(tool, {}), query=query)

    entries = [
        entry("1", "<A>.<P>.<one>", "a"), entry("2", "<A>.<Q>.<two>", "b"), entry("1", "<A>.<Q>.<two>", "c"),
        entry("3", "<A>.<R>.<other>", "d"), entry("4", "<A>.<R>.<more>", " D "), entry(None, "<A>.<S>.<getTwo>", "e"),
        entry(None, "<A>.<T>.<get_two>", "f"), entry(None, "<B>.<T>.<get_two>", "g"),
    ]  # fmt: skip
    assert function_groups(entries) == [0, 0, 0, 1, 1, 2, 2, 3]
    assert function_groups([entries[1], entry(None, "<A>.<S>.<Two>", "e")]) == [0, 0]


def test_planted_leaks_are_found() -> None:
    train, test = demo("train"), demo("test")
    assert not leaks(train, test)
    spy, unnumbered = test[0], Call(test[0].answer.name.replace("_", "-"), {})
    for kind, planted, found in (
        ("functions", {"function": spy.function}, [f"function {spy.function}"]),
        ("right_tools", {"answer": spy.answer}, [spy.answer.name]),
        ("queries", {"query": f"  {spy.query.upper()}"}, [spy.query]),
        ("functions", {"function": None, "answer": unnumbered}, [function_words(unnumbered.name)]),
    ):
        assert leaks([*train, replace(train[0], **planted)], test)[kind] == found
