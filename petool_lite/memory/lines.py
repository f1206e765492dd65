"""Interactions as lines that others read: OpenAI conversations for people to keep, training rows for `data.train`."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from petool_lite.data.answers import answer_faults
from petool_lite.data.entries import DISLIKED, LIKED, Answer, Call, Entry, Interaction
from petool_lite.data.fields import Fault, kind_of
from petool_lite.data.openai import conversation, entry_line, entry_messages, parse, read_tools
from petool_lite.errors import PetoolError
from petool_lite.memory.store import VERDICTS, Record, Store, names_of_provider, record_of, with_earlier

ENOUGH = 10  # liked calls that training takes: fewer are learned by heart


def openai_line(item: Record) -> dict[str, Any]:
    """An interaction as a conversation in OpenAI's form, a call's verdict at its end; beside it its other facts."""
    if isinstance(item.made, Call):
        told = Entry("", "", (), (Interaction(item.query, item.made, item.verdict),))
        messages = entry_messages(told)[:-1]  # without the query that would follow
    else:
        asked = [{"role": "user", "content": item.query}] if item.query else []
        messages = [*asked, {"role": "assistant", "content": item.made}]
    found = {"messages": json.loads(item.turns or "[]") + messages, "tools": json.loads(item.tools)}
    return found | {name: value for name, value in item.facts().items() if name not in ("query", "answer")}


def read_line(row: Any, number: int, user: str | None = None) -> list[Record]:
    """The interactions of a line in OpenAI's form: every call with a verdict (`used` for none), and the answer at its
    end. They are `user`'s where it does not say; its `number` is part of ids that it lacks. Raises Fault."""
    messages = row.get("messages") if isinstance(row, Mapping) else None
    if not isinstance(messages, list) or not messages:
        raise Fault("messages", "a list of messages")
    owner, verdict = row.get("user", user), row.get("verdict")
    if not isinstance(owner, str):
        raise Fault("user", f"whose line it is, or --user; found {kind_of(owner)}")
    if verdict not in (None, *VERDICTS):
        raise Fault("verdict", f"one of {', '.join(VERDICTS)}, found {str(verdict)[:40]}")
    given = {name: row[name] for name in ("time", "confidence") if row.get(name) is not None}
    for name, value in given.items():
        if not isinstance(value, int | float) or not 0 <= value < 1e11:
            raise Fault(name, f"a number from 0 to 10^11, found {str(value)[:40]}")
    if isinstance(result := row.get("result"), str):
        given["result"] = result
    if isinstance(messages[-1], Mapping) and messages[-1].get("role") == "assistant":
        entry = parse({"messages": messages, "tools": row.get("tools")}, "")
    else:
        entry = conversation(messages, read_tools(row.get("tools") or []))
    made: list[tuple[str, Answer, str | None]] = [(item.query, item.call, item.verdict) for item in entry.history]
    made += [] if entry.answer is None else [(entry.query, entry.answer, verdict)]
    if len(made) > 1:  # what was said between several calls belongs to none of them
        entry = replace(entry, turns=())
    own, found = row.get("id") if len(made) == 1 and isinstance(row.get("id"), str) else None, []
    line = _digest([owner, row, number])
    for index, (query, answer, said) in enumerate(made):
        name = own or _digest([line, index])
        record = record_of(name, owner, replace(entry, query=query), answer)
        found.append(replace(record, **{"verdict": said} | given))
    return found


def training_rows(source: str, store: Store | None = None) -> list[dict[str, Any]]:
    """The rows of `history:*` (all users) or `history:NAME`: liked calls as answers, with their user's earlier calls. A
    disliked answer to the same words and tools is the `rejected` one of the liked. Raises PetoolError for too few."""
    name = source.partition(":")[2]
    kept = (store or Store()).records(None if name == "*" else name)
    rows = [entry_line(entry) | {"id": entry.id} for entry in _entries(kept)]
    if len(rows) < ENOUGH:
        hint = f"rate {ENOUGH - len(rows)} more: petool-lite rate last liked; history:NAME is a user, history:* all"
        raise PetoolError(f"{source} has {len(rows)} liked calls of {len(kept)}, {ENOUGH} would do", hint)
    return rows


def _entries(kept: Sequence[Record]) -> Iterator[Entry]:
    """Entries to train on, each with its user's earlier calls; `kept` is in the order of time."""
    wrong = {_asked(item): item.made for item in kept if item.verdict == DISLIKED}
    offered = cache(read_tools)
    earlier = defaultdict[str, list[tuple[set[str], Interaction]]](list)
    for item in kept:
        before = earlier[item.user]
        if item.verdict == LIKED and item.turns is not None:
            tools, turns = offered(item.tools), tuple(json.loads(item.turns))
            entry = Entry(item.id, item.query, tools, answer=item.made, turns=turns)
            names = set().union(*(names_of_provider(tool.name) | {tool.provider} for tool in entry.tools))
            if not answer_faults(entry):
                bearing = [made for known, made in before if known & names]
                yield replace(with_earlier(entry, bearing), rejected=wrong.get(_asked(item)))
        if isinstance(item.made, Call):
            before.append((names_of_provider(item.called), Interaction(item.query, item.made, item.verdict)))


def _asked(item: Record) -> str:
    """What tells one request from another."""
    return _digest([item.user, item.query, item.turns, item.tools])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]
