"""Copies of an entry under other names: providers, api spellings and values change, what the user likes does not.

A file of entries repeats a few right tools many times, so a small model learns their names by heart and then invents
names for tools it never saw. Where every copy has names of its own, the only way to be right is to read and copy.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import Any

from petool_lite.data.entries import Entry, Interaction, Prompt, ToolCall, provider

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
ADDRESS = re.compile(r"https?://(www\.)?")
_VERBS = ("get", "fetch", "retrieve", "list", "read", "show", "find", "load")
_SHORTEST = 3  # a shorter value may stand in the query by chance
_SHORTEST_DEFAULT = 4  # and a shorter default, which the answer would have anyway


def all_providers(entries: Sequence[Entry], setting: str) -> list[str]:
    """Every provider of a candidate or an earlier call of `entries`, sorted."""
    return sorted({provider(name) for entry in entries for name in _names(entry.prompt(setting))})


def renamed(entry: Entry, setting: str, rng: Random, providers: Sequence[str]) -> Entry:
    """The entry with each provider under another of `providers`, each api in another spelling, other values copied.

    One provider becomes one provider, so likes and dislikes carry over. A value of the answer that stands in the query
    is replaced in both, unless it is a default so short that it may stand there by chance. Only the prompt of `setting`
    is kept. The id is unchanged.
    """
    prompt = entry.prompt(setting)
    names = _new_names(sorted(set(_names(prompt))), rng, providers)
    history = [_renamed_call(item, names) for item in prompt.history]
    tools = [
        (replace(tool, name=names[tool.name]), _with_key(text, "tool_name", names[tool.name]))
        for tool, text in zip(prompt.tools, prompt.tool_texts, strict=True)
    ]
    query, gold = entry.query, entry.gold
    if gold is not None:
        tool = next((tool for tool in prompt.tools if tool.name == gold.tool_name), None)
        defaults = {str(item.default) for item in (*tool.required, *tool.optional)} if tool else set()
        query, parameters = _new_values(query, gold.parameters, rng, defaults)
        gold = ToolCall(names.get(gold.tool_name, gold.tool_name), parameters)
    return replace(
        entry,
        query=query,
        prompts={setting: prompt.with_history(history).with_tools(tools)},
        gold=gold,
        equal_tools=entry.equal_tools and tuple(names.get(name, name) for name in entry.equal_tools),
    )


def respelled(api: str, rng: Random) -> str:
    """The words of an api's name in another common spelling; a name without words stays."""
    words = _WORD.findall(api)
    if not words:
        return api
    if words[0].lower() in _VERBS and rng.random() < 0.5:
        words[0] = rng.choice(_VERBS)
    lower = [word.lower() for word in words]
    title = [word.capitalize() for word in words]
    spelled = rng.choice(
        (
            " ".join(words),
            " ".join(title),
            " ".join([title[0], *lower[1:]]),
            "".join(title),
            "".join([lower[0], *title[1:]]),
            "_".join(lower),
            "-".join(lower),
            "/".join(lower),
        )
    )
    return spelled + (rng.choice((" v2", "_v1", " (new)", "2")) if rng.random() < 0.1 else "")


def _names(prompt: Prompt) -> list[str]:
    return [*(tool.name for tool in prompt.tools), *(item.call.tool_name for item in prompt.history)]


def _new_names(names: Sequence[str], rng: Random, providers: Sequence[str]) -> dict[str, str]:
    """A new name for each, no two alike; names that are not `<category>.<provider>.<api>` stay."""
    old = sorted({provider(name) for name in names})
    # With too few names to draw from, the entry's own are dealt out anew.
    drawn = rng.sample(providers, len(old)) if len(providers) >= len(old) else rng.sample(old, len(old))
    new_provider = dict(zip(old, drawn, strict=True))
    spellings: dict[str, str] = {}
    result: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        parts = name.split(">.<")
        if len(parts) != 3:
            result[name] = name
            continue
        api = parts[2].rstrip(">")
        spelling = respelled(api, rng) if rng.random() < 0.3 else spellings.setdefault(api, respelled(api, rng))
        made = f"{parts[0]}>.<{new_provider[parts[1]]}>.<{spelling}>"
        if made in taken:  # two spellings of one provider met
            made = f"{parts[0]}>.<{new_provider[parts[1]]}>.<{api}>"
        while made in taken:
            made = f"{made[:-1]}_>"
        taken.add(made)
        result[name] = made
    return result


def _renamed_call(item: Interaction, names: Mapping[str, str]) -> Interaction:
    name = names[item.call.tool_name]
    value = json.loads(item.text)
    value["tool_call"]["tool_name"] = name
    return replace(item, call=replace(item.call, tool_name=name), text=json.dumps(value, ensure_ascii=False))


def _with_key(text: str, key: str, value: Any) -> str:
    return json.dumps({**json.loads(text), key: value}, ensure_ascii=False)


def _new_values(
    query: str, parameters: Mapping[str, Any], rng: Random, defaults: set[str]
) -> tuple[str, dict[str, Any]]:
    """Query and parameters with other values of the same make wherever one can only have been copied."""
    result = dict(parameters)
    for key, value in parameters.items():
        text = str(value)
        shortest = _SHORTEST_DEFAULT if text in defaults else _SHORTEST
        if isinstance(value, bool) or not isinstance(value, (str, int)) or len(text) < shortest:
            continue
        whole = re.compile(rf"(?<!\w){re.escape(text)}(?!\w)")
        alone = sum(text in str(other) for other in parameters.values()) == 1
        if len(whole.findall(query)) != 1 or not alone or not any(sign.isdigit() for sign in text):
            continue
        made = scrambled(text, rng)
        query = whole.sub(lambda _, made=made: made, query)  # type: ignore[misc]
        result[key] = int(made) if isinstance(value, int) else made
    return query, result


def scrambled(text: str, rng: Random) -> str:
    """The same text with every digit another one; letters too where letters and digits make one word, as in an id.

    Of an address that begins with https://, the beginning stays.
    """
    if found := ADDRESS.match(text):
        return found.group() + scrambled(text[found.end() :], rng)
    mixed = re.search(r"[A-Za-z]", text) is not None and re.search(r"[0-9]", text) is not None and " " not in text
    made = []
    for index, sign in enumerate(text):
        if "0" <= sign <= "9":
            starts = sign != "0" and (index == 0 or not text[index - 1].isdigit())
            made.append(str(rng.randrange(1 if starts else 0, 10)))  # a number keeps its length
        elif mixed and "a" <= sign <= "z":
            made.append(rng.choice("abcdefghijklmnopqrstuvwxyz"))
        elif mixed and "A" <= sign <= "Z":
            made.append(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
        else:
            made.append(sign)
    return "".join(made)
