"""Training entries that ask for another job than the file's own requests: more functions than those cover.

The user, the providers and what the user thinks of them come from a real entry; the job comes from another tool of the
file. The right tool and its equals become that job's tool under their own providers, so the label follows from the
history as before. The query is one that the file has for the job, or written from the tool's description and made-up
values of its parameters.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from random import Random
from typing import Any

from petool_lite.data.entries import Entry, Parameter, Tool, ToolCall, provider
from petool_lite.data.rename import respelled
from petool_lite.data.splits import api_words, function_words
from petool_lite.data.spoken import spoken
from petool_lite.data.wording import split

_MOST_WORDS = 24  # of a description that becomes a query
_RENAMED = 0.4  # share of made requests whose tool has parameters under other names
_FILLERS = frozenset("the for and are from with that this which you your can will default value purpose".split())  # noqa: SIM905
_FILLERS |= frozenset("one following field returned must should only not used optional required example".split())  # noqa: SIM905
_REAL = 0.5  # share of requests taken from the file where it has some for the job
_LEADS = re.compile(
    r"^(this|the) (endpoint|api|call|operation|method|function)( is used to| allows you to| lets you| will| can)? ",
    re.IGNORECASE,
)
_THIRD_PERSON = {"gets": "get", "fetches": "fetch", "lists": "list", "searches": "search", "finds": "find"}
_TO_GET = ("returns", "return", "provides", "provide", "retrieves", "gives", "shows", "displays", "grabs", "retuns")
_VERBS = frozenset(
    [
        "get",
        "fetch",
        "list",
        "search",
        "find",
        "retrieve",
        "show",
        "check",
        "create",
        "delete",
        "update",
        "add",
        "remove",
        "convert",
        "generate",
        "send",
        "download",
        "upload",
        "calculate",
        "compute",
        "translate",
        "validate",
        "verify",
        "query",
        "know",
        "see",
        "look",
        "read",
        "detect",
        "analyze",
        "extract",
        "log",
    ]
)
_ASKED = ("I want to {}", "I want to {}", "I want to {}", "I need to {}", "{}", "Please {}", "Can you {}?", "to {}")


@dataclass(frozen=True)
class Job:
    """A tool that can be asked for, its JSON text, and the requests with parameters that the file has for it."""

    tool: Tool
    text: str
    requests: tuple[tuple[str, Mapping[str, Any]], ...] = ()


@dataclass(frozen=True)
class Material:
    """What described entries are made of: jobs, and string values that real requests named.

    `varied`: parameters may have other names than the tool's own, and requests write values in their own way.
    """

    jobs: Sequence[Job]
    values: Sequence[str]
    varied: bool = False


def material(
    entries: Sequence[Entry], setting: str, offered: Mapping[str, tuple[Tool, str]], barred: Collection[str]
) -> Material:
    """Every tool that some entry offers (`offered`: by name, with its text) or some user has called, but for those
    whose `function_words` are in `barred`; a tool that is only called declares what its calls give."""
    requests: dict[str, dict[str, ToolCall]] = {}
    values = set()
    for entry in entries:
        calls = [(item.instruction, item.call) for item in entry.prompt(setting).history]
        if entry.gold is not None:
            calls.append((entry.query, entry.gold))
        for query, call in calls:
            requests.setdefault(call.tool_name, {}).setdefault(query, call)
            named = (value for value in call.parameters.values() if isinstance(value, str))
            values |= {value for value in named if len(value) > 1 and value in query}
    jobs = []
    for name in sorted(offered.keys() | requests.keys()):
        if function_words(name) in barred:
            continue
        known = tuple((query, call.parameters) for query, call in sorted(requests.get(name, {}).items()))
        tool, text = offered.get(name) or _called(name, [parameters for _, parameters in known])
        jobs.append(Job(tool, text, known))
    return Material(jobs, sorted(values))


def _called(name: str, calls: Sequence[Mapping[str, Any]]) -> tuple[Tool, str]:
    """A tool known by its calls alone: what every call gives is required, anything else optional."""
    kinds = {bool: "BOOLEAN", int: "NUMBER", float: "NUMBER", str: "STRING", list: "ARRAY", dict: "OBJECT"}
    given = {key: value for call in calls for key, value in call.items()}
    made = [Parameter(key, kinds.get(type(value), "STRING"), "", "") for key, value in given.items()]
    required = tuple(item for item in made if all(item.name in call for call in calls))
    tool = Tool(name, "", required, tuple(item for item in made if item not in required))
    text = {
        "tool_name": name,
        "tool_description": "",
        "required_parameters": [asdict(item) for item in tool.required],
        "optional_parameters": [asdict(item) for item in tool.optional],
    }
    return tool, json.dumps(text, ensure_ascii=False)


def described(entry: Entry, setting: str, source: Material, rng: Random) -> Entry | None:
    """`entry` with another job in place of its own; None where a draw does not fit.

    Some of the other candidates are exchanged too. The label is unchecked: see `augment.training_fault`.
    """
    if entry.gold is None:
        return None
    prompt = entry.prompt(setting)
    gold, job = entry.gold.tool_name, rng.choice(source.jobs)
    if source.varied and rng.random() < _RENAMED:
        job = _otherwise_named(job, rng)
    family = {gold, *(entry.equal_tools or ())}
    if entry.equal_tools is None:
        family |= {tool.name for tool in prompt.tools if function_words(tool.name) == function_words(gold)}
    # sorted: the order of a set differs from process to process, and each takes its random numbers in turn
    made = {name: _as_offered_by(name, job, rng) for name in sorted(family)}
    kept: list[tuple[Tool, str]] = []
    used = {provider(item.call.tool_name) for item in prompt.history}
    for tool, text in zip(prompt.tools, prompt.tool_texts, strict=True):
        other = rng.choice(source.jobs) if rng.random() < 0.5 and provider(tool.name) not in used else Job(tool, text)
        kept.append(made[tool.name] if tool.name in family else (other.tool, other.text))
    names = [tool.name for tool, _ in kept]
    words_of_job = api_words(job.tool.name)
    strangers = [tool for tool, _ in kept if tool.name not in {tool.name for tool, _ in made.values()}]
    if len(set(names)) < len(names) or any(api_words(tool.name) == words_of_job for tool in strangers):
        return None
    said = job.requests and rng.random() < _REAL
    asked = rng.choice(job.requests) if said else _request(made[gold][0], source, rng)
    if asked is None:
        return None
    query, parameters = asked
    history = [item for item in prompt.history if item.call.tool_name not in names]
    return Entry(
        id=entry.id,
        query=query,
        prompts={setting: prompt.with_history(history).with_tools(kept)},
        gold=ToolCall(made[gold][0].name, parameters),
        function=f"described {function_words(job.tool.name)}",
        equal_tools=tuple(
            made[name][0].name for name in sorted(family) if name != gold and name in {t.name for t in prompt.tools}
        ),
    )


def _otherwise_named(job: Job, rng: Random) -> Job:
    """The job with some parameters named by words of their descriptions, so that names alone do not tell what is meant.

    Providers name alike things differently: "The page index for paging purpose" is `page` here and `number` there.
    """
    tool = job.tool
    names = {item.name: item.name for item in (*tool.required, *tool.optional)}
    for item in (*tool.required, *tool.optional):
        fresh = _name_from(item, rng) if rng.random() < 0.5 else None
        if fresh is not None and fresh.lower() not in {name.lower() for name in names.values()}:
            names[item.name] = fresh
    value = json.loads(job.text)
    for key in ("required_parameters", "optional_parameters"):
        value[key] = [{**item, "name": names.get(item["name"], item["name"])} for item in value.get(key) or ()]
    renamed_tool = replace(
        tool,
        required=tuple(replace(item, name=names[item.name]) for item in tool.required),
        optional=tuple(replace(item, name=names[item.name]) for item in tool.optional),
    )
    requests = tuple(
        (query, {names.get(key, key): given for key, given in parameters.items()}) for query, parameters in job.requests
    )
    return Job(renamed_tool, json.dumps(value, ensure_ascii=False), requests)


def _name_from(item: Parameter, rng: Random) -> str | None:
    """One or two words of the description, joined as apis do; None for a description that says too little."""
    words = [word.lower() for word in re.findall(r"[A-Za-z]{3,12}", item.description[:60])]
    words = [word for word in words if word not in _FILLERS]
    if len(words) < 2:
        return None
    place = rng.randrange(len(words))
    taken = words[place : place + rng.choice((1, 1, 2))]
    return rng.choice(("_".join(taken), taken[0] + "".join(word.capitalize() for word in taken[1:])))


def _as_offered_by(name: str, job: Job, rng: Random) -> tuple[Tool, str]:
    """The job's tool under the provider of tool `name`, its api spelled anew and its description whole or not."""
    tool, text = job.tool, job.text
    category, api = tool.name.split(">.<")[0], tool.name.split(">.<")[-1].rstrip(">")
    fresh = f"{category}>.<{provider(name)}>.<{respelled(api, rng) if rng.random() < 0.5 else api}>"
    description = tool.description
    if rng.random() < 0.25:
        description = " ".join(sorted(sorted(api_words(tool.name)), key=api.lower().find)).capitalize() + "."
    value = {**json.loads(text), "tool_name": fresh, "tool_description": description}
    return replace(tool, name=fresh, description=description), json.dumps(value, ensure_ascii=False)


def _request(tool: Tool, source: Material, rng: Random) -> tuple[str, dict[str, Any]] | None:
    """A query for the tool and the parameters it asks for; None where it would need an uncommon type or be too long."""
    said: list[str] = []
    parameters: dict[str, Any] = {}
    wanted = [(item, True) for item in tool.required] + [(item, False) for item in tool.optional]
    for item, required in wanted:
        if not required and len(said) > 3:
            continue
        found = spoken(item, required, source.values, rng, source.varied)
        if found is None:
            if required:
                return None
            continue
        parameters[item.name] = found.value
        if found.words:
            said.append(found.words)
    if len(said) > 6:
        return None
    rng.shuffle(said)
    joined = (
        rng.choice((" and ", ", ", " ")).join(said[:-1]) + rng.choice((" and ", ", and ", ", ")) + said[-1]
        if len(said) > 1
        else "".join(said)
    )
    asked = rng.choice(_ASKED).format(f"{_task(tool, rng)} {joined}".strip())
    asked = asked[0].upper() + asked[1:]
    return (asked if asked.endswith("?") or rng.random() < 0.2 else asked + "."), parameters


def _task(tool: Tool, rng: Random) -> str:
    """What the tool does, to stand after "I want to": from its description, or from its name where that says more."""
    api = tool.name.split(">.<")[-1].rstrip(">")
    sentence = re.split(r"(?<=[a-z0-9)])\. |\n|  ", tool.description.strip())[0].strip(" .#*_-")
    if not 2 < len(sentence.split()) <= _MOST_WORDS or rng.random() < 0.15:
        sentence = " ".join(split(api))
    sentence = _LEADS.sub("", sentence)
    first, _, rest = sentence.partition(" ")
    plain = first.lower().strip(",.:")
    if plain in _TO_GET:
        return f"{rng.choice(('get', 'know', 'retrieve'))} {rest}"
    if plain in _THIRD_PERSON or plain in _VERBS:
        return f"{_THIRD_PERSON.get(plain, plain)} {rest}".strip()
    return f"{rng.choice(('get', 'know', 'see'))} {first.lower() if first.istitle() else first} {rest}".strip()
