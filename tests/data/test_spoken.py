"""How made requests say their parameters: the words and the value always belong together."""

from random import Random

import pytest

from petool_lite.data.entries import Parameter
from petool_lite.data.spoken import loosely, spoken


def many(item: Parameter, required: bool = True, varied: bool = False) -> list:
    found = [spoken(item, required, ("Oslo", "jazz"), Random(seed), varied) for seed in range(300)]
    return [value for value in found if value is not None]


def test_pages_come_as_numbers_and_as_ordinals() -> None:
    made = many(Parameter("number", "NUMBER", "The page index for paging purpose", "1"))
    assert {"on the second page", "and on the second page"} & {item.words for item in made}
    assert all(item.value == 2 for item in made if "second" in item.words)
    assert all(str(item.value) in item.words for item in made if item.words and "page" not in item.words)


def test_countries_and_languages_are_asked_for_by_name_and_written_as_the_default_is() -> None:
    countries = many(Parameter("country", "STRING", "", "us"))
    assert {item.value for item in countries if "Canada" in item.words} == {"ca"}
    languages = many(Parameter("lr", "STRING", "", "lang_en"))
    assert {item.value for item in languages if "French" in item.words} == {"lang_fr"}
    assert {item.value for item in many(Parameter("lang", "STRING", "", "en-SG")) if "German" in item.words} == {
        "de-DE"
    }


def test_what_the_request_leaves_out_is_the_default_or_absent() -> None:
    url = Parameter("url", "STRING", "", "https://example.org/a")
    silent = [item for item in many(url) if not item.words]
    assert silent
    assert {item.value for item in silent} == {"https://example.org/a"}
    assert len(many(Parameter("filter", "STRING", "", ""), required=False)) < 120


def test_a_request_has_an_address_of_its_own_as_often_as_the_declared_one() -> None:
    url = Parameter("url", "STRING", "", "https://www.example.org/p/a-long-name-without-digits-in-it-and-more-words")
    said = [item for item in many(url) if item.words]
    assert all(item.value in item.words for item in said)
    own = {item.value for item in said if str(item.value).startswith("https://www.")} - {url.default}
    assert len(own) > 40
    assert all(value.count("//") == 1 and " " not in value for value in own)
    assert sum(item.value == url.default for item in said) < 120


def test_a_value_that_is_only_announced_is_empty_or_the_example() -> None:
    path = many(Parameter("path", "STRING", "File path e.g. '/folder/file.ext'", ""))
    assert "/folder/file.ext" in {item.value for item in path if "specific path" in item.words}
    version = many(Parameter("versionId", "STRING", "File version ID", ""), required=False)
    assert {item.value for item in version if "specific version id" in item.words} == {""}


@pytest.mark.parametrize(
    ("value", "prose"),
    [
        ("for-rent", "for rent"),
        ("city-level-score", "city level score"),
        ("['Age:Teens', 'Size:TWIN']", "Age:Teens and Size:TWIN"),
        ("5002,6020", "5002 and 6020"),
        ("29/01/2021", "29th January 2021"),
        ("2021-02-03", "3rd February 2021"),
        ("mostRecent", "most recent"),
        ("https://example.org/a-b?c=1,2", "https://example.org/a-b?c=1,2"),
    ],
)
def test_prose_writes_a_value_in_its_own_way(value, prose) -> None:
    found = {loosely(value, Random(seed)) for seed in range(40)}
    assert prose in found
    signs = [sign for sign in value.lower() if sign.isalnum()]
    assert prose[0].isdigit() or all(
        [s for s in text.lower() if s.isalnum()][: len(signs[:3])] == signs[:3] for text in found
    )


def test_a_day_that_may_be_a_month_keeps_its_digits() -> None:
    assert {loosely("05/06/2020", Random(seed)) for seed in range(20)} == {"05/06/2020"}


def test_varied_requests_name_known_values_loosely_and_the_call_has_the_value_itself() -> None:
    purpose = Parameter("purpose", "STRING", "One of the following : for-rent|for-sale", "for-rent")
    made = many(purpose, varied=True)
    assert {item.value for item in made} <= {"for-rent", "for-sale"} | {"Oslo", "jazz"}
    assert any("for sale" in item.words and item.value == "for-sale" for item in made)
    assert not any("for sale" in item.words for item in many(purpose))
    kind = Parameter("type", "STRING", "`multi` or one of these:\n\n- albums\n- artists\n- episodes", "multi")
    assert {"albums", "artists"} <= {item.value for item in many(kind, varied=True)}
