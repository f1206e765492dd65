"""The types that everything speaks and every form is read into (`petoolbench`, `openai`); no file is touched here."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from petool_lite.data import SETTINGS
from petool_lite.errors import USAGE, PetoolError

LIKED, DISLIKED = "liked", "disliked"
USED = "used"  # how a call without a verdict stands in a conversation
NO_TOOL = "No tool fits."
_DEEPEST = 32  # nesting of arguments and schemas; the published ones have 3 levels


@dataclass(frozen=True)
class Tool:
    """A tool that may be called; `parameters` is a JSON Schema of an object, `provider` who offers it, if declared."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    provider: str = ""


@dataclass(frozen=True)
class Call:
    """A call of one tool."""

    name: str
    arguments: Mapping[str, Any]

    def to_json(self) -> str:
        """The call on one line: {"name": ..., "arguments": {...}}."""
        return json.dumps({"name": self.name, "arguments": dict(self.arguments)}, ensure_ascii=False)


@dataclass(frozen=True)
class Interaction:
    """One earlier call of the user: what was asked, what was called, and LIKED, DISLIKED or None for plain use."""

    query: str
    call: Call
    verdict: str | None


Answer = Call | str  # a text is an answer, too: no tool fits


@dataclass(frozen=True)
class Accepted:
    """What a test accepts as the right call: the tool's name and, for each parameter, the values that are right. ""
    among them says that the parameter may be left out. An object's own members have lists of right values, too."""

    name: str
    values: Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Published:
    """A published PEToolBench prompt, cut around its two arrays; their items are texts, in the entry's own order."""

    head: str
    history: tuple[str, ...]
    middle: str
    tools: tuple[str, ...]
    tail: str


@dataclass(frozen=True)
class Entry:
    """One request of a user. `turns` are messages before the query that are no earlier calls with a verdict,
    `equal_tools` the other tools that do what the right one does (None: not told), `rejected` is a preference row's
    wrong answer; `published` and `setting` are of PEToolBench, `accepted` and `kind` (a word of its own) of tests."""

    id: str
    query: str
    tools: tuple[Tool, ...]
    history: tuple[Interaction, ...] = ()
    answer: Answer | None = None
    turns: tuple[Mapping[str, Any], ...] = ()
    function: str | None = None
    equal_tools: tuple[str, ...] | None = None
    rejected: Answer | None = None
    published: Published | None = None
    setting: str | None = None
    accepted: Accepted | None = None
    kind: str | None = None


def check_setting(setting: str) -> None:
    """Raise PetoolError for a word that is none of SETTINGS."""
    if setting not in SETTINGS:
        raise PetoolError(f"unknown setting: {setting}", f"one of: {', '.join(SETTINGS)}", USAGE)


def properties(tool: Tool) -> Mapping[str, Any]:
    """The schemas of a tool's parameters by name; none where the declaration has another form."""
    found = tool.parameters.get("properties")
    return found if isinstance(found, Mapping) else {}


def required(tool: Tool) -> tuple[str, ...]:
    """The names of the parameters that a call must have."""
    found = tool.parameters.get("required")
    return tuple(name for name in found if isinstance(name, str)) if isinstance(found, list | tuple) else ()


def namespace(name: str, shared: Iterable[str] = ()) -> str:
    """Who offers a tool, by its name, as petool.jinja reads it: `<category>.<provider>.<api>`, `mcp__server__tool`,
    `server__tool`, `server.tool`, `server/tool`, and `server_tool` for prefixes in `shared`; else the name itself."""
    if name.startswith("<") and name.count(">.<") >= 2:
        return name.split(">.<")[1]
    if name.startswith("mcp__"):
        return name.split("__")[1]
    head = name.partition("_")[0]
    joints = ("__", ".", "/", *(["_"] if head in shared else []))
    return next((name.split(joint)[0] for joint in joints if joint in name), name)


def providers(entry: Entry) -> dict[str, str]:
    """The provider of every tool in an entry. What several offered ones have before `_` is one, if no name tells."""
    plain = {tool.name for tool in entry.tools if "_" in tool.name and namespace(tool.name) == tool.name}
    shared = {prefix for prefix, count in Counter(name.split("_")[0] for name in plain).items() if count > 1}
    found = {item.call.name: namespace(item.call.name, shared) for item in entry.history}
    return found | {tool.name: tool.provider or namespace(tool.name, shared) for tool in entry.tools}


def balance(entry: Entry, name: str) -> int:
    """Likes minus dislikes of the calls of the provider of tool `name`; a call without a verdict counts as liked."""
    known = providers(entry)
    own = known[name]
    return sum(-1 if item.verdict == DISLIKED else 1 for item in entry.history if known[item.call.name] == own)


def bearing(entry: Entry) -> list[int]:
    """Which earlier calls, as indices, are of a provider of the offered tools."""
    known = providers(entry)
    offered = {known[tool.name] for tool in entry.tools}
    return [index for index, item in enumerate(entry.history) if known[item.call.name] in offered]


def api_name(tool_name: str) -> str:
    """What a tool is called beside its provider."""
    return tool_name.split(">.<")[-1].rstrip(">") if tool_name.startswith("<") else re.split(r"__|[./]", tool_name)[-1]


def name_words(tool_name: str) -> frozenset[str]:
    """The words of what a tool is called beside its provider, camel case cut; the name where it has no word."""
    api = api_name(tool_name)
    return words(api) or frozenset([api])


def word_list(name: str) -> list[str]:
    """The lower-case words of what a tool or a parameter is called, in their order."""
    found = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+|[^\W\d_a-zA-Z]+", api_name(name))
    return [word.lower() for word in found] or ["tool"]


def words(text: str) -> frozenset[str]:
    """The words of a text in lower case, also those inside names such as getWeather_today."""
    return frozenset(re.findall(r"[^\W_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text).lower()))


def nested_beyond(value: Any, levels: int = _DEEPEST) -> bool:
    """Whether dicts and lists in `value` are nested more than `levels` deep; deep ones cannot be written as JSON."""
    level: Sequence[Any] = [value]
    for _ in range(levels):
        inside = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level = [item for items in inside for item in items]
    return bool(level)
