"""The compact prompt: petool-lite's own layout of what the published prompt says, in a fraction of the tokens.

Only the history that bears on the candidates is kept, by name: calls of a candidate's provider, and calls whose words
are close to a candidate's. Candidates for the same job stand together (see `jobs`), the job on which the user's
likes decide first; each carries the verdict on its provider, so the model need not count. Fixed text comes first, then
what changes with the query: the query itself and, in full once more, the candidate that history and query speak for.
"""

import json
import re
from collections.abc import Sequence

from petool_lite.data.entries import Interaction, Parameter, Prompt, Tool, provider
from petool_lite.data.jobs import jobs, likeliest, standing
from petool_lite.data.splits import api_words
from petool_lite.data.values import drafted

_HEAD = (
    "Call the one tool that does what the user asks and that this user prefers.\n"
    'Reply with one line: {"tool_name": ..., "parameters": {...}}\n'
)
_LEGEND = {
    "rating": "Earlier calls, + liked, - disliked:",
    "preferred": "Earlier calls, all liked:",
    "chronological": "Earlier calls, the latest liked most:",
}
_CLOSE = 0.5  # share of a candidate's words that a call must have to count as functionally close
_LISTED = 150  # characters of a description in the list of candidates
_LONGEST = 400  # and where a tool stands in full; what follows in the data is examples and lists of allowed values


def compact_prompt(prompt: Prompt, setting: str, kept: Sequence[Interaction] | None = None) -> str:
    """The system message for `prompt`; `kept` replaces its history where some had to go for length."""
    related = related_history(prompt) if kept is None else kept
    calls = [f"{_mark(item)} {item.call.tool_name}" for item in related] or ["none that bears on these tools"]
    lines = [_LEGEND[setting], *calls, "Tools, those for the same job together:"]
    for number, job in enumerate(jobs(prompt, setting), 1):
        lines.append(f"job {number}")
        lines += [_tool(tool, prompt, setting) for tool in job.tools]
    return _HEAD + "\n".join(lines)


def compact_query(prompt: Prompt, query: str, setting: str) -> str:
    """The user message: the query, the candidate that `likeliest` finds, and the values that the query states for it.

    The model need not search for them, and decides. They stand close to the answer on purpose: a small model copies
    better over a short distance.
    """
    tool = likeliest(prompt, query, setting)
    stated = json.dumps(drafted(tool, query), ensure_ascii=False)
    return f"{query}\nLikely: {_tool(tool, prompt, setting, in_full=True)}\nStated: {stated}"


def related_history(prompt: Prompt) -> tuple[Interaction, ...]:
    """The interactions that bear on the candidates, in their order."""
    providers = {provider(tool.name) for tool in prompt.tools}
    words = [api_words(tool.name) for tool in prompt.tools]

    def bears(item: Interaction) -> bool:
        if provider(item.call.tool_name) in providers:
            return True
        own = api_words(item.call.tool_name)
        return any(len(own & other) >= _CLOSE * len(other) for other in words)

    return tuple(item for item in prompt.history if bears(item))


def shortened(prompt: Prompt) -> int:
    """How many descriptions of the candidates the compact prompt cuts in its list, each marked with "..."."""
    return sum(len(" ".join(tool.description.split())) > _LISTED for tool in prompt.tools)


def _mark(item: Interaction) -> str:
    return {1: "+", 0: "-", None: "*"}[item.rating]


def _tool(tool: Tool, prompt: Prompt, setting: str, in_full: bool = False) -> str:
    # What the user thinks and what the tool does come before its name: a causal model that copies the name can then
    # read both from the name's own tokens. A parameter has its type and default only where the tool stands in full.
    parameters = [(item, "!") for item in tool.required] + [(item, "?") for item in tool.optional]
    said = [_parameter(item, mark) if in_full else item.name + mark for item, mark in parameters]
    about = _short(tool.description, _LONGEST if in_full else _LISTED) or "-"
    return f"{_verdict(tool, prompt, setting)} | {about} | {tool.name} | {'; '.join(said) or '-'}"


def _verdict(tool: Tool, prompt: Prompt, setting: str) -> str:
    """What the history says of a candidate's provider, as one word and the counts behind it."""
    used = [index for index, item in enumerate(prompt.history) if provider(item.call.tool_name) == provider(tool.name)]
    if not used:
        return "unknown"
    ratings = [prompt.history[index].rating for index in used]
    if None in ratings:
        left = "left, " if standing(prompt, tool.name, setting) < 0 else ""
        return f"{left}used {len(used)}, {len(prompt.history) - used[-1]} back"
    likes, dislikes = ratings.count(1), ratings.count(0)
    word = "liked" if likes > dislikes else "disliked" if likes < dislikes else "mixed"
    return f"{word} +{likes}-{dislikes}"


def _parameter(parameter: Parameter, mark: str) -> str:
    default = "" if parameter.default in ("", None) else f"={_default(parameter)}"
    about = _short(parameter.description, _LONGEST)
    return f"{parameter.name}{mark} {parameter.type}{default}" + (f": {about}" if about else "")


def _short(text: str, longest: int) -> str:
    """A description on one line of at most `longest` characters, cut with "..." after a whole word."""
    line = " ".join(text.split())
    return line if len(line) <= longest else re.sub(r"\s+\S*$", "", line[:longest]) + "..."


def _default(parameter: Parameter) -> str:
    """The default as it would stand in a call: the data writes every one as text, also of numbers and booleans."""
    if isinstance(parameter.default, str) and parameter.type.upper() in ("NUMBER", "BOOLEAN"):
        try:
            value = json.loads(parameter.default.lower())
        except ValueError:
            value = None
        if isinstance(value, (bool, int, float)):
            return json.dumps(value)
    return json.dumps(parameter.default, ensure_ascii=False)
