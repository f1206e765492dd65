"""Requests in anybody's form as an Entry: tools and history of OpenAI, MCP or PEToolBench, or a whole row of a file."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from petool_lite.data import SETTINGS, openai, petoolbench
from petool_lite.data.entries import Entry, check_setting
from petool_lite.data.fields import Fault, kind_of, sound
from petool_lite.errors import PetoolError

_ID = "the request"


@contextmanager
def named_faults() -> Iterator[None]:
    """Turn a field that is not as expected into a PetoolError that names it."""
    try:
        yield
    except Fault as fault:
        raise PetoolError(f"{fault}", "docs/data.md shows the forms of tools and history") from None


@named_faults()
def request_entry(query: str, tools: Any, history: Any = None) -> Entry:
    """An entry from a query, a list of tools (OpenAI's, MCP's or PEToolBench's form) and what came before: OpenAI
    messages, or PEToolBench's earlier calls. Raises PetoolError that names the field that is not as expected."""
    offered, rows = openai.read_tools(tools), [] if history is None else history
    if not isinstance(rows, list | tuple):
        raise Fault("history", f"a list of earlier calls or messages, found {kind_of(rows)}")
    if any(isinstance(row, Mapping) and "role" in row for row in rows):
        return openai.conversation([*rows, {"role": "user", "content": query}], offered, _ID)
    calls = tuple(petoolbench.read_interaction(row, f"history[{index}]") for index, row in enumerate(rows))
    return Entry(_ID, str(sound(query, "query")), offered, calls)


@named_faults()
def row_entry(row: Mapping[str, Any], setting: str | None = None) -> Entry:
    """An entry from one object: query, tools and history; a published entry or training row; or an OpenAI line. The
    answer that a row may hold is left out. Raises PetoolError."""
    if setting is not None:
        check_setting(setting)
    if "messages" in row:
        messages = row["messages"]
        if not isinstance(messages, list) or not messages:
            raise Fault("messages", "a list of messages")
        answered = isinstance(messages[-1], Mapping) and messages[-1].get("role") == "assistant"
        tools = openai.read_tools(row.get("tools") or [])
        return openai.conversation(messages[:-1] if answered else messages, tools, _ID)
    if "instruction" in row or petoolbench.settings_of(row):
        return replace(_published_row(row, setting), id=_ID, answer=None)
    if not isinstance(row.get("query"), str):
        raise PetoolError("the request has no query", "a text under the key query")
    return request_entry(row["query"], row.get("tools"), row.get("history"))


@named_faults()
def _published_row(row: Mapping[str, Any], setting: str | None) -> Entry:
    if "instruction" not in row:
        return petoolbench.parse(row, setting or petoolbench.settings_of(row)[0], _ID)

    def read(chosen: str) -> Entry:
        prompt = {"query": row.get("query", row.get("input")), petoolbench.PROMPT_FIELD[chosen]: row["instruction"]}
        return petoolbench.parse(prompt, chosen, _ID)

    entry = read(setting or SETTINGS[0])
    unrated = bool(entry.history) and all(item.verdict is None for item in entry.history)
    return read("preferred") if setting is None and unrated else entry


def with_published_prompt(entry: Entry, wording: str | None, setting: str | None) -> Entry:
    """The entry with a published prompt: its system message where that is one; else one in `wording`, the model's own
    record (JSON: for each setting the text around the two arrays). Raises PetoolError where there is neither."""
    system = entry.turns[0].get("content") if entry.turns and entry.turns[0].get("role") == "system" else None
    if isinstance(system, str) and "required_parameters" in system:
        return _published_row({"instruction": system, "query": entry.query}, setting)
    texts = json.loads(wording) if wording else {}
    rated = any(item.verdict for item in entry.history) or not entry.history
    chosen = next((name for name in (setting, "rating" if rated else "preferred", *texts) if name in texts), None)
    if chosen is None:
        what = "this model was trained on the published prompt, and its file does not record the wording"
        raise PetoolError(what, "export it again with this version, or give a whole entry (--request)")
    return petoolbench.published_entry(entry, texts[chosen], chosen)
