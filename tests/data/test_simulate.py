"""Simulated users: the answer always follows from what is written, and everything that users have occurs."""

import itertools
import json
from collections import Counter

import pytest

from petool_lite.data.answers import answer_faults
from petool_lite.data.entries import DISLIKED, LIKED, Call, Entry, Interaction, Tool, balance, name_words, providers
from petool_lite.data.files import load_dataset
from petool_lite.data.openai import entry_line, parse
from petool_lite.data.simulate import Example, examples_of, simulate
from petool_lite.errors import PetoolError


def tool(name: str, **parameters: str) -> Tool:
    properties = {key: {"type": kind} for key, kind in parameters.items()}
    return Tool(name, name.replace("_", " "), {"type": "object", "properties": properties, "required": [*properties]})


EXAMPLES = [
    Example("Rain in Bern?", tool("get_forecast", city="string"), {"city": "Bern"}, (tool("send_mail", to="string"),)),
    Example("Mail Ann.", tool("send_mail", to="string"), {"to": "Ann"}, ()),
    Example("Play So What.", tool("playSong", songTitle="string"), {"songTitle": "So What"}, ()),
    Example("Compute 3 + 4.", tool("calculator", a="integer", b="integer"), {"b": 4, "a": 3}, ()),
    Example("Book 4 at Luigi's.", tool("reserve_table", people="integer"), {"people": 4}, ()),
]


@pytest.fixture(scope="module")
def entries():
    return list(simulate(EXAMPLES, [], 1500, 7))


def test_the_answer_follows_from_what_is_written(entries) -> None:
    """Among tools that do the same: a strictly better balance, or the latest use where none is rated."""
    for entry in entries:
        if not isinstance(entry.answer, Call):
            continue
        right = next(item for item in entry.tools if item.name == entry.answer.name)
        rivals = [item for item in entry.tools if does(item) == does(right) and item is not right]
        known = providers(entry)
        able = {known[item.name] for item in (right, *rivals)}
        assert len(able) == 1 + len(rivals)
        calls = [(known[item.call.name], item.verdict) for item in entry.history if known[item.call.name] in able]
        if any(verdict for _, verdict in calls):
            assert all(balance_of(entry, right) > balance_of(entry, rival) for rival in rivals)
        elif rivals:
            assert calls[-1][0] == known[right.name]
        assert answer_faults(entry) == []
        assert [*entry.answer.arguments] == [*right.parameters["properties"]], "in the declaration's order"
    assert all(item.provider == "" for entry in entries for item in entry.tools)


@pytest.mark.parametrize("setting", ["preferred", "chronological"])
def test_users_who_do_not_rate(setting: str) -> None:
    """The latest use counts; chronological: what was used in the first half alone is worse than what is unknown."""
    entries, left = list(simulate(EXAMPLES, [], 600, 3, setting)), 0
    for entry in (entry for entry in entries if isinstance(entry.answer, Call)):
        known = providers(entry)
        owners = [known[item.call.name] for item in entry.history]
        assert {item.verdict for item in entry.history} <= {None}

        def worth(item: Tool, owners: list[str] = owners, known: dict[str, str] = known) -> int:
            last = max((at for at, owner in enumerate(owners, 1) if owner == known[item.name]), default=0)
            return -1 if setting == "chronological" and 0 < 2 * last <= len(owners) else last

        right = next(item for item in entry.tools if item.name == entry.answer.name)
        rivals = [item for item in entry.tools if does(item) == does(right) and item is not right]
        assert all(worth(right) > worth(rival) for rival in rivals)
        left += any(worth(rival) == -1 for rival in rivals)
    assert (left > 40) == (setting == "chronological")
    again = load_dataset(f"simulated:600/3@{setting}:demo:train:40").entries
    assert {item.verdict for entry in again for item in entry.history} == {None}


def does(item: Tool) -> str:
    """What a tool of EXAMPLES is about, which every provider's name tells."""
    return next(
        thing for thing in ("forecast", "mail", "song", "calculator", "table") if thing in name_words(item.name)
    )


def balance_of(entry, offered) -> int:
    known = providers(entry)
    verdicts = [item.verdict for item in entry.history if known[item.call.name] == known[offered.name]]
    assert balance(entry, offered.name) == len(verdicts) - 2 * verdicts.count(DISLIKED)
    return verdicts.count(LIKED) - verdicts.count(DISLIKED)


def test_nothing_that_is_offered_fits_where_the_answer_says_so(entries) -> None:
    without = [entry for entry in entries if not isinstance(entry.answer, Call)]
    assert 0.11 < len(without) / len(entries) < 0.17
    assert sum(len(entry.tools) == 1 for entry in without) > 10, "one tool, and not the right one"
    first = {example.query.split()[0]: does(example.tool) for example in EXAMPLES}
    asked = [entry for entry in without if entry.query.split()[0] in first]
    assert 0.5 < len(asked) / len(without) < 0.8
    assert len({entry.query for entry in without} - {entry.query for entry in asked}) > 20, "small talk of many kinds"
    for entry in asked:
        assert first[entry.query.split()[0]] not in map(does, entry.tools)


def test_providers_of_one_thing_describe_it_and_name_its_parameters_each_in_its_own_way(entries) -> None:
    """Else what is offered twice in the same words would tell what is asked for."""
    said: Counter[str] = Counter()
    for entry in entries:
        offered = [item for item in entry.tools if isinstance(entry.answer, Call) and does(item) == "song"]
        if len(offered) > 1:
            said["all"] += 1
            said["descriptions"] += len({item.description for item in offered}) > 1
            said["parameters"] += len({name for item in offered for name in item.parameters["properties"]}) > 1
        calls = [item for item in entry.history if item.call.name in [tool.name for tool in offered]]
        assert all(item.query.startswith("Play") for item in calls)
    assert said["all"] > 200
    assert min(said["descriptions"], said["parameters"]) > 0.4 * said["all"], said


def test_values_are_drawn_anew_in_the_request_and_in_the_call_alike(entries) -> None:
    booked = [entry for entry in entries if entry.query.startswith("Book") and isinstance(entry.answer, Call)]
    said = [(entry.query.split()[1], *map(str, entry.answer.arguments.values())) for entry in booked]
    assert all(asked == called for asked, called in said)
    assert len({asked for asked, _ in said}) == 9
    assert {1, 2, 3, 4} <= {len(entry.tools) for entry in entries}


def test_everything_that_users_have_occurs(entries) -> None:
    seen: Counter[str] = Counter()
    for entry in entries:
        if isinstance(entry.answer, Call):
            known = providers(entry)
            own = [item for item in entry.history if known[item.call.name] == known[entry.answer.name]]
            verdicts = {item.verdict for item in own}
            seen["the very tool was liked"] += any(i.call.name == entry.answer.name and i.verdict == LIKED for i in own)
            seen["no history"] += not entry.history
            seen["contradictory"] += {LIKED, DISLIKED} <= verdicts
            seen["never seen before"] += not own
            seen["used, not rated"] += None in verdicts
            seen[f"parameters renamed: {set(entry.answer.arguments) not in [set(e.arguments) for e in EXAMPLES]}"] += 1
            seen[next(mark for mark in ("<", "mcp__", "__", ".", "/", "_", "") if mark in entry.answer.name)] += 1
    assert all(count >= 20 for count in seen.values()), seen
    assert len(seen) >= 12


def test_the_same_seed_gives_the_same_a_longer_run_begins_alike_and_one_tool_is_refused(entries) -> None:
    with pytest.raises(PetoolError, match="fewer than two tools"):
        list(simulate(EXAMPLES[:1], [], 1, 0))
    again = list(itertools.islice(simulate(EXAMPLES, [], 10**9, 7), 50))
    assert again == entries[:50]
    assert list(simulate(EXAMPLES, [], 50, 8)) != again
    assert [parse(entry_line(entry), entry.id) for entry in again] == again


def test_the_command_makes_entries_of_ones_own_log(found, tmp_path) -> None:
    rows = [entry_line(entry) for entry in load_dataset("demo:train:40").entries]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    line = ["data", "simulate", "log.jsonl", "--count", "60", "--out", "made.jsonl"]
    assert found(*line, cwd=tmp_path)["entries"] == 60
    made = load_dataset(str(tmp_path / "made.jsonl")).entries
    assert len(made) == 60
    assert len(examples_of(made)) > 40


def test_earlier_calls_are_examples_too_and_values_that_nothing_tells_are_left_out() -> None:
    find = Tool("kit.find", "Find", {"properties": {"city": {"type": "string"}, "most": {"type": "integer"},
                                                    "sort": {"type": "string", "default": "near"}},
                                     "required": ["city"]})  # fmt: skip
    other = Tool("kit.other", "Another", {"properties": {}})

    def earlier(verdict, query: str, name: str = "kit.find", **arguments) -> Interaction:
        return Interaction(query, Call(name, arguments), verdict)

    history = (
        earlier(LIKED, "Some in Oslo, two at most", city="Oslo", most=2),
        earlier(None, "In new york!", city="New York", most=7, sort="near"),
        earlier(None, "In new york!", city="New York", sort="near", most=8),  # the same as far as it is told
        earlier(DISLIKED, "In Bonn", city="Bonn"),
        earlier(LIKED, "Anywhere", city="Bern"),  # what the tool needs is not told
        earlier(LIKED, "In Rome", "kit.gone", city="Rome"),
    )
    found = examples_of([Entry("1", "Some in Lima", (find, other), history, Call("kit.find", {"city": "Lima"}))])
    assert [(example.query, dict(example.arguments)) for example in found] == [
        ("Some in Lima", {"city": "Lima"}),
        ("Some in Oslo, two at most", {"city": "Oslo", "most": 2}),
        ("In new york!", {"city": "New York", "sort": "near"}),
    ]
    assert all((example.tool, example.others) == (find, (other,)) for example in found)
