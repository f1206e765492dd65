"""Which candidates do the same job, on made tools and on the published entries."""

import pytest

from petool_lite.data.entries import Interaction, Parameter, Prompt, Tool, ToolCall
from petool_lite.data.files import load_dataset
from petool_lite.data.jobs import jobs, likeliest, standing


def tool(name: str, description: str, *parameters: str) -> Tool:
    return Tool(name, description, tuple(Parameter(item, "STRING", "", "") for item in parameters), ())


def prompt(*calls: tuple[str, int | None], tools: tuple[Tool, ...] = ()) -> Prompt:
    history = tuple(Interaction("", ToolCall(name, {}), rating, "{}") for name, rating in calls)
    return Prompt("", history, "[]", "", tools, "[]", "")


WEATHER = (
    tool("<W>.<Sun>.<getForecast>", "Get the weather forecast of a city.", "city"),
    tool("<M>.<Tune>.<Search tracks>", "Search songs by title", "title"),
    tool("<W>.<Rain>.<Weather Forecast>", "Weather forecast of a city", "city"),
    tool("<W>.<Rain Pro>.<forecast>", "Forecast weather of a city", "city"),
)


def test_the_disliked_tool_points_to_its_likeness() -> None:
    weather, songs = jobs(prompt(("<W>.<Rain>.<x>", 0), tools=WEATHER), "rating")
    names = [item.name for item in weather.tools]
    assert set(names) == {item.name for item in WEATHER} - {WEATHER[1].name}
    assert (weather.decided, songs.decided) == (True, False)
    assert names[0] == "<W>.<Rain Pro>.<forecast>"  # as unknown as Sun, but of the same family as the disliked one
    assert names[-1] == "<W>.<Rain>.<Weather Forecast>"


def test_likes_decide_before_likeness_does() -> None:
    (weather, _) = jobs(prompt(("<W>.<Rain>.<x>", 0), ("<W>.<Sun>.<y>", 1), tools=WEATHER), "rating")
    assert weather.tools[0].name == "<W>.<Sun>.<getForecast>"


def test_without_a_history_nothing_is_decided_and_the_order_is_kept() -> None:
    made = jobs(prompt(tools=WEATHER), "rating")
    assert not any(job.decided for job in made)
    assert [item.name for item in made[0].tools] == [WEATHER[index].name for index in (0, 2, 3)]


def test_a_provider_that_was_left_counts_against_itself() -> None:
    calls = [("<W>.<Rain>.<x>", None), *[("<M>.<Other>.<y>", None)] * 3, ("<W>.<Sun>.<z>", None)]
    history = prompt(*calls, tools=WEATHER)
    assert [standing(history, item.name, "chronological") for item in WEATHER] == [1, 0, -1, 0]
    assert [standing(history, item.name, "preferred") for item in WEATHER] == [1, 0, 1, 0]


@pytest.mark.parametrize(("setting", "right"), [("rating", 0.80), ("chronological", 0.65)])
def test_on_the_published_entries_the_first_tool_is_mostly_the_answer(open_entries, setting, right) -> None:
    """The query is not even read: what this finds comes from the candidates and the history alone."""
    entries = load_dataset(str(open_entries), setting).entries
    first = 0
    for entry in entries:
        made = jobs(entry.prompt(setting), setting)
        family = next(job for job in made if entry.gold.tool_name in {item.name for item in job.tools})
        assert set(entry.equal_tools) <= {item.name for item in family.tools}
        first += made[0].tools[0].name == entry.gold.tool_name
    assert first / len(entries) > right


def test_likeliest_is_what_resembles_the_disliked_and_answers_the_query() -> None:
    disliked = prompt(("<W>.<Rain>.<x>", 0), tools=WEATHER)
    assert likeliest(disliked, "Search songs by title", "rating").name == "<W>.<Rain Pro>.<forecast>"
    liked = prompt(("<W>.<Rain>.<x>", 0), ("<W>.<Sun>.<y>", 1), tools=WEATHER)
    assert likeliest(liked, "weather forecast of a city", "rating").name == "<W>.<Sun>.<getForecast>"
    # without any history the query tells the job
    assert likeliest(prompt(tools=WEATHER), "weather forecast of a city", "rating").name == "<W>.<Sun>.<getForecast>"
    assert likeliest(prompt(tools=WEATHER[:2]), "Search songs by title", "rating") is WEATHER[1]
    assert likeliest(prompt(("<W>.<Rain>.<x>", 0), tools=WEATHER[2:3]), "weather", "rating") is WEATHER[2]  # none else


def test_likeliest_is_right_for_nine_of_ten_published_entries(open_entries) -> None:
    entries = load_dataset(str(open_entries), "rating").entries
    right = [likeliest(entry.prompt("rating"), entry.query, "rating").name == entry.gold.tool_name for entry in entries]
    assert sum(right) == 691


@pytest.mark.parametrize(("setting", "expected"), [("preferred", 534), ("chronological", 667)])
def test_likeliest_in_the_other_settings_of_the_published_entries(open_entries, setting, expected) -> None:
    entries = load_dataset(str(open_entries), setting).entries
    right = [likeliest(entry.prompt(setting), entry.query, setting).name == entry.gold.tool_name for entry in entries]
    assert sum(right) == expected


def test_a_default_that_the_query_repeats_tells_the_tool() -> None:
    """Two tools say the same of themselves; one of them is for the address that the query has."""
    url = "https://shop.example/a/1"
    one, other = (
        Tool(f"<S>.<{name}>.<detail>", "Details of a product.", (Parameter("url", "STRING", "", default),), ())
        for name, default in (("Kiosk", "https://kiosk.example/7"), ("Shop", url))
    )
    for tools in ((one, other), (other, one)):
        assert likeliest(prompt(tools=tools), f"Details of the product at {url}", "preferred") is other
