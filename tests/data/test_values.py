"""Made calls: what is given is what was said, in the form that the declaration asks for."""

import re
from datetime import datetime
from random import Random

import pytest

from petool_lite.data.answers import answer_faults
from petool_lite.data.entries import Call, Tool, properties
from petool_lite.data.files import FORMS, load_corpus, load_dataset
from petool_lite.data.values import with_other_values
from petool_lite.errors import PetoolError

COUNTED = ["", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
DAYS = {"YYYY-MM-DD": "%Y-%m-%d", "MM/DD/YYYY": "%m/%d/%Y", "DD.MM.YYYY": "%d.%m.%Y", "DD/MM/YYYY": "%d/%m/%Y"}


def test_every_value_is_what_the_request_says_in_the_declared_form() -> None:
    seen = dict.fromkeys(("day", "rate", "counted", "left out", "switch", "off"), 0)
    entries = load_dataset("values:6").entries
    for entry in entries:
        assert isinstance(entry.answer, Call)
        assert not answer_faults(entry)
        declared, query = properties(entry.tools[0]), entry.query.replace(",", "")
        rates = [float(said) for said in re.findall(r"([\d.]+)(?:%| %| percent)", query)]
        seen["left out"] += len(declared) > len(entry.answer.arguments)
        for name, value in entry.answer.arguments.items():
            form = next((form for mark, form in DAYS.items() if mark in declared[name]["description"].upper()), None)
            if form:
                day = datetime.strptime(value, form)
                assert re.search(rf"\b0?{day.day}(st|nd|rd|th)?\b", query), (entry.query, value)
                assert day.strftime("%b") in query or f"{day:%Y-%m-%d}" in query, (entry.query, value)
                seen["day"] += 1
            elif isinstance(value, float) and value < 1 and rates:
                assert any(abs(rate - 100 * value) < 1e-9 for rate in rates), (entry.query, value)
                seen["rate"] += 1
            elif isinstance(value, int) and not isinstance(value, bool):
                word = 0 < value < 13 and COUNTED[value] in query.lower()
                assert word or re.search(rf"(?<!\d){value}(?!\d|\.\d)", query), (entry.query, value)
                seen["counted"] += word
            seen["switch"] += value is True
            seen["off"] += value is False
            away = re.search(r"\b(un\w+|off|stop|close|block|disable|deactivate|not)\b", query.lower())
            assert value is not False or away or "microphone on" in query, query
    assert all(count > 25 for count in seen.values()), seen
    calls, tools = load_corpus(["values:6"])
    assert (len({call.tool.name for call in calls}), tools) == (len(entries) // 6, [])
    assert f"values:COUNT (calls of {len(entries) // 6} functions" in FORMS
    assert load_dataset("values:6").entries == entries


def test_a_choice_that_a_description_lists_is_not_drawn_anew_and_an_absent_corpus_is_named() -> None:
    for described, seen in (("Mode. Can be day, night", {"day"}), ("Mode", {"day", "away"})):
        tool = Tool("arm", "Arm", {"properties": {"mode": {"type": "string", "description": described}}})
        texts, draws = {"mode": ["away"]}, [Random(number) for number in range(40)]
        found = [with_other_values("Arm for day", {"mode": "day"}, tool, texts, draw) for draw in draws]
        assert {arguments["mode"] for _, arguments in found} == seen
        assert all(query == f"Arm for {arguments['mode']}" for query, arguments in found)
    with pytest.raises(PetoolError, match=r"no file matches none/\*\.gz"):
        load_dataset("simulated:5:none/*.gz,values:2")
