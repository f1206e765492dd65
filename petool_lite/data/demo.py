"""A deterministic generator of short PEToolBench-style entries, for a CPU that trains in minutes.

Every entry offers the same function from several invented providers. Nothing in the query or in the
tool descriptions separates them: only the user's history does, so a model that ignores it is right
one time in `PROVIDERS_PER_ENTRY`. Functions of the two splits are disjoint, history included.
"""

import json
import random
from dataclasses import dataclass
from typing import Any

PROVIDERS_PER_ENTRY = 3
CALLS_PER_PROVIDER = 1

_PROVIDERS = [
    "Acorn",
    "Birch",
    "Cobalt",
    "Delta",
    "Ember",
    "Falcon",
    "Garnet",
    "Harbor",
    "Indigo",
    "Juniper",
    "Kestrel",
    "Lumen",
    "Maple",
    "Nectar",
    "Orbit",
    "Pixel",
    "Quartz",
    "Raven",
    "Summit",
    "Tango",
    "Umber",
    "Velvet",
    "Willow",
    "Zephyr",
]
_CITIES = [
    "Oslo",
    "Lima",
    "Cairo",
    "Delhi",
    "Paris",
    "Quito",
    "Turin",
    "Osaka",
    "Perth",
    "Dakar",
    "Minsk",
    "Porto",
    "Sofia",
    "Accra",
    "Hanoi",
    "Malmo",
]
_WORDS = [
    "jazz",
    "chess",
    "salsa",
    "robots",
    "tennis",
    "whales",
    "castles",
    "comets",
    "violins",
    "orchids",
    "glaciers",
    "trains",
    "poetry",
    "bread",
]
_CODES = ["USD", "EUR", "JPY", "GBP", "CHF", "SEK", "NOK", "CAD", "AUD", "INR"]


@dataclass(frozen=True)
class _Function:
    """One job that every provider can do: how a user asks for it and what the call takes."""

    category: str
    api: str
    ask: str
    parameter: str
    kind: str


def _functions(text: str) -> tuple[_Function, ...]:
    return tuple(_Function(*(cell.strip() for cell in line.split("|"))) for line in text.strip().splitlines())


_TRAIN_FUNCTIONS = _functions("""
Weather | forecast | What is the forecast for {}? | city | city
Weather | humidity | How humid is it in {}? | city | city
Travel | hotels | Find hotels in {}. | city | city
Travel | flights_to | Show flights to {}. | city | city
Food | restaurants | List restaurants in {}. | city | city
Food | recipe_search | Find recipes with {}. | query | word
Music | song_search | Search songs about {}. | query | word
Music | artist | Who plays {}? | query | word
Sports | results | Give me results for {}. | query | word
Sports | league_table | Show the table of league {}. | league_id | number
Finance | exchange_rate | What is the rate of {}? | currency | code
Finance | currency_info | Tell me about the currency {}. | currency | code
News | headlines | Show headlines on {}. | topic | word
News | article | Open article {}. | article_id | number
Books | book_search | Find books on {}. | query | word
Maps | geocode | Where on the map is {}? | place | city
Maps | nearby | What is near {}? | place | city
Jobs | job_search | Find jobs in {}. | city | city
Video | video_search | Find videos of {}. | query | word
Video | video_detail | Show video number {}. | video_id | number
Shop | product | Show product {}. | product_id | number
Shop | product_search | Search the shop for {}. | query | word
Movies | movie_search | Find films about {}. | query | word
Movies | movie_cast | Who acts in film {}? | movie_id | number
""")
_TEST_FUNCTIONS = _functions("""
Weather | air_quality | How clean is the air in {}? | city | city
Travel | car_rental | Rent a car in {}. | city | city
Music | lyrics | Get the lyrics of song {}. | song_id | number
Sports | stadiums | Which stadiums are in {}? | city | city
Finance | rate_history | Show past rates of {}. | currency | code
Books | quotes | Find quotes on {}. | topic | word
Events | concerts | Which concerts are in {}? | city | city
Health | pharmacies | Find pharmacies in {}. | city | city
Photos | photo_search | Find photos of {}. | query | word
Orders | order_status | Where is order {}? | order_id | number
""")
_SPLITS = {"train": _TRAIN_FUNCTIONS, "test": _TEST_FUNCTIONS}

_HEAD = {
    "preferred": "Choose the tool this user prefers. Their earlier calls are:\n",
    "ratings": "Choose the tool this user prefers. Their earlier calls, rated 1 (liked) or 0 (disliked), are:\n",
    "chronological": "Choose the tool this user prefers. Their earlier calls, the latest last and liked most, are:\n",
}
_TAIL = '\nReply with one call: {"tool_name": ..., "parameters": {...}}'


def _value(function: _Function, rng: random.Random) -> str | int:
    if function.kind == "number":
        return rng.randint(10, 99)
    return rng.choice({"city": _CITIES, "word": _WORDS, "code": _CODES}[function.kind])


def _tool_name(function: _Function, provider: str) -> str:
    return f"<{function.category}>.<{provider}>.<{function.api}>"


def _tool(function: _Function, provider: str) -> dict[str, Any]:
    kind = "NUMBER" if function.kind == "number" else "STRING"
    parameter = {"name": function.parameter, "type": kind, "description": "", "default": ""}
    return {
        "tool_name": _tool_name(function, provider),
        "tool_description": function.api.replace("_", " "),
        "required_parameters": [parameter],
        "optional_parameters": [],
    }


def _interaction(function: _Function, provider: str, rng: random.Random) -> dict[str, Any]:
    value = _value(function, rng)
    call = {"tool_name": _tool_name(function, provider), "parameters": {function.parameter: value}}
    return {"instruction": function.ask.format(value), "tool_call": call}


def _prompt(setting: str, history: list[dict[str, Any]], tools: list[dict[str, Any]]) -> str:
    return f"{_HEAD[setting]}{json.dumps(history)}\nTools:\n{json.dumps(tools)}{_TAIL}"


def _entry(index: int, functions: tuple[_Function, ...], rng: random.Random) -> dict[str, Any]:
    function = rng.choice(functions)
    others = [candidate for candidate in functions if candidate != function]
    providers = rng.sample(_PROVIDERS, PROVIDERS_PER_ENTRY)
    liked = providers[0]
    calls = [
        (provider, _interaction(other, provider, rng))
        for provider in providers
        for other in rng.sample(others, CALLS_PER_PROVIDER)
    ]
    rng.shuffle(calls)
    # The odd tool belongs to any of the three, so that no count of names among the candidates tells the answer.
    tools = [_tool(function, provider) for provider in providers] + [_tool(rng.choice(others), rng.choice(providers))]
    rng.shuffle(tools)
    value = _value(function, rng)
    rated = [{**call, "rating": int(provider == liked)} for provider, call in calls]
    histories = {
        "preferred": [call for provider, call in calls if provider == liked],
        "ratings": rated,
        "chronological": [call for _, call in sorted(calls, key=lambda pair: pair[0] == liked)],
    }
    return {
        "query": function.ask.format(value),
        **{f"instruction_{setting}": _prompt(setting, history, tools) for setting, history in histories.items()},
        "apis_candidate": json.dumps(tools),
        "api_call_ground_truth": {
            "tool_name": _tool_name(function, liked),
            "parameters": {function.parameter: value},
        },
        "func": function.api,
        "history_length": len(calls),
        "entry_id": index,
    }


def generate(split: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return `count` raw entries of `split` ("train" or "test") in the published test-file format."""
    rng = random.Random(f"{split}-{seed}")
    return [_entry(index, _SPLITS[split], rng) for index in range(count)]
