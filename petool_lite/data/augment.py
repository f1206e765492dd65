"""More training entries from the same ones, made only where the label stays certain.

Three kinds: the candidates in another order; the counterfactual user, who rates the other way round and so wants the
other provider; an earlier liked call turned into a request. In the published entries a user likes or dislikes a
provider as a whole, the right tool is never among the earlier calls, and no functionally equal tool comes from a
liked provider; the made entries keep to that.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random

from petool_lite.data.agreement import follows
from petool_lite.data.described import Material, described, material
from petool_lite.data.entries import Entry, Interaction, Parameter, Prompt, Tool, ToolCall, balance, provider
from petool_lite.data.rename import all_providers, renamed
from petool_lite.data.splits import api_words, function_words
from petool_lite.errors import PetoolError

_MADE = re.compile(r"\+(shuffle|swap|history|renamed|described)\d*$")
_RATING = re.compile(r'"rating"\s*:\s*([01])')
_JSON_TYPES: Mapping[str, tuple[type, ...]] = {"STRING": (str,), "ENUM": (str,), "NUMBER": (int, float), "BOOLEAN": ()}
Catalog = Mapping[str, "CatalogTool"]


@dataclass(frozen=True)
class CatalogTool:
    """A tool that some entry offers, and its JSON text there.

    `equal`: tools that an entry lists as doing the same function. `rivals`: other tools of the catalog that may do it,
    being listed so or of the same category and api words. `function`: as in an entry that has it as an answer.
    """

    tool: Tool
    text: str
    function: str | None
    equal: frozenset[str]
    rivals: tuple[str, ...]


def build_catalog(entries: Sequence[Entry], setting: str) -> dict[str, CatalogTool]:
    """Every candidate of `entries`, by name; the first text of a tool is kept."""
    families: dict[str, tuple[str | None, set[str]]] = {}
    alike: dict[str, set[str]] = {}
    texts: dict[str, tuple[Tool, str]] = {}
    for entry in entries:
        prompt = entry.prompt(setting)
        if any(tool.name not in texts for tool in prompt.tools):
            for tool, text in zip(prompt.tools, prompt.tool_texts, strict=True):
                texts.setdefault(tool.name, (tool, text))
        if entry.gold is not None:
            family = {entry.gold.tool_name, *(entry.equal_tools or ())}
            for name in family:
                families.setdefault(name, (entry.function, set()))[1].update(family)
    for name in texts:
        alike.setdefault(function_words(name), set()).add(name)
    catalog = {}
    for name, (tool, text) in texts.items():
        function, family = families.get(name, (None, set()))
        rivals = sorted((family | alike[function_words(name)]) & texts.keys() - {name})
        catalog[name] = CatalogTool(tool, text, function, frozenset(family - {name}), tuple(rivals))
    return catalog


def shuffled(entry: Entry, rng: Random) -> Entry:
    """The same entry with the candidates of every prompt in another order."""
    prompts = {}
    for setting, prompt in entry.prompts.items():
        pairs = list(zip(prompt.tools, prompt.tool_texts, strict=True))
        rng.shuffle(pairs)
        prompts[setting] = prompt.with_tools(pairs)
    return replace(entry, prompts=prompts)


def counterfactual(entry: Entry, rng: Random) -> Entry | None:
    """The user who rates the right tool's provider and that of an equal candidate the other way round; or None.

    Every rating of the two providers is inverted and the equal candidate becomes the answer, with the same parameters.
    Its own calls leave the history, as the published histories never hold the right tool. Only the rating prompt is
    kept: the histories of the others belong to the old answer. None where no equal candidate gives an entry without
    a `training_fault`, or where a gold parameter is not declared alike by both tools. Where the file does not tell
    which candidates are equal, only one of the same category and api words whose provider is disliked is taken.
    """
    swaps = _swaps(entry)
    return rng.choice(swaps) if swaps else None


def history_queries(
    entry: Entry, catalog: Catalog, rng: Random, limit: int, *, setting: str = "rating", barred: Collection[str] = ()
) -> list[Entry]:
    """Up to `limit` earlier liked calls as requests of their own, each of another tool, without a `training_fault`.

    The called tool comes from `catalog` and stands where the old right tool stood; all its calls leave the history.
    Its rivals in the catalog whose providers are liked less stand where the old tool's equals stood, as far as there
    are any, the least liked first: without them nothing but the function would tell the answer. Another candidate that
    may do the function stays only if its provider is liked less. Parameters must fit the declared names and types.
    Nothing is made in the chronological setting, which does not tell the liked calls, nor of a tool whose
    `function_words` are in `barred`.
    """
    prompt = entry.prompt(setting)
    if setting == "chronological" or entry.gold is None:
        return []
    texts = prompt.tool_texts
    liked = [item for item in prompt.history if item.rating != 0 and item.call.tool_name in catalog]
    rng.shuffle(liked)
    made: dict[str, Entry] = {}
    for item in liked:
        name = item.call.tool_name
        if len(made) >= limit or name in made or function_words(name) in barred:
            continue
        asked = _asked(replace(entry, id=f"{entry.id}+history{len(made)}"), setting, texts, item, catalog)
        if asked is not None and training_fault(asked, setting) is None:
            made[name] = asked
    return list(made.values())


def wrong_providers(entry: Entry, setting: str) -> list[ToolCall]:
    """The right call made of each equal candidate of another provider that the user likes less: sure to be wrong.

    Equal as for `counterfactual`: listed by the entry, or, where the file does not list, of the same category and api
    words and from a provider that the user dislikes. The parameters must be declared alike. In the chronological
    setting, where ratings are not told, only listed candidates are taken.
    """
    prompt, gold = entry.prompt(setting), entry.gold
    right = next((tool for tool in prompt.tools if gold is not None and tool.name == gold.tool_name), None)
    if gold is None or right is None:
        return []
    listed, likes = entry.equal_tools is not None, balance(prompt.history, right.name)
    ceiling = likes if listed else min(likes, 0)
    return [
        ToolCall(tool.name, gold.parameters)
        for tool in prompt.tools
        if provider(tool.name) != provider(right.name)
        and _may_equal(entry, right.name, tool.name)
        and _declared_alike(gold.parameters, right, tool)
        and (balance(prompt.history, tool.name) < ceiling if setting != "chronological" else listed)
    ]


def with_rejected(entries: Sequence[Entry], setting: str, seed: int) -> list[Entry]:
    """The entries that have a wrong answer to reject: their own, or one drawn from `wrong_providers`.

    Left out are entries without one, and those whose own wrong answer is the right one.
    """
    result = []
    for entry in entries:
        if entry.rejected is None and (wrong := wrong_providers(entry, setting)):
            entry = replace(entry, rejected=Random(f"{seed} {entry.id} rejected").choice(wrong).to_json())
        if entry.rejected is not None and entry.gold is not None and entry.rejected != entry.gold.to_json():
            result.append(entry)
    return result


@dataclass(frozen=True)
class Amounts:
    """How much `augment` makes of each entry, at most; `varied`: see `Material`."""

    shuffle: int = 0
    counterfactual: bool = False
    history: int = 0
    renamed: int = 0
    described: int = 0
    varied: bool = False


def augment(
    entries: Sequence[Entry], setting: str, amounts: Amounts, seed: int, *, barred: Collection[str] = ()
) -> list[Entry]:
    """The entries themselves, then the made ones: ids "7+shuffle1", "7+swap", "7+history0", ..., entry by entry.

    Copies with the candidates in another order, one counterfactual, requests from the history, copies under other names
    (of the entry and of what was made of it, in turn; see `rename`) and requests for catalog tools (see `described`).
    Left out is what has a `training_fault` and any but a shuffled one whose answer is not what history and query speak
    for (`jobs.likeliest`) with the values that the query states (`values.drafted`): a made row that says otherwise
    would teach to mistrust both. What is made of an entry depends on `seed`, its id and, but for the first two, all
    `entries`; an entry that cannot be augmented adds nothing. `barred`: see `history_queries`; give
    `answer_functions(test)` there.
    """
    result = list(entries)
    catalog = build_catalog(entries, setting) if amounts.history or amounts.described else {}
    offered = {name: (item.tool, item.text) for name, item in catalog.items()}
    stock = material(entries, setting, offered, barred) if amounts.described else Material((), ())
    stock = replace(stock, varied=amounts.varied)
    providers = all_providers(entries, setting) if amounts.renamed or amounts.described else []
    for entry in entries:
        draw = f"{seed} {entry.id}"
        own = [entry]
        for number in range(1, amounts.shuffle + 1):
            own.append(replace(shuffled(entry, Random(f"{draw} shuffle{number}")), id=f"{entry.id}+shuffle{number}"))
        if amounts.counterfactual and setting == "rating" and (swaps := _swaps(entry)):
            own.append(Random(f"{draw} swap").choice(swaps))
        if amounts.history > 0:
            rng = Random(f"{draw} history")
            own += history_queries(entry, catalog, rng, amounts.history, setting=setting, barred=barred)
        sources = list(own)
        for number in range(amounts.renamed):
            rng = Random(f"{draw} renamed{number}")
            source = sources[number % len(sources)]
            copy = renamed(shuffled(source, rng), setting, rng, providers)
            own.append(replace(copy, id=f"{source.id}+renamed{number}"))
        copies, made = own[1 : 1 + amounts.shuffle], own[1 + amounts.shuffle :]
        asked = _described(entry, setting, amounts.described, stock, providers, Random(f"{draw} described"))
        chosen = [*copies, *(item for item in made if follows(item, setting)), *asked]
        result += [item for item in chosen if training_fault(item, setting) is None]
    return result


def _described(
    entry: Entry,
    setting: str,
    count: int,
    stock: Material,
    providers: Sequence[str],
    rng: Random,
) -> list[Entry]:
    """Up to `count` requests for catalog tools that follow (`agreement.follows`), half of them under other names."""
    made: list[Entry] = []
    for _ in range(6 * count if stock.jobs else 0):  # many draws do not fit
        if len(made) == count:
            break
        asked = described(replace(entry, id=f"{entry.id}+described{len(made)}"), setting, stock, rng)
        if asked is None or training_fault(asked, setting) is not None:
            continue
        asked = renamed(asked, setting, rng, providers) if rng.random() < 0.5 else asked
        if follows(asked, setting):
            made.append(asked)
    return made


def _swaps(entry: Entry) -> list[Entry]:
    """Every counterfactual of the entry without a `training_fault`, in the order of the candidates."""
    prompt = entry.prompts.get("rating")
    if prompt is None or entry.gold is None or any(item.rating is None for item in prompt.history):
        return []
    made = [_swapped(entry, entry.gold, prompt, tool) for tool in prompt.tools]
    return [swap for swap in made if swap is not None and training_fault(swap, "rating") is None]


def _swapped(entry: Entry, gold: ToolCall, prompt: Prompt, tool: Tool) -> Entry | None:
    """The counterfactual with `tool` as the answer, its label unchecked."""
    old = next((other for other in prompt.tools if other.name == gold.tool_name), None)
    if old is None or provider(old.name) == provider(tool.name) or not _declared_alike(gold.parameters, old, tool):
        return None
    if not _may_equal(entry, old.name, tool.name):
        return None
    if entry.equal_tools is None and balance(prompt.history, tool.name) >= 0:
        return None  # unlisted tools alike in name often do something else, but never where the provider is disliked
    both = {provider(old.name), provider(tool.name)}
    kept = [item for item in prompt.history if item.call.tool_name != tool.name]
    history = [_inverted(item) if provider(item.call.tool_name) in both else item for item in kept]
    return replace(
        entry,
        id=f"{entry.id}+swap",
        prompts={"rating": prompt.with_history(history)},
        gold=ToolCall(tool.name, gold.parameters),
        rejected=None,
        equal_tools=entry.equal_tools and tuple(old.name if name == tool.name else name for name in entry.equal_tools),
    )


def _inverted(item: Interaction) -> Interaction:
    """The interaction with the other rating; its text differs in that digit alone."""
    rating = 1 - (item.rating or 0)
    wanted = {**json.loads(item.text), "rating": rating}
    # A parameter or a quoted text may hold the same words; the user's own rating is the one that gives `wanted`.
    for match in reversed(list(_RATING.finditer(item.text))):
        text = f"{item.text[: match.start(1)]}{rating}{item.text[match.end(1) :]}"
        if json.loads(text) == wanted:
            return replace(item, rating=rating, text=text)
    raise PetoolError(f"no rating in the interaction {item.text[:80]}", "the file is not in a PEToolBench format")


def _asked(entry: Entry, setting: str, texts: Sequence[str], item: Interaction, catalog: Catalog) -> Entry | None:
    """`entry` with the request of `item` in place of its own, its label unchecked."""
    prompt = entry.prompt(setting)
    names = [tool.name for tool in prompt.tools]
    called = catalog[item.call.tool_name]
    name = called.tool.name
    if name in names or entry.gold is None or not _typed(item.call, called.tool):
        return None
    old, words = entry.gold.tool_name, api_words(name)
    history = [other for other in prompt.history if other.call.tool_name != name]
    likes = {rival: balance(history, rival) for rival in (name, *names, *called.rivals)}
    free = [rival for rival in called.rivals if rival not in names and likes[rival] < likes[name]]
    rivals = iter(sorted(free, key=likes.__getitem__))
    kept: list[tuple[Tool, str]] = []
    for tool, text in zip(prompt.tools, texts, strict=True):
        rival = next(rivals, None) if tool.name != old and _may_equal(entry, old, tool.name) else None
        if tool.name == old:
            kept.append((called.tool, called.text))
        elif rival is not None:
            kept.append((catalog[rival].tool, catalog[rival].text))
        elif likes[tool.name] < likes[name] or (tool.name not in called.equal and api_words(tool.name) != words):
            kept.append((tool, text))
    return Entry(
        id=entry.id,
        query=item.instruction,
        prompts={setting: prompt.with_history(history).with_tools(kept)},
        gold=item.call,
        function=called.function,
        equal_tools=tuple(tool.name for tool, _ in kept if tool.name in called.equal) if called.equal else None,
    )


def _may_equal(entry: Entry, gold: str, name: str) -> bool:
    """Whether `name` does the function of the right tool `gold`; where none is listed, by category and api words."""
    return function_words(name) == function_words(gold) if entry.equal_tools is None else name in entry.equal_tools


def answer_faults(entry: Entry, setting: str) -> list[str]:
    """What is wrong with the answer of any entry, made or published, as short sentences; empty for a sound one."""
    if entry.gold is None:
        return ["no answer"]
    named = [tool for tool in entry.prompt(setting).tools if tool.name == entry.gold.tool_name]
    if len(named) != 1:
        return [f"the answer's tool is offered {len(named)} times"]
    extra = sorted(entry.gold.parameters.keys() - _declared(named[0]).keys())
    missing = [item.name for item in named[0].required if item.name not in entry.gold.parameters]
    found = [f"the answer gives {name}, which its tool does not declare" for name in extra]
    return found + [f"the answer lacks the required {name}" for name in missing]


def training_fault(entry: Entry, setting: str) -> str | None:
    """Why `entry` cannot be right for training in `setting`, in words; None if nothing speaks against it.

    Every entry: the right tool is named by exactly one candidate; the gold parameters are declared by it and hold
    every required one. An entry whose id says that `augment` made it, outside the chronological setting (rivals are
    the `equal_tools` and, except for a shuffled entry, also all candidates with the same api words; see `balance`):
    a shuffled one has no rival above the right tool in balance; a swapped one or one made from the history has none at
    or above it and no call of the right tool in its history; the latter also has a balance above 0.
    """
    if entry.gold is None:
        return "it has no right answer"
    prompt = entry.prompt(setting)
    name = entry.gold.tool_name
    named = sum(tool.name == name for tool in prompt.tools)
    if named != 1:
        return f"{named} candidates are named {name}"
    wrong = answer_faults(entry, setting)
    if wrong:
        return f"parameters not declared, or required but missing: {'; '.join(wrong)}"
    made = _MADE.search(entry.id)
    if made is None or setting == "chronological":
        return None
    return _label_fault(prompt, name, entry.equal_tools or (), made[1])


def _label_fault(prompt: Prompt, name: str, equal: Collection[str], kind: str) -> str | None:
    likes = balance(prompt.history, name)
    others = [tool.name for tool in prompt.tools if tool.name != name]
    if kind in ("shuffle", "renamed"):
        above = [other for other in others if other in equal and balance(prompt.history, other) > likes]
        return f"liked more than the right tool: {above}" if above else None
    if any(item.call.tool_name == name for item in prompt.history):
        return "the right tool is in the history"
    rivals = [other for other in others if other in equal or api_words(other) == api_words(name)]
    level = [rival for rival in rivals if balance(prompt.history, rival) >= likes]
    if level:
        return f"liked no less than the right tool: {level}"
    return "the right tool's provider is not liked" if kind == "history" and likes <= 0 else None


def _declared(tool: Tool) -> dict[str, Parameter]:
    return {item.name: item for item in (*tool.required, *tool.optional)}


def _declared_alike(parameters: Mapping[str, object], old: Tool, new: Tool) -> bool:
    """Whether both tools declare each parameter with the same type and `new` requires no other."""
    before, after = _declared(old), _declared(new)
    alike = all(key in before and key in after and before[key].type == after[key].type for key in parameters)
    return alike and all(item.name in parameters for item in new.required)


def _typed(call: ToolCall, tool: Tool) -> bool:
    """Whether the values are of the declared types, as far as those are common ones; true and false are BOOLEAN."""
    types = {item.name: item.type.upper() for item in (*tool.required, *tool.optional)}
    return all(
        types[key] == "BOOLEAN" if isinstance(value, bool) else isinstance(value, _JSON_TYPES.get(types[key], object))
        for key, value in call.parameters.items()
        if key in types
    )
