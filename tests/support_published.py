"""A small PEToolBench of our own for tests: rows in the published test form, three prompts each, any number of them."""

import json
import random
from typing import Any

FUNCTIONS = {
    "train": ["Weather|forecast|city", "Travel|hotels|city", "Music|song_search|query", "Sports|league_table|league_id",
              "Finance|exchange_rate|currency", "News|headlines|topic", "Books|book_search|query", "Maps|nearby|place"],
    "test": ["Weather|air_quality|city", "Music|lyrics|song_id", "Books|quotes|topic", "Events|concerts|city"],
}  # fmt: skip
PROVIDERS = ["Acorn", "Birch", "Cobalt", "Delta", "Ember", "Falcon", "Garnet", "Harbor"]
VALUES = ["Oslo", "Lima", "jazz", "comets", "USD"]
HEADS = {
    "instruction_preferred": "Choose what this user prefers. Earlier calls:\n",
    "instruction_ratings": "Choose what this user prefers. Earlier calls, rated 1 or 0:\n",
    "instruction_chronological": "Choose what this user prefers. Earlier calls, the latest last:\n",
}
TAIL = '\nReply with one call: {"tool_name": ..., "parameters": {...}}'


def _tool(function: str, provider: str) -> dict[str, Any]:
    category, api, parameter = function.split("|")
    kind = "NUMBER" if parameter.endswith("_id") else "STRING"
    return {
        "tool_name": f"<{category}>.<{provider}>.<{api}>",
        "tool_description": api.replace("_", " "),
        "required_parameters": [{"name": parameter, "type": kind, "description": "", "default": ""}],
        "optional_parameters": [{"name": "limit", "type": "NUMBER", "description": "at most", "default": "10"}],
    }


def _call(function: str, provider: str, rng: random.Random) -> dict[str, Any]:
    category, api, parameter = function.split("|")
    value = rng.randint(10, 99) if parameter.endswith("_id") else rng.choice(VALUES)
    call = {"tool_name": f"<{category}>.<{provider}>.<{api}>", "parameters": {parameter: value}}
    return {"instruction": f"Give me {api.replace('_', ' ')} of {value}.", "tool_call": call}


def published_rows(split: str, count: int) -> list[dict[str, Any]]:
    """Rows whose right provider among three is the one that the history likes; functions of the splits differ."""
    rng, rows = random.Random(split), []
    for index in range(count):
        function = FUNCTIONS[split][index % len(FUNCTIONS[split])]
        others = [other for other in FUNCTIONS[split] if other != function]
        liked, *rest = rng.sample(PROVIDERS, 3)
        calls = [(provider, _call(rng.choice(others), provider, rng)) for provider in (*rest, liked)]
        tools = [_tool(function, provider) for provider in (liked, *rest)] + [_tool(rng.choice(others), rest[0])]
        rng.shuffle(tools)
        asked = _call(function, liked, rng)
        histories = {
            "instruction_preferred": [call for provider, call in calls if provider == liked],
            "instruction_ratings": [call | {"rating": int(provider == liked)} for provider, call in calls],
            "instruction_chronological": [call for _, call in calls],
        }
        rest = f"\nTools:\n{json.dumps(tools)}{TAIL}"
        prompts = {field: f"{HEADS[field]}{json.dumps(history)}{rest}" for field, history in histories.items()}
        same = [tool["tool_name"] for tool in tools if tool["tool_name"].endswith(f"<{function.split('|')[1]}>")]
        keys = ("category_name", "tool_name", "api_name")
        parts = [dict(zip(keys, name[1:-1].split(">.<"), strict=True)) for name in same]
        known = {"apis_same_func": parts, "func": function, "entry_id": index}
        truth = {"api_call_ground_truth": asked["tool_call"]}
        rows.append({"query": asked["instruction"], **prompts, **truth, **known})
    return rows


def training_row(row: dict[str, Any], **more: str) -> dict[str, Any]:
    """The same in the form of a training row (rating setting), or with chosen and rejected of a preference row."""
    answer = {} if "chosen" in more else {"output": json.dumps(row["api_call_ground_truth"])}
    return {"instruction": row["instruction_ratings"], "input": row["query"], **answer, **more}
