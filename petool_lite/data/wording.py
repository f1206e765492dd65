"""What declarations and requests have in common: words of names, values of a type, listed choices, codes by name."""

import re
from typing import Any

from petool_lite.data.entries import Parameter

NUMBERS = ("NUMBER", "INTEGER")
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
           "November", "December")  # fmt: skip
COUNTRIES = {
    "US": "the United States", "GB": "the United Kingdom", "CA": "Canada", "DE": "Germany", "FR": "France",
    "IT": "Italy", "ES": "Spain", "AU": "Australia", "JP": "Japan", "BR": "Brazil", "IN": "India", "MX": "Mexico",
    "NL": "the Netherlands", "SE": "Sweden", "SG": "Singapore", "PL": "Poland", "CH": "Switzerland", "TR": "Turkey",
}  # fmt: skip
LANGUAGES = {
    "en": "English", "de": "German", "fr": "French", "es": "Spanish", "it": "Italian", "pt": "Portuguese",
    "nl": "Dutch", "ja": "Japanese", "ko": "Korean", "ru": "Russian", "tr": "Turkish", "pl": "Polish",
}  # fmt: skip
# The country that a language's code is most often joined with.
HOME = {"en": "US", "de": "DE", "fr": "FR", "es": "ES", "it": "IT", "pt": "BR", "nl": "NL", "ja": "JP"}
CODE = re.compile(r"(?P<head>lang_)?(?P<language>[a-z]{2})(?P<joint>[-_])(?P<country>[A-Z]{2})|(lang_)?[a-zA-Z]{2}")

_LANGUAGE = re.compile(r"lang|locale|\blr\b|\bhl\b")
_COUNTRY = re.compile(r"countr|region|\bgl\b|store|market")
_CHOICES = re.compile(r"[Oo]ne of the following\s*:\s*([\w\-|]+)")
_LISTED = re.compile(r"[Oo]ne of (?:the following|these)[^|:]{0,20}:?\s*([\w\-]+(?:\|[\w\-]+)+)")
_BULLETS = re.compile(r"^\s*[-*] `?([\w\-]+)`?\s*$", re.MULTILINE)
_EXAMPLE = re.compile(r"(?:e\.g\.|[Ee]x(?:ample)?\s*:)\s*(?:'([^']{2,40})'|([\w./\-]{2,40}))")


def split(name: str) -> list[str]:
    """The lower-case words of a name in any spelling."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+", name)] or [name]


def stem(word: str) -> str:
    """A word in lower case, a plural s taken off."""
    word = word.lower()
    return word[:-1] if len(word) > 3 and word.endswith("s") else word


def typed(item: Parameter, text: str) -> Any:
    """A text as a value of the parameter's type, as it stands where it is none."""
    kind = item.type.upper()
    if kind in NUMBERS and re.fullmatch(r"-?[0-9]{1,18}", text):
        return int(text)
    if kind in NUMBERS and re.fullmatch(r"-?[0-9]{1,15}\.[0-9]{1,15}", text):
        return float(text)
    return text.lower() == "true" if kind == "BOOLEAN" and text.lower() in ("true", "false") else text


def example_of(item: Parameter) -> str | None:
    """The example that a description gives."""
    found = _EXAMPLE.search(item.description)
    return None if found is None else found.group(1) or found.group(2).rstrip(".")


def listed_choices(item: Parameter, loose: bool = True) -> list[str]:
    """The values that the description lists with bars between; `loose` also as bullets and in less strict sentences."""
    found = (_LISTED if loose else _CHOICES).search(item.description)
    if found:
        return found.group(1).strip("|").split("|")
    return _BULLETS.findall(item.description) if loose else []


def kind_of_code(name: str) -> str:
    """Of which code a parameter of this name (`split`, joined) may be: "language", "country" or ""."""
    return "language" if _LANGUAGE.search(name) else "country" if _COUNTRY.search(name) else ""


def language_code(language: str, default: str, country: str = "") -> str:
    """A language's code written as `default` writes one: en, EN, lang_en or en-US, the last with `country` if given."""
    shape = CODE.fullmatch(default)
    if shape and shape.group("joint"):
        home = country or HOME.get(language, language.upper())
        return f"{shape.group('head') or ''}{language}{shape.group('joint')}{home}"
    code = f"{'lang_' if default.startswith('lang_') else ''}{language}"
    return code.upper() if default.isupper() else code


def country_code(country: str, default: str) -> str:
    """A country's code written as `default` writes one: US or us."""
    return country.lower() if default.islower() else country
