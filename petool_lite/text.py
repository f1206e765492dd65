"""The one reader of text that users give: UTF-8 with or without a byte order mark, and JSON in it."""

import json
from pathlib import Path
from typing import Any

from petool_lite.errors import PetoolError, in_words


def decode_text(raw: bytes, name: str) -> str:
    """The text of some bytes; raises PetoolError that says where they are not UTF-8."""
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise PetoolError(f"{name} is UTF-16, not UTF-8 text", "save it as UTF-8")
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise PetoolError(f"{name} is not UTF-8 text (byte {error.start})", "save it as UTF-8") from error


def read_text(path: Path, most: int = 1 << 28) -> str:
    """The text of a file or pipe of at most `most` bytes; raises PetoolError for one that cannot be read."""
    with in_words(f"cannot read {path}", "check the path and its rights", OSError, ValueError), path.open("rb") as file:
        raw = file.read(most + 1)
    if len(raw) > most:
        raise PetoolError(f"{path} has more than {most:,} bytes", "give the right file")
    return decode_text(raw, str(path))


def parse_json(text: str, name: str) -> Any:
    """The value of a JSON text; raises PetoolError."""
    try:
        return json.loads(text.removeprefix("\ufeff"))
    except RecursionError as error:
        raise PetoolError(f"{name} is nested too deep", "no tool needs that") from error
    except ValueError as error:
        raise PetoolError(f"{name} is not JSON: {error}", "check the place that it names") from error


def read_object(path: Path, what: str, hint: str) -> dict[str, Any]:
    """The JSON object in a file; for anything else, or no file, raises PetoolError with `what` that means, and why."""
    try:
        found = parse_json(read_text(path), path.name)
    except PetoolError as error:
        raise PetoolError(f"{what} ({error.message})", hint) from error
    if not isinstance(found, dict):
        raise PetoolError(f"{what} ({path.name} is no JSON object)", hint)
    return found
