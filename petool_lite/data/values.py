"""The values that a request states for a tool's parameters, read from its words without a model.

Most right values stand in the request or in the declaration: a default that the request repeats, a listed choice in
other spelling, a number or a quoted text beside words of the parameter's name, a page as an ordinal, a country or
language by name. What is found is a draft: the prompt shows it (see `compact`), and the model decides.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from petool_lite.data.entries import Parameter, Tool
from petool_lite.data.wording import (
    CODE,
    COUNTRIES,
    LANGUAGES,
    MONTHS,
    NUMBERS,
    ORDINALS,
    country_code,
    example_of,
    kind_of_code,
    language_code,
    listed_choices,
    split,
    stem,
    typed,
)

_STATED = re.compile(
    # an apostrophe within a word opens and closes nothing
    r"(?<!\w)'(?P<single>[^']*(?:(?<=\w)'(?=\w)[^']*)*)'(?!\w)|\"(?P<double>[^\"]*)\"|`(?P<tick>[^`]*)`"
    r"|(?P<url>https?://[^\s,]*[^\s,.])"
    r"|(?<![\w.])(?P<date>[0-9]{1,4}[/.-][0-9]{1,2}[/.-][0-9]{1,4})(?!\w)"
    r"|(?<![\w.])(?P<number>-?[0-9]+(\.[0-9]+)?)(?!\w|\.[0-9])"
    r"|(?<![\w-])(?P<code>(?![0-9]+(?:st|nd|rd|th)\b)(?=[A-Za-z_-]*[0-9])(?=[0-9_-]*[A-Za-z])[\w-]{4,}(?:[@=#+~][\w-]*)*)"
)
_MONTH = "|".join(f"{month[:3]}(?:{month[3:]})?" for month in MONTHS)
_DATED = re.compile(
    rf"\b(?:(?P<day>[0-9]{{1,2}})(?:st|nd|rd|th)?(?: of)? (?P<month>{_MONTH})"
    rf"|(?P<month2>{_MONTH}) (?P<day2>[0-9]{{1,2}})(?:st|nd|rd|th)?),? (?P<year>[0-9]{{4}})\b"
)
_COMPACT_DATE = re.compile(r"(?:19|20)[0-9]{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])")  # 20221130
_DATE = re.compile(r"(?P<first>[0-9]+)(?P<joint>[/.-])(?P<second>[0-9]+)[/.-](?P<third>[0-9]+)")
_ORDINAL = re.compile(rf"\b(?:({'|'.join(ORDINALS)})|([0-9]+)(?:st|nd|rd|th))\b", re.IGNORECASE)
_LIGHT = frozenset("the a an of to for in on is are and or be with by from value one following get list i want".split())  # noqa: SIM905
_OF_A_DATE = frozenset(("day", "month", "year"))
_AMOUNTS = frozenset(("count", "limit", "num", "number", "size", "take", "top"))
_STARTS = frozenset(("index", "offset", "skip", "start"))
_FIRST_ONES = re.compile(r"\b(?:first|last|latest|next|top) ([0-9]+)\b(?! ?%)", re.IGNORECASE)
_PAGE_SIZE = re.compile(r"count(?!r)|hits|limit|per_?page|rows|size$")  # in a name in lower case
_PER_PAGE = re.compile(r"\b([0-9]+)(?: [A-Za-z-]+){0,2} per (?:page|request|response)\b", re.IGNORECASE)
_ON_PAGE = re.compile(r"\bpage(?: number| index)? ([0-9]+)\b", re.IGNORECASE)
_BOUNDS = frozenset(("max", "maximum", "min", "minimum"))  # of `minPrice` the other word tells more
_STARTING = re.compile(r"\bstart\w*(?: (?:from|at|with))?(?: [A-Za-z]+){0,2} ([0-9]+)\b", re.IGNORECASE)
_LABELS = frozenset(("id", "name"))  # of `storageName` the request says "the storage"
_LEFT, _RIGHT = 5, 3  # words before and after a value that may say which parameter it is for
_ABOUT = 70  # characters of a description that say what a parameter is
_READ = 2000  # characters of a request; real ones have up to 400
_NEAR = 100  # characters before and after a value that are looked at
_LONG = 4  # characters from which on a default that the request repeats needs no name beside it


@dataclass(frozen=True)
class _Claim:
    """A parameter, a value for it, the part of the request that states it, and how sure that is."""

    sure: float
    place: int  # of the parameter in its declaration
    value: Any
    start: int
    end: int


def drafted(tool: Tool, query: str) -> dict[str, Any]:
    """The parameters of a call of `tool` as far as `query` and the declaration tell them, in declared order.

    The first 2,000 characters are read. Each part of the request is for one parameter, the surest first. A required
    parameter that the request does not state has its default, or the example of its description, or is missing here;
    an optional one that the request names without a value is empty.
    """
    items, query = [*tool.required, *tool.optional], query[:_READ]
    found: dict[int, Any] = {}
    used: list[tuple[int, int]] = []
    for claim in sorted(_claims(items, query), key=lambda claim: (-claim.sure, claim.place, claim.start)):
        free = all(claim.end <= start or end <= claim.start for start, end in used)
        if claim.place not in found and free:
            found[claim.place] = claim.value
            used.append((claim.start, claim.end))
    _take_the_rest(items, len(tool.required), query, found, used)
    for place, item in enumerate(items):
        if place in found:
            continue
        if place < len(tool.required):
            known = _default(item) or example_of(item)
            if known:
                found[place] = typed(item, known)
        elif not _default(item) and item.type.upper() not in (*NUMBERS, "BOOLEAN") and _named(item, query):
            found[place] = ""
    return {item.name: found[place] for place, item in enumerate(items) if place in found}


def _claims(items: Sequence[Parameter], query: str) -> Iterator[_Claim]:
    for place, item in enumerate(items):
        own, about = _names(item)
        for start, end, text in _repeated(item, query):
            near = _nearness(query, start, end, own, about)
            if len(_default(item)) >= _LONG:
                yield _Claim(10 + near, place, typed(item, text), start, end)
            elif near or text.isdigit():  # a short one stands there by chance, too
                yield _Claim(0.5 + near, place, typed(item, text), start, end)
        for choice in listed_choices(item):
            for start, end, _ in _spelled(choice, query):
                near = _nearness(query, start, end, own, about)
                if near or len(choice) >= _LONG:
                    yield _Claim(8 + near, place, choice, start, end)
        yield from _coded(place, item, query)
        yield from _dated(place, item, query)
        yield from _ordinals(place, item, query, own | about)
        yield from _counted(place, item, query, own)
        stated = list(_stated(item, query))
        for more, parts in ((0, stated), (1, _listed(item, query, stated))):
            for start, end, text in parts:
                near = _nearness(query, start, end, own, about)
                if near:
                    yield _Claim(near + more, place, typed(item, text), start, end)


def _take_the_rest(
    items: Sequence[Parameter], required: int, query: str, found: dict[int, Any], used: list[tuple[int, int]]
) -> None:
    """One required parameter and one value of its type that is left belong together."""
    missing = [place for place in range(required) if place not in found]
    for place in missing[:1] if len(missing) == 1 else []:
        left = [
            (start, end, text)
            for start, end, text in _stated(items[place], query)
            if all(end <= first or last <= start for first, last in used)
        ]
        if len(left) == 1:
            found[place] = typed(items[place], left[0][2])
            used.append(left[0][:2])


def _default(item: Parameter) -> str:
    return "" if item.default is None else str(item.default).strip()


def _stated(item: Parameter, query: str) -> Iterator[tuple[int, int, str]]:
    """The parts of the request that look like values and fit the parameter's type; of a date in words none but for a
    parameter of that name."""
    dates = [] if _OF_A_DATE & set(split(item.name)) else [found.span() for found in _DATED.finditer(query)]
    for found in _STATED.finditer(query):
        text = found[str(found.lastgroup)]
        if item.type.upper() == "BOOLEAN" or (item.type.upper() in NUMBERS and not re.fullmatch(r"-?[\d.]+", text)):
            continue
        if text.strip() and not any(start <= found.start() < end for start, end in dates):
            yield found.start(), found.end(), text


def _listed(item: Parameter, query: str, stated: Sequence[tuple[int, int, str]]) -> Iterator[tuple[int, int, str]]:
    """Of a parameter with a plural name: those of its `stated` values that the request lists, with commas between."""
    name = split(item.name)[-1]
    if item.type.upper() in NUMBERS or not name.endswith("s") or name.endswith("ss"):
        return
    run: list[tuple[int, int, str]] = []
    for part in (*stated, (len(query) + 9, 0, "")):
        if run and not re.fullmatch(r",? (?:and|or) |, ?", query[run[-1][1] : part[0]]):
            if len(run) > 1:
                yield run[0][0], run[-1][1], ",".join(text for _, _, text in run)
            run = []
        run.append(part)


def _counted(place: int, item: Parameter, query: str, own: frozenset[str]) -> Iterator[_Claim]:
    """ "The first 25" and "25 per page" for how many there shall be, "starting from item 0" and "page 2" for where they
    begin."""
    name = item.name.lower()
    size = _PAGE_SIZE.search(name) is not None
    ways = (
        (bool(_AMOUNTS & own), _FIRST_ONES, 0.5),
        (bool(_STARTS & own), _STARTING, 0.5),
        (size, _PER_PAGE, 6.0),
        ("page" in name and not size, _ON_PAGE, 6.0),
    )
    for fits, pattern, sure in ways:
        for found in pattern.finditer(query) if fits and item.type.upper() != "BOOLEAN" else ():
            yield _Claim(sure, place, typed(item, found[1]), *found.span(1))


def _repeated(item: Parameter, query: str) -> Iterator[tuple[int, int, str]]:
    """Where the request repeats the default; in the request's own capitals if it stands there in quotes."""
    default = _default(item)
    for start, end, text in _spelled(default, query) if default else ():
        quoted = query[start - 1 : start] in ("'", '"', "`") and query[end : end + 1] == query[start - 1]
        yield start, end, text if quoted and text.lower() == default.lower() else default


def _spelled(text: str, query: str) -> Iterator[tuple[int, int, str]]:
    """Where the request has the words of `text`, whatever stands between them: "for rent" for `for-rent`."""
    words = re.findall(r"[^\W_]+", text[: _READ + 1])
    # a declaration may list thousands of choices, and a pattern is dear
    if not words or len(text) > _READ or words[0].lower() not in query.lower():
        return
    between = r"(?:[^\w]{0,3}(?:and )?|_)"
    last = re.escape(words[-1]) + (r"s?" if words[-1].isalpha() and len(words[-1]) > 3 else "")
    pattern = between.join([*(re.escape(word) for word in words[:-1]), last])
    exact = re.escape(text) + "|" if not text[0].isalnum() or not text[-1].isalnum() else ""
    for found in re.finditer(rf"(?<![\w.-])(?:{exact}{pattern})(?![\w]|\.[0-9])", query, re.IGNORECASE):
        yield found.start(), found.end(), found.group()


def _coded(place: int, item: Parameter, query: str) -> Iterator[_Claim]:
    """A country or language by its name, where the parameter takes its code."""
    default, kind = _default(item), kind_of_code(" ".join(split(item.name)))
    if not kind or (default and not CODE.fullmatch(default)):
        return
    if kind == "country":
        for code, start, end in _said(COUNTRIES, query):
            yield _Claim(7, place, country_code(code, default), start, end)
        return
    named = {code for code, _, _ in _said(COUNTRIES, query)}
    country = named.pop() if len(named) == 1 else ""
    for code, start, end in _said(LANGUAGES, query):
        yield _Claim(7, place, language_code(code, default, country), start, end)


def _said(names: Mapping[str, str], query: str) -> Iterator[tuple[str, int, int]]:
    """The codes whose names the request has, and where."""
    for code, name in names.items():
        for found in re.finditer(rf"\b{re.escape(name.removeprefix('the '))}\b", query):
            yield code, found.start(), found.end()


def _dated(place: int, item: Parameter, query: str) -> Iterator[_Claim]:
    """A date with its month by name, where the default is one in digits: in the default's order."""
    shape, compact = _DATE.fullmatch(_default(item)), _COMPACT_DATE.fullmatch(_default(item))
    for found in _DATED.finditer(query) if shape or compact else ():
        named = (found["month"] or found["month2"])[:3]
        month = next(number for number, name in enumerate(MONTHS, 1) if name.startswith(named))
        day, year = int(found["day"] or found["day2"]), found["year"]
        joint = shape["joint"] if shape else ""
        if shape is None or len(shape["first"]) == 4:
            parts = (year, f"{month:02}", f"{day:02}")
        elif "mm/dd" in item.description.lower() or int(shape["second"]) > 12:
            parts = (f"{month:02}", f"{day:02}", year)
        else:
            parts = (f"{day:02}", f"{month:02}", year)
        yield _Claim(7, place, joint.join(parts), found.start(), found.end())


def _ordinals(place: int, item: Parameter, query: str, names: frozenset[str]) -> Iterator[_Claim]:
    """ "The second page": counted from the default, which is the first where it is 0 or 1."""
    if item.type.upper() == "BOOLEAN" or _default(item) not in ("0", "1"):
        return
    for found in _ORDINAL.finditer(query):
        number = ORDINALS.index(found[1].lower()) + 1 if found[1] else int(found[2])
        after = [stem(word) for word in re.findall(r"[A-Za-z]+", query[found.end() : found.end() + 20])[:1]]
        if any(_same(word, name) for word in after for name in names) or (
            {"start", "offset", "index"} & names and _before(query, found.start(), "start")
        ):
            value = typed(item, str(number - 1 + int(_default(item))))
            yield _Claim(6, place, value, found.start(), found.end())


def _before(query: str, start: int, word: str) -> bool:
    return any(stem(found).startswith(word) for found in re.findall(r"[a-z]+", query[max(0, start - 25) : start]))


def _names(item: Parameter) -> tuple[frozenset[str], frozenset[str]]:
    """Stems of the words of a parameter's name, and of what its description says first."""
    own = frozenset(stem(word) for word in split(item.name))
    said = re.findall(r"[A-Za-z]+", item.description[:_ABOUT].lower())
    return own, frozenset(stem(word) for word in said) - own - _LIGHT


def _nearness(query: str, start: int, end: int, own: frozenset[str], about: frozenset[str]) -> float:
    """0 to 5: how close to a value stand words of the parameter's name, or, for less, of its description."""
    left = re.split(r"[,;]|\.\s|\band\b", query[max(0, start - _NEAR) : start])[-1]
    right = re.split(r"[,;]|\.\s|\band\b", query[end : end + _NEAR])[0]
    before = [stem(word) for word in re.findall(r"[A-Za-z]+", left.lower())][-_LEFT:][::-1]
    after = [stem(word) for word in re.findall(r"[A-Za-z]+", right.lower())][:_RIGHT]
    best = 0.0
    for near, reach in ((before, 5.0), (after, 4.0)):
        for distance, word in enumerate(near):
            if word in _LIGHT:
                continue
            if any(_same(word, name) for name in own):
                reached = reach - 0.8 * distance
                best = max(best, reached / 2 if word in _BOUNDS and len(own) > 1 else reached)
            elif word in about:
                best = max(best, (reach - 0.8 * distance) / 2)
    # each further word of the name that stands there tells apart names that share one
    said = {word for word in (*before, *after) if any(_same(word, name) for name in own)}
    return best and best + 0.3 * (len(said) - 1)


def _named(item: Parameter, query: str) -> bool:
    """Whether the request has all words of the parameter's name that say what it is of."""
    said = {stem(word) for word in re.findall(r"[A-Za-z]+", query.lower())}
    own = _names(item)[0]
    return all(any(_same(word, name) for word in said) for name in own - _LABELS or own)


def _same(word: str, name: str) -> bool:
    """Whether a word of the request is a word of a name, or one of them is short for the other: `lat`, `num`."""
    return word == name or (min(len(word), len(name)) >= 3 and (word.startswith(name) or name.startswith(word)))
