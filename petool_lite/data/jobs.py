"""Which candidates do the same job, and which of those the user's history speaks for; from their texts alone.

Two candidates do the same job if their api names, descriptions and parameter names are alike. In the published rating
entries some candidate for the asked job is always disliked, and often the history knows no other for it: the user
then wants the one that is most like it, from somebody else. `likeliest` says which, with the query's help.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import log

from petool_lite.data.entries import Prompt, Tool, balance, provider
from petool_lite.data.wording import stem

_ALIKE = 0.6  # likeness from which on two tools do the same job: 100 % of the listed equals of the open entries
_SAME = 0.9  # and from which on they are the same but for a word
_TELLING = 4  # characters from which on a default in a query is no accident
_WEIGHTS = (0.5, 0.35, 0.15)  # of api words, description words and parameter names
_PROVIDER = 0.1  # among equals, for a provider of a similar name: services of one family resemble each other most
_LIKENESS = (
    12  # what likeness to a disliked candidate weighs in `likeliest` against each other sign; 8 to 16 differ by 1 %
)
# words that say nothing of a job
_LIGHT = frozenset("get list return data info information endpoint api v1 v2".split())  # noqa: SIM905
_LIGHT |= frozenset("all the a an of for by to and in with from this that is are on it".split())  # noqa: SIM905


@dataclass(frozen=True)
class Job:
    """Candidates for one job, the one to prefer first; `decided` where the history tells them apart."""

    tools: tuple[Tool, ...]
    decided: bool


@dataclass(frozen=True)
class _Traits:
    api: frozenset[str]
    about: frozenset[str]
    parameters: frozenset[str]
    provider: frozenset[str]
    asked: frozenset[str]  # words of the parameters' names and descriptions


def standing(prompt: Prompt, name: str, setting: str) -> int:
    """How the history speaks for the provider of tool `name`: above 0 for it, below 0 against it, 0 if it never occurs.

    Likes minus dislikes, or the number of calls where there are no ratings. In the chronological setting a provider
    last called in the first third of the history was left for another: that counts against it.
    """
    if setting != "chronological":
        return balance(prompt.history, name)
    own = provider(name)
    used = [index for index, item in enumerate(prompt.history) if provider(item.call.tool_name) == own]
    return 0 if not used else 1 if 3 * (used[-1] + 1) > len(prompt.history) else -1


def jobs(prompt: Prompt, setting: str) -> list[Job]:
    """The candidates of a prompt by job: decided jobs first, otherwise in the order of the prompt.

    Within a decided job the provider of the best standing comes first; among equals the tool most like the least
    liked. A tool belongs to a job if it is alike enough to one tool of it.
    """
    tools = prompt.tools
    traits = [_traits(tool) for tool in tools]
    scores = [standing(prompt, tool.name, setting) for tool in tools]
    made = []
    for members in _clusters(traits):
        worst = min(scores[index] for index in members)
        decided = any(scores[index] > worst for index in members)
        if decided:
            low = [traits[index] for index in members if scores[index] == worst]
            members = sorted(members, key=lambda index: (-scores[index], -_nearness(traits[index], low)))
        made.append(Job(tuple(tools[index] for index in members), decided))
    return sorted(made, key=lambda job: not job.decided)


def likeliest(prompt: Prompt, query: str, setting: str) -> Tool:
    """The candidate that history and query speak for together; the first of equals.

    A disliked candidate tells the job, and the one most like it from another provider is wanted; between near equals
    decide, each with the same weight: a liked provider, how much of the query stands in the api's name, in name and
    description, and in the parameters, a default that the query repeats, and a provider of the disliked one's family.
    Where nothing is disliked, a preference is between tools for the same job: how like another provider's tool a
    candidate is takes the place of its likeness to a disliked one, and a liked provider counts as far as it is.
    """
    tools = prompt.tools
    scores = [standing(prompt, tool.name, setting) for tool in tools]
    traits = [_traits(tool) for tool in tools]
    low = [own for own, score in zip(traits, scores, strict=True) if score < 0]
    texts = ([own.api for own in traits], [own.api | own.about for own in traits], [own.asked for own in traits])
    words = _words(query) - _LIGHT
    covered = [_coverage(words, bags) for bags in texts]

    def told(index: int) -> float:
        return sum(shares[index] for shares in covered) + _repeats(tools[index], query)

    def beside_disliked(index: int) -> float:
        own = traits[index]
        alike = [_likeness(own, other) for other in low]
        near = [other for other, likeness in zip(low, alike, strict=True) if likeness >= _ALIKE]
        family = max((_overlap(own.provider, other.provider) for other in near), default=0.0)
        return _LIKENESS * max(alike, default=0.0) + (scores[index] > 0) + family + told(index)

    def among_equals(index: int) -> float:
        own = traits[index]
        alike = max((_likeness(own, other) for other in traits if other.provider != own.provider), default=0.0)
        shared = 4 * alike + (alike >= _ALIKE) + 2 * (alike >= _SAME)
        about = own.api | own.about
        return shared + 2 * (scores[index] > 0) * alike + len(about & words) / max(1, len(about)) + told(index)

    wanted = [index for index, score in enumerate(scores) if score >= 0]
    return tools[max(wanted or range(len(tools)), key=beside_disliked if low else among_equals)]


def _repeats(tool: Tool, query: str) -> bool:
    """Whether the query has the default of one of the tool's parameters, of four characters or more."""
    said = query.lower()
    defaults = (str(item.default or "").strip().lower() for item in (*tool.required, *tool.optional))
    return any(len(default) >= _TELLING and default in said for default in defaults)


def _coverage(query: frozenset[str], bags: Sequence[frozenset[str]]) -> list[float]:
    """The share of the query's words that each bag holds, rare words weighing more; words that no bag holds are out."""
    known = [word for word in sorted(query) if any(word in bag for bag in bags)]
    weights = {word: log((len(bags) + 1) / (sum(word in bag for bag in bags) + 0.5)) for word in known}
    total = sum(weights.values())
    return [sum(weights[word] for word in known if word in bag) / total if total else 0.0 for bag in bags]


def _clusters(traits: Sequence[_Traits]) -> list[list[int]]:
    """Indices of tools linked by any chain of likenesses, ascending."""
    found: list[list[int]] = []
    for index, own in enumerate(traits):
        linked = [members for members in found if any(_likeness(own, traits[other]) >= _ALIKE for other in members)]
        found = [members for members in found if members not in linked]
        found.append(sorted([index, *(other for members in linked for other in members)]))
    return sorted(found)


def _traits(tool: Tool) -> _Traits:
    api = _words(tool.name.split(">.<")[-1])
    return _Traits(
        api=api - _LIGHT or api,
        about=_words(tool.description[:400]) - _LIGHT,
        parameters=frozenset(item.name.lower() for item in (*tool.required, *tool.optional)),
        provider=_words(provider(tool.name)),
        asked=frozenset().union(
            *(_words(f"{item.name} {item.description[:100]}") for item in (*tool.required, *tool.optional))
        ),
    )


def _words(text: str) -> frozenset[str]:
    """Lower-case words, camel case cut, a plural s taken off."""
    split = re.sub(r"([a-z])([A-Z])", r"\1 \2", text).lower()
    return frozenset(stem(word) for word in re.findall(r"[^\W_]+", split))


def _overlap(one: frozenset[str], other: frozenset[str]) -> float:
    """Shared words, as twice their number divided by that of all words (Dice); 0 where there are none."""
    return 2 * len(one & other) / max(1, len(one) + len(other))


def _likeness(one: _Traits, other: _Traits) -> float:
    """0 to 1: the weighted overlap of what both say of themselves."""
    pairs = [(_WEIGHTS[0], one.api, other.api)]
    if one.about and other.about:
        pairs.append((_WEIGHTS[1], one.about, other.about))
    if one.parameters or other.parameters:
        pairs.append((_WEIGHTS[2], one.parameters, other.parameters))
    return sum(weight * _overlap(first, second) for weight, first, second in pairs) / sum(pair[0] for pair in pairs)


def _nearness(own: _Traits, low: Sequence[_Traits]) -> float:
    return max(_likeness(own, other) + _PROVIDER * _overlap(own.provider, other.provider) for other in low)
