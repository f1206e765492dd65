"""The values that a request states for a tool's parameters."""

import time

import pytest

from petool_lite.data.augment import build_catalog
from petool_lite.data.entries import Parameter, Tool
from petool_lite.data.files import load_dataset
from petool_lite.data.values import drafted


def item(name: str, kind: str = "STRING", default: str = "", about: str = "") -> Parameter:
    return Parameter(name, kind, about, default)


def stated(query: str, *required: Parameter, optional: tuple[Parameter, ...] = ()) -> dict:
    return drafted(Tool("<A>.<B>.<c>", "", required, optional), query)


PAGING = (
    item("size", "NUMBER", "10", "The number of items per response"),
    item("number", "NUMBER", "1", "The page index for paging"),
)


@pytest.mark.parametrize(
    ("query", "parameters", "expected"),
    [
        ("with longitude 9.28 and latitude 4.15", (item("lat"), item("lon")), {"lat": "4.15", "lon": "9.28"}),
        ("a limit of 50, offset 20", (item("offset", "NUMBER"), item("limit", "NUMBER")), {"offset": 20, "limit": 50}),
        ("with 20 items per response, and on the second page", PAGING, {"size": 20, "number": 2}),
        ("start from the 6th result", (item("start", "NUMBER", "0"),), {"start": 5}),
        ("sorted by price ascending", (item("sort", default="price-ascending"),), {"sort": "price-ascending"}),
        ("flats for rent", (item("kind", about="One of the following : for-rent|for-sale"),), {"kind": "for-rent"}),
        ("IDs 5002 and 6020", (item("ids", default="5002,6020"),), {"ids": "5002,6020"}),
        ("in Canada, in French", (item("country", default="us"), item("lang", default="en-US")),
         {"country": "ca", "lang": "fr-CA"}),
        ("on 29th January 2021", (item("date", default="06/10/2020"),), {"date": "29/01/2021"}),
        ("on March 3, 2021", (item("date", default="2020-10-06"),), {"date": "2021-03-03"}),
        ("for the city 'Turin'", (item("name", default="Milan"),), {"name": "Turin"}),
        ("search 'Laptop'", (item("keyword", default="laptop"),), {"keyword": "Laptop"}),
        ("a price of 2.5", (item("price", "NUMBER"),), {"price": 2.5}),
        ("flag on", (item("flag", "BOOLEAN", "true"),), {"flag": True}),
        ("the file", (item("path", about="File path e.g. '/folder/file.ext'"),), {"path": "/folder/file.ext"}),
        ("on March 11, 2022", (item("gameDate", default="20201006"), item("top")), {"gameDate": "20220311"}),
        ("users with IDs 4419 and 1556", (item("ids"),), {"ids": "4419,1556"}),
        ("a user with ID 4419 and 30 tweets", (item("id"), item("limit")), {"id": "4419", "limit": "30"}),
        ("game 20221202_CHI@GS, cursor HBaEgNKV0AAA==.", (item("game"), item("cursor")),
         {"game": "20221202_CHI@GS", "cursor": "HBaEgNKV0AAA=="}),
        ("series '', badge 'New', the user's name 'Ann O'Hara'", (item("badge"), item("name")),
         {"badge": "New", "name": "Ann O'Hara"}),
        ("the first 25 seasons from season 0", (item("limit", "NUMBER"),), {"limit": 25}),
        ("starting from index 10, 15 per page", (item("start", "NUMBER"), item("pageSize", "NUMBER")),
         {"start": 10, "pageSize": 15}),
        ("25 results per page on page 0", (item("page", "NUMBER"), item("hitsPerPage", "NUMBER")),
         {"page": 0, "hitsPerPage": 25}),
        ("a minimum of 2 bedrooms", (item("bedrooms"), item("minimumLivingArea")), {"bedrooms": "2"}),
        ("in Australia, in English", (item("country", default="US"), item("lang", default="en-US")),
         {"country": "AU", "lang": "en-AU"}),
        ("in a city of 4.05 million", (item("million", "NUMBER"),), {"million": 4.05}),
        ("nothing said", (item("city"),), {}),
    ],
)  # fmt: skip
def test_required_parameters_take_what_the_request_or_the_declaration_says(query, parameters, expected) -> None:
    assert stated(query, *parameters) == expected


def test_optional_parameters_are_given_where_the_request_has_a_value_or_names_them() -> None:
    optional = (item("versionId"), item("limit", "NUMBER", "30"), item("page", "NUMBER"))
    assert stated("download a specific version", optional=optional) == {"versionId": ""}
    assert stated("the 12 latest, with a limit of 12", optional=optional) == {"limit": 12}
    assert stated("all of it", optional=optional) == {}


def test_a_part_of_the_request_is_for_one_parameter_only() -> None:
    both = (item("limit_suggestions", "NUMBER", "5"), item("limit_titles", "NUMBER", "5"))
    query = "limit suggestions to 20 and limit titles to 50"
    assert stated(query, *both) == {"limit_suggestions": 20, "limit_titles": 50}
    assert stated(query, *both[::-1]) == {"limit_titles": 50, "limit_suggestions": 20}


@pytest.mark.parametrize("text", ["-" * 5000, "1 " * 3000, "'" * 4000, "http://" * 900, "the 2nd of 3 " * 400])
def test_odd_requests_cost_little(text) -> None:
    parameters = tuple(item(f"name{number}", "NUMBER", str(number)) for number in range(64))
    begun = time.process_time()
    stated(text, *parameters)
    assert time.process_time() - begun < 5


def test_odd_declarations_cost_little() -> None:
    begun = time.process_time()
    choices = "One of the following: " + "|".join(f"choice{number}" for number in range(20_000))
    stated("choice of the 7th", item("a", about=choices), item("b", default="word " * 50_000), item("c" * 10_000))
    assert time.process_time() - begun < 2


def test_most_right_answers_of_published_entries_are_stated(open_entries) -> None:
    """The rule was made with these requests in view; the calls of the histories are of other tools."""
    entries = load_dataset(str(open_entries), "rating").entries
    answers = {entry.gold.tool_name for entry in entries}
    right = []
    for entry in entries:
        tool = next(tool for tool in entry.prompt("rating").tools if tool.name == entry.gold.tool_name)
        right.append(drafted(tool, entry.query) == entry.gold.parameters)
    assert sum(right) == 652
    catalog = build_catalog(entries, "rating")
    calls = {
        (call.instruction, call.call.to_json()): call.call
        for entry in entries
        for call in entry.prompt("rating").history
        if call.call.tool_name in catalog and call.call.tool_name not in answers
    }
    others = [drafted(catalog[call.tool_name].tool, query) == call.parameters for (query, _), call in calls.items()]
    assert (sum(others), len(others)) == (121, 140)
