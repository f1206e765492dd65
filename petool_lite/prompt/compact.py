"""The compact prompt: petool-lite's own layout of what the published prompt says, in a fraction of the tokens.

It states facts and suggests nothing. Of the history only what bears on the candidates is kept, by name: calls of a
candidate's provider, and calls whose words are close to a candidate's. Each candidate carries the ratings of its
provider, so the model need not count. The query comes last, so one user's prompt is the same up to there.
"""

import json
import re
from collections.abc import Sequence

from petool_lite.data.entries import Interaction, Parameter, Prompt, Tool, call_default, provider
from petool_lite.data.splits import api_words

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
_LONGEST = 400  # characters of a description; what follows in the data is examples and lists of allowed values


def compact_prompt(prompt: Prompt, setting: str, kept: Sequence[Interaction] | None = None) -> str:
    """The system message for `prompt`; `kept` replaces its history where some had to go for length."""
    related = related_history(prompt) if kept is None else kept
    calls = [f"{_sign(item)} {item.call.tool_name}" for item in related] or ["none that bears on these tools"]
    tools = [_tool(tool, prompt) for tool in prompt.tools]
    return _HEAD + "\n".join([_LEGEND[setting], *calls, "Tools:", *tools])


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
    """How many descriptions of the candidates the compact prompt cuts, each marked with "..."."""
    return sum(len(" ".join(tool.description.split())) > _LONGEST for tool in prompt.tools)


def _sign(item: Interaction) -> str:
    return {1: "+", 0: "-", None: "*"}[item.rating]


def _tool(tool: Tool, prompt: Prompt) -> str:
    # What the user thinks and what the tool does come before its name: a causal model that copies the name can then
    # read both from the name's own tokens.
    parameters = [_parameter(item, "!") for item in tool.required] + [_parameter(item, "?") for item in tool.optional]
    about = _short(tool.description) or "-"
    return f"{_verdict(tool, prompt)} | {about} | {tool.name} | {'; '.join(parameters) or '-'}"


def _verdict(tool: Tool, prompt: Prompt) -> str:
    """What the history says of a candidate's provider, as one word and the counts behind it."""
    used = [index for index, item in enumerate(prompt.history) if provider(item.call.tool_name) == provider(tool.name)]
    if not used:
        return "unknown"
    ratings = [prompt.history[index].rating for index in used]
    if None in ratings:
        return f"used {len(used)}, {len(prompt.history) - used[-1]} back"
    likes, dislikes = ratings.count(1), ratings.count(0)
    word = "liked" if likes > dislikes else "disliked" if likes < dislikes else "mixed"
    return f"{word} +{likes}-{dislikes}"


def _parameter(parameter: Parameter, mark: str) -> str:
    default = "" if parameter.default in ("", None) else f"={json.dumps(call_default(parameter), ensure_ascii=False)}"
    about = _short(parameter.description)
    return f"{parameter.name}{mark} {parameter.type}{default}" + (f": {about}" if about else "")


def _short(text: str) -> str:
    """A description on one line of at most _LONGEST characters, cut with "..." after a whole word."""
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else re.sub(r"\s+\S*$", "", line[:_LONGEST]) + "..."
