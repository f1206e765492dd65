"""How a request says the value of a parameter: a value for a declaration, and the words that ask for it.

What real requests do, counted on the calls of the open entries whose tools are declared: values stand in the request
(365 of 498 that are given), or are the default though the request is silent (48), or empty because it only says that
there is one (49), or an example of the description (about 10); page numbers come as ordinals too, countries and
languages by name.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from petool_lite.data.entries import Parameter
from petool_lite.data.rename import ADDRESS, scrambled
from petool_lite.data.wording import (
    CODE,
    COUNTRIES,
    HOME,
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
    typed,
)

_DATE = re.compile(  # either order in digits only where the day cannot be a month
    r"(?P<day>1[3-9]|2[0-9]|3[01])[/.-](?P<month>0?[1-9]|1[0-2])[/.-](?P<year>[12][0-9]{3})"
    r"|(?P<year2>[12][0-9]{3})-(?P<month2>0[1-9]|1[0-2])-(?P<day2>[0-3][0-9])"
)
_LOOSE = 0.5  # share of the values that a reader knows from the declaration and that a request writes in its own way
_PLAIN = ("with {name} {value}", "with the {name} '{value}'", "for {name} {value}", "{name} {value}",
          "using the {name} {value}", "with {name} = {value}", "with {name} set to {value}")  # fmt: skip
# What a parameter is, by its name or the start of its description, and how requests ask for it.
_PAGE = re.compile(r"^page( (no|number|index|num))?$|^current page$|\bpage (index|number)\b")
_SAID: Sequence[tuple[re.Pattern[str], Sequence[str]]] = [
    (_PAGE, ("on page {value}", "on the {nth} page", "and on the {nth} page", "page {value}", "from page {value}")),
    (
        re.compile(r"limit|size|count|^num$|per page|\brows\b|number of (items|results|records|entries)"),
        (
            "with a limit of {value}",
            "with {value} results",
            "limited to {value}",
            "and get {value} results",
            "with {value} items per page",
            "with {value} items per response",
        ),
    ),
    (re.compile(r"^(sort|order)|sort by|sorting"), ("sorted by {value}", "sorted by '{value}'", "ordered by {value}")),
    (re.compile(r"offset|^start|^skip"), ("with an offset of {value}", "starting from {value}", "with {name} {value}")),
    (re.compile(r"^min"), ("with a {name} of {value}", "from {value}", "with {name} {value}")),
    (re.compile(r"^max"), ("with a {name} of {value}", "up to {value}", "with {name} {value}")),
    (
        re.compile(r"^(q|query|keywords?|search|term|text|phrase|search term)$"),
        ("for '{value}'", "for the {name} '{value}'", "about {value}", "matching '{value}'", "related to '{value}'"),
    ),
    (re.compile(r"date|^day$"), ("for the date {value}", "on {value}", "on the date {value}")),
    (
        re.compile(r"\b(id|sku|code|upc|barcode)$"),
        ("with ID {value}", "with the {name} {value}", "with {name} '{value}'"),
    ),
]


@dataclass(frozen=True)
class Spoken:
    """A value and the words that ask for it; no words where the request is silent about it."""

    value: Any
    words: str


def spoken(item: Parameter, required: bool, values: Sequence[str], rng: Random, varied: bool = False) -> Spoken | None:
    """A value for the parameter as a request would ask for it, `values` being texts that real requests named.

    `varied`: half of the values that the declaration knows are written as prose writes them, see `loosely`.

    None where the call goes without it: an optional one that nobody mentions, or a required one of an uncommon type.
    """
    silent = rng.random()
    default = "" if item.default is None else str(item.default)
    name = " ".join(split(item.name))
    if not required and silent < (0.4 if default else 0.75):
        return None
    if required and default and silent < 0.15:
        return Spoken(typed(item, default), "")
    if item.type.upper() == "STRING" and not default and rng.random() < 0.5:
        example = example_of(item) if required else ""
        if example is not None:  # the request only says that there is one
            return Spoken(
                example, f"{rng.choice(('with a specific', 'with a given', 'and a specific', 'for a'))} {name}"
            )
    if item.type.upper() == "BOOLEAN":
        return _flag(item, name, rng)
    coded = _coded(item, name, default, rng)
    if coded is not None:
        return coded
    value = _value(item, default, values, rng, varied)
    return None if value is None else Spoken(value, _words(item, name, value, rng, varied))


def _flag(item: Parameter, name: str, rng: Random) -> Spoken | None:
    """A request names a flag to have it on, or, of one that is on by default, off."""
    on = str(item.default).lower() != "true" or rng.random() < 0.5
    text = f"with {name}" if on and rng.random() < 0.5 else name if on else f"without {name}"
    return Spoken(on, text)


def _coded(item: Parameter, name: str, default: str, rng: Random) -> Spoken | None:
    """A country or language whose default is a code, asked for by its name."""
    found, kind = CODE.fullmatch(default), kind_of_code(name)
    if found is None or not kind:
        return None
    language, country = rng.choice(sorted(HOME)), rng.choice(sorted(COUNTRIES))
    if found.group("joint"):
        code = language_code(language, default)
        said = rng.choice((LANGUAGES[language], code))
        return Spoken(code, rng.choice(("in {}", "in {} language", "with language {}")).format(said))
    if kind == "language":
        language = rng.choice(sorted(LANGUAGES))
        said = rng.choice((LANGUAGES[language], LANGUAGES[language], language))
        words = rng.choice(("in {}", "in {} language", "written in {}")).format(said)
        return Spoken(language_code(language, default), words)
    said = rng.choice((COUNTRIES[country], COUNTRIES[country], country))
    words = rng.choice(("in {}", "from {}", "for {}")).format(said)
    return Spoken(country_code(country, default), words)


def _value(item: Parameter, default: str, values: Sequence[str], rng: Random, varied: bool) -> Any:
    """A value of the parameter's type: its default, one like it, a listed choice or one that a real request named."""
    kind = item.type.upper()
    if kind in NUMBERS:
        if re.fullmatch(r"[0-9]{1,12}", default):
            small = int(default) <= 10
            if rng.random() < 0.3:
                return int(default)
            return (
                rng.randrange(0 if default == "0" else 1, 11)
                if small and rng.random() < 0.6
                else int(scrambled(default, rng))
            )
        return rng.randrange(1, 10 ** rng.randrange(1, 6))
    if kind not in ("STRING", "ENUM"):
        return typed(item, default) if default else None
    choices = listed_choices(item, varied)
    if choices and rng.random() < 0.7:
        return rng.choice(choices)
    if default and rng.random() < 0.6:
        return default if rng.random() < 0.5 else _another(default, values, rng)
    if kind == "ENUM":
        return default or None
    return rng.choice(values) if values else None


def _another(default: str, values: Sequence[str], rng: Random) -> str:
    """A text of the default's make: a request's own value stands beside a default more often than it repeats it."""
    site = ADDRESS.match(default)
    if not site:
        return scrambled(default, rng)
    words = sorted({word.lower() for value in (default, *values) for word in re.findall(r"[A-Za-z]{3,12}", value)})

    def some(most: int, joint: str) -> str:
        return joint.join(rng.choices(words, k=rng.randrange(1, most + 1)))

    parts = [some(5, "-") + (f"-{rng.randrange(10**6)}" if rng.random() < 0.5 else "") for _ in range(rng.randrange(4))]
    host = f"{some(2, rng.choice(('', '-', '.')))}{rng.choice(('.com', '.com', '.org', '.de', '.net', '.io'))}"
    return site.group() + "/".join([host, *parts])


def loosely(text: str, rng: Random) -> str:
    """A text value as a request may write it: a request is prose, and its author did not copy the value.

    Separators become spaces, a list a sentence, capitals come and go, a date in digits has its month by name. Only
    letters, digits and their order are kept, so a reader can still tell the value from the declaration.
    """
    date = _DATE.fullmatch(text)
    if date:
        day, month, year = (date[key] or date[f"{key}2"] for key in ("day", "month", "year"))
        return f"{_nth(int(day))} {MONTHS[int(month) - 1]} {year}"
    plain = re.sub(r"\s+", " ", re.sub(r"[\[\]'\"`]", "", text)).strip()
    plain = re.sub(r"\s*[,|;]\s*", " and ", plain) if re.fullmatch(r"[\w :.\-]+([,|;][\w :.\-]+)+", plain) else plain
    if re.fullmatch(r"[A-Za-z]+([_\-][A-Za-z]+)+", plain):
        plain = re.sub(r"[_\-]", " ", plain) if rng.random() < 0.7 else plain
    elif re.fullmatch(r"[a-z]+([A-Z][a-z]+)+", plain):
        plain = " ".join(split(plain))
    if re.fullmatch(r"[a-z][a-z \-]*", plain) and rng.random() < 0.5:
        plain = plain.title() if rng.random() < 0.7 else plain.capitalize()
    elif re.fullmatch(r"[A-Z][A-Za-z \-]*", plain) and rng.random() < 0.3:
        plain = plain.lower()
    return plain or text


def _nth(day: int) -> str:
    ending = "th" if 10 < day < 20 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    return f"{day}{ending}"


def _words(item: Parameter, name: str, value: Any, rng: Random, varied: bool) -> str:
    """The words for a value: by what name or description say it is, or plainly with the name."""
    about = item.description[:60].lower()
    forms = next((forms for kind, forms in _SAID if kind.search(name) or (about and kind.search(about))), _PLAIN)
    form = rng.choice(forms if rng.random() < 0.85 or "{nth}" in "".join(forms) else _PLAIN)
    known = varied and isinstance(value, str) and (value == item.default or value in listed_choices(item, varied))
    if known and rng.random() < _LOOSE:
        said = loosely(value, rng)
        # without its name only what reads as words: "for rent", not "for 12"
        form = "{value}" if rng.random() < 0.2 and re.fullmatch(r"[A-Za-z][A-Za-z \-]{3,}", said) else form
        return form.format(name=name, value=said, nth=None) if "{nth}" not in form else f"{name} {said}"
    nth = ORDINALS[value - 1] if isinstance(value, int) and 1 <= value <= 10 else None
    if "{nth}" in form and nth is None:
        form = "on page {value}"
    return form.format(name=name, value=value, nth=nth)
