"""Conversations and tool lists as everybody writes them: OpenAI messages, MCP lists, Hermes, ShareGPT and xLAM lines.
History is user, assistant with the tool call, then a `tool` message: `liked` or `disliked` there is the verdict, `used`
none. All other turns are the conversation so far; training learns its answers that carry OpenAI's `"weight": 1`."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from petool_lite.data import petoolbench
from petool_lite.data.entries import DISLIKED, LIKED, NO_TOOL, USED, Accepted, Answer, Call, Entry, Interaction, Tool
from petool_lite.data.fields import Fault, arguments, call, get, json_text, json_values, kind_of, sound, text
from petool_lite.data.schema import parameters_schema

VERDICTS: dict[str, str | None] = {LIKED: LIKED, DISLIKED: DISLIKED, USED: None}
_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_SPEAKERS = {
    **{"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"},
    **{"function_call": "call", "tool_call": "call"},
    **{name: "tool" for name in ("observation", "tool", "tool_response", "function_response")},
}
_TAGGED = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_TOOLS = re.compile(r"<tools>(.*?)</tools>", re.DOTALL)


def read_tools(value: Any, where: str = "tools") -> tuple[Tool, ...]:
    """Tools from a list in OpenAI's, MCP's or PEToolBench's form, or from an MCP `tools/list` result. Raises Fault."""
    if isinstance(value, str):
        value = json_text(value, where, "a list of tools as JSON")
    if isinstance(value, Mapping) and isinstance(value.get("result"), Mapping):
        value, where = value["result"], f"{where}.result"
    if isinstance(value, Mapping) and "tools" in value:
        value, where = value["tools"], f"{where}.tools"
    if not isinstance(value, list):
        raise Fault(where, f"a list of tools, found {kind_of(value)}")
    tools: dict[str, Tool] = {}
    for index, item in enumerate(value):
        tool = _tool(item, f"{where}[{index}]")
        if tools.setdefault(tool.name, tool) is not tool:
            raise Fault(f"{where}[{index}]", f"tools of different names, found {tool.name} again")
    return tuple(tools.values())


def _tool(value: Any, where: str) -> Tool:
    if not isinstance(value, Mapping):
        raise Fault(where, f"a tool, found {kind_of(value)}")
    sound(value, where)
    if "tool_name" in value:
        if not (tool := petoolbench.read_tool(value, where)).name.strip():
            raise Fault(f"{where}.tool_name", "the tool's name, found an empty text")
        return tool
    spot, inner = where, value
    if "function" in value:
        spot, inner = f"{where}.function", get(value, "function", Mapping, where, "an object with name and parameters")
    name = get(inner, "name", str, spot, "the tool's name")
    if not name.strip():
        raise Fault(f"{spot}.name", "the tool's name, found an empty text")
    key = next((key for key in ("parameters", "inputSchema", "input_schema") if key in inner), "parameters")
    schema = inner.get(key)
    if isinstance(schema, str):
        schema = json_text(schema, f"{spot}.{key}", "a JSON Schema") if schema.strip() else None
    listed = schema.get("properties") if isinstance(schema, Mapping) else None
    for item, path, told in ((schema, key, "a JSON Schema of an object"),
                             (listed, f"{key}.properties", "an object of schemas")):  # fmt: skip
        if item not in (None, []) and not isinstance(item, Mapping):
            raise Fault(f"{spot}.{path}", f"{told}, found {kind_of(item)}")
    owner, about = inner.get("provider") or value.get("provider"), text(inner, "description", spot)
    return Tool(name, about, parameters_schema(schema), owner if isinstance(owner, str) else "")


def tool_json(tool: Tool) -> dict[str, Any]:
    """A tool in OpenAI's form; `provider` is there where it was declared."""
    function = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
    return {"type": "function", "function": function | ({"provider": tool.provider} if tool.provider else {})}


def entry_messages(entry: Entry) -> list[dict[str, Any]]:
    """Everything before the answer as OpenAI messages: earlier calls with their verdicts, turns, the query."""
    found: list[dict[str, Any]] = []
    for number, item in enumerate(entry.history):
        if item.query:
            found.append({"role": "user", "content": item.query})
        found.append(_answer_message(item.call, f"h{number}"))
        found.append({"role": "tool", "tool_call_id": f"h{number}", "content": item.verdict or USED})
    found += [dict(turn) for turn in entry.turns]
    return found + ([{"role": "user", "content": entry.query}] if entry.query or not entry.turns else [])


def _answer_message(answer: Answer, identity: str) -> dict[str, Any]:
    told = {"tool_calls": [_call_json(answer, identity)]} if isinstance(answer, Call) else {"content": answer}
    return {"role": "assistant", **told}


def _call_json(made: Call, identity: str) -> dict[str, Any]:
    function = {"name": made.name, "arguments": json.dumps(dict(made.arguments), ensure_ascii=False)}
    return {"id": identity, "type": "function", "function": function}


def learned_turns(entry: Entry) -> tuple[dict[str, Any], ...]:
    """An entry's request and its answer as turns of a longer conversation, the answer to be learned."""
    assert entry.answer is not None
    asked = {"role": "user", "content": entry.query}
    return asked, {"content": "", **_answer_message(entry.answer, ""), "weight": 1}


def entry_line(entry: Entry) -> dict[str, Any]:
    """An entry as an OpenAI fine-tuning line."""
    messages, wrong = entry_messages(entry), entry.rejected
    if entry.answer is not None:
        messages.append(_answer_message(entry.answer, "answer"))
    line: dict[str, Any] = {"messages": messages, "tools": [tool_json(tool) for tool in entry.tools]}
    line |= {"accept": [{entry.accepted.name: dict(entry.accepted.values)}]} if entry.accepted else {}
    line |= {} if wrong is None else {"rejected": _answer_message(wrong, "rejected")}
    return line | ({"kind": entry.kind} if entry.kind else {})


def conversation(messages: Sequence[Any], tools: Sequence[Tool], identity: str = "") -> Entry:
    """The entry that messages ask for, parted as petool.jinja does; the query is last, if a user's. Raises Fault."""
    plain = [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    history: list[Interaction] = []
    gone: set[int] = set()
    asked, made, answered = -1, -1, 0
    for index, message in enumerate(plain):
        role = message["role"]
        if role == "tool" and message["content"] in VERDICTS and made >= 0:
            calls = plain[made]["tool_calls"]
            named = [item for item in calls if item["id"] and item["id"] == message.get("tool_call_id")]
            chosen = (named or calls[answered : answered + 1] or calls[-1:])[0]["function"]
            done = Call(chosen["name"], arguments(chosen["arguments"], f"messages[{made}].tool_calls"))
            said = plain[asked]["content"] if asked >= 0 else ""
            history.append(Interaction(said, done, VERDICTS[message["content"]]))
            gone |= {index, made, asked}
            answered += 1
        elif role == "assistant" and message.get("tool_calls"):
            asked = index - 1 if index and plain[index - 1]["role"] == "user" else -1
            made, answered = index, 0
        elif role != "tool":
            made = -1
            if role == "assistant" and index - 1 in gone:  # a word of thanks for the verdict goes with it
                gone.add(index)
    turns = [message for index, message in enumerate(plain) if index not in gone]
    query = turns.pop()["content"] if turns and turns[-1]["role"] == "user" else ""
    return Entry(identity, query, tuple(tools), tuple(history), turns=tuple(turns))


def _message(value: Any, where: str) -> dict[str, Any]:
    """One message with its content as text and `function_call` as a call."""
    role = get(value, "role", str, where, f"one of {', '.join(_ROLES)}")
    if role not in _ROLES:
        raise Fault(f"{where}.role", f"one of {', '.join(_ROLES)}, found {role}")
    role = {"developer": "system", "function": "tool"}.get(role, role)
    if isinstance(content := value.get("content"), list):
        texts = []
        for index, part in enumerate(content):
            spot, part = f"{where}.content[{index}]", {"type": "text", "text": part} if isinstance(part, str) else part
            kind = part.get("type") if isinstance(part, Mapping) else kind_of(part)
            if kind not in ("text", "input_text", "output_text", "refusal"):
                raise Fault(spot, f"a part of type text, found {kind}")
            texts.append(text(part, "refusal" if kind == "refusal" else "text", spot))
        content = "\n".join(texts).lstrip("\n")  # as llama.cpp's server joins them
    elif content is not None:
        content = get(value, "content", str, where, "a text or a list of parts")
    found: dict[str, Any] = {"role": role, "content": content or ""}
    calls = value.get("tool_calls")
    if calls is None and value.get("function_call"):
        calls = [{"function": value["function_call"]}]
    if calls:
        calls = get({"tool_calls": calls}, "tool_calls", list, where, "a list of calls")
        found["tool_calls"] = made = []
        for index, item in enumerate(calls):
            spot, wrapped = f"{where}.tool_calls[{index}]", isinstance(item, Mapping) and "function" in item
            called = call(item["function"] if wrapped else item, f"{spot}.function" if wrapped else spot)
            made.append(_call_json(called, item["id"] if isinstance(item.get("id"), str) else ""))
    if isinstance(identity := value.get("tool_call_id"), str):
        found["tool_call_id"] = identity
    return found | ({"weight": 1} if role == "assistant" and value.get("weight") == 1 else {})


def is_row(row: Mapping[str, Any]) -> bool:
    """Whether a row is a line of one of the forms read here."""
    return any(key in row for key in ("messages", "conversations")) or {"query", "tools", "answers"} <= row.keys()


def parse(row: Mapping[str, Any], identity: str) -> Entry:
    """One line of any of the forms, with exactly one answer: a call or a text. Raises Fault."""
    identity = str(sound(row.get("entry_id", row.get("id", identity)), "id"))
    if "messages" in row:
        messages, listed = get(row, "messages", list, "", "a list of messages"), row.get("tools", row.get("functions"))
    elif "conversations" in row:
        messages, listed = _spoken(row)
    else:
        made, listed = row["answers"], row["tools"]
        made = json_text(made, "answers", "a list of calls as JSON") if isinstance(made, str) else made
        if not isinstance(made, list) or not made:
            raise Fault("answers", f"a list of one call, found {kind_of(made) if made else 'none'}")
        answered = {"role": "assistant", "tool_calls": [{"function": item} for item in made]}
        messages = [{"role": "user", "content": get(row, "query", str, "", "a text")}, answered]
    tools = read_tools([] if listed is None else listed)
    if not messages:
        raise Fault("messages", "a query and an answer, found none")
    *before, last = messages
    accepted = _accepted(row.get("accept"), tools)
    if isinstance(last, Mapping) and last.get("role") == "assistant":
        answer = _answer(last, f"messages[{len(before)}]")
    elif "accept" in row:  # a test that lists what may be answered
        # the first of the right values, without what may be left out
        before, answer = messages, Call(accepted.name, _first(accepted.values)) if accepted else NO_TOOL
    else:
        raise Fault(f"messages[{len(before)}]", "an assistant's answer at the end")
    entry = conversation(before, tools, identity)
    if not entry.query and (not entry.turns or entry.turns[-1]["role"] == "user"):
        raise Fault("messages", "a user's message before the answer")
    rejected = None if row.get("rejected") is None else _answer(row["rejected"], "rejected")
    kind = row.get("kind") if isinstance(row.get("kind"), str) else None
    return replace(entry, answer=answer, rejected=rejected, accepted=accepted, kind=kind)


def _accepted(value: Any, tools: Sequence[Tool]) -> Accepted | None:
    """The one right call of `accept`, None for none; the offered name may have _ for its dots. Raises Fault."""
    if value is None or value == []:
        return None
    if not isinstance(value, list) or len(value) != 1:
        raise Fault("accept", f"one right call, found {len(value) if isinstance(value, list) else kind_of(value)}")
    if not isinstance(value[0], Mapping) or len(value[0]) != 1:
        raise Fault("accept[0]", "one tool's name with what is right for each parameter")
    ((name, values),) = value[0].items()
    if not isinstance(values, Mapping) or not all(isinstance(right, list) and right for right in values.values()):
        raise Fault(f"accept[0].{name}", "a list of right values for each parameter")
    offered = [tool.name for tool in tools if tool.name in (name, name.replace(".", "_"))]
    if not offered:
        raise Fault(f"accept[0].{name}", "the name of an offered tool")
    return Accepted(name if name in offered else offered[0], dict(values))


def _first(value: Any) -> Any:
    if isinstance(value, Mapping):
        lists = {name: right for name, right in value.items() if isinstance(right, list) and right and "" not in right}
        return {name: _first(right[0]) for name, right in lists.items()}
    return [_first(item) for item in value] if isinstance(value, list) else value


def _answer(value: Any, where: str) -> Answer:
    """The answer in an assistant's message. Raises Fault."""
    message = _message(value, where)
    calls = message.get("tool_calls") or []
    if len(calls) > 1:
        raise Fault(f"{where}.tool_calls", f"one call, found {len(calls)}")
    if calls:
        made = calls[0]["function"]
        return Call(made["name"], arguments(made["arguments"], f"{where}.tool_calls[0].function.arguments"))
    if not message["content"].strip():
        raise Fault(where, "a call or a text, found neither")
    return str(message["content"])


def _spoken(row: Mapping[str, Any]) -> tuple[list[dict[str, Any]], Any]:
    turns = get(row, "conversations", list, "", "a list of turns")
    listed: Any = row.get("tools")
    messages: list[dict[str, Any]] = []
    for index, turn in enumerate(turns):
        where = f"conversations[{index}]"
        who = turn.get("from", turn.get("role")) if isinstance(turn, Mapping) else None
        if who not in _SPEAKERS:
            raise Fault(f"{where}.from", f"one of {', '.join(_SPEAKERS)}, found {who}")
        said = get(turn, "value" if "value" in turn else "content", str, where, "a text")
        role = _SPEAKERS[who]
        if role == "system" and (declared := _TOOLS.search(said[: said.rfind("</tools>") + 8])):
            listed = listed or _values(declared[1], where)
            continue
        tagged = said[: said.rfind("</tool_call>") + 12]  # so that every start has an end
        blocks = [said] if role == "call" else _TAGGED.findall(tagged) if role == "assistant" else []
        calls = [{"function": made} for block in blocks for made in _values(block, where)]
        told = {"content": None, "tool_calls": calls} if calls else {"content": said}
        messages.append({"role": "assistant" if role == "call" else role, **told})
    return messages, listed


def _values(said: str, where: str) -> list[Any]:
    """JSON values one after the other, those of lists one by one. Raises Fault."""
    try:
        found = [value for _, _, value in json_values(said)]
    except (ValueError, RecursionError) as error:
        raise Fault(where, f"JSON ({error})") from error
    return [item for value in found for item in (value if isinstance(value, list) else [value])]
