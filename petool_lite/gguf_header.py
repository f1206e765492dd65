"""Can a GGUF file's keys be those of a model? Checked before any C code sees them, as some llama.cpp believes too much,
and in a tenth of a second; the package gguf takes some. Layout (GGUF versions 2 and 3, little-endian): magic, version,
tensor count, key count; keys with typed values; then tensors. A split file is several; the first has the keys."""

import mmap
import struct
from functools import lru_cache
from glob import escape
from pathlib import Path
from typing import Any

from petool_lite.errors import PetoolError, in_words

MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_KEPT = 1 << 10  # bytes of a text value that is looked at
_MOST_PARTS = 99_999
# Numbers that end the process in llama.cpp where they are beyond this, or not of this type.
_LIMITS: dict[str, tuple[Any, float, float]] = {
    "block_count": (int, 1, 512),
    "expert_count": (int, 0, 512),
    "attention.layer_norm_rms_epsilon": (float, 0, 1),
    "attention.layer_norm_epsilon": (float, 0, 1),
}


class _Damage(Exception):
    """What of the header cannot be."""


def check_gguf(path: Path) -> list[Path]:
    """The checked files of a GGUF model: itself, or all parts of a split one. Raises PetoolError for what is no GGUF
    file or a damaged one, and for a part that is not the first or has not all others beside it."""
    part, parts = _part(path)
    if parts <= 1:
        return [path]
    what = f"{path} is part {part + 1} of {parts} of a split model"
    endings = [f"-{number:05}-of-{parts:05}.gguf" for number in range(1, parts + 1)]  # as llama.cpp calls them
    if not path.name.endswith(endings[part]):
        raise PetoolError(f"{what}, but not called so", f"call it NAME{endings[part]}, and the others accordingly")
    files = [path.with_name(path.name.removesuffix(endings[part]) + ending) for ending in endings]
    if missing := [file.name for file in files if not file.is_file()]:
        raise PetoolError(f"{what}, and {missing[0]} is not beside it", "put all parts into one folder")
    if part:
        raise PetoolError(what, f"give the first one: {files[0]}")
    if [_part(file) for file in files] != [(number, parts) for number in range(parts)]:
        raise PetoolError(f"{what}, and the others are not of the same model", "get all parts again")
    return files


def _part(path: Path) -> tuple[int, int]:
    """Which part the file is, from 0, and of how many; checked."""
    with (
        in_words(f"cannot read {str(path)[:200]}", "check its permissions", OSError),
        in_words(f"damaged GGUF file: {path}", "get or export the file again", _Damage),
    ):
        if not path.is_file():
            raise _no_file(path)
        facts = path.stat()
        return _read(path.absolute(), (facts.st_size, facts.st_mtime_ns, facts.st_ino))


def _no_file(path: Path) -> PetoolError:
    """What to say where a file was meant: what is likely to have been."""
    if path.is_dir():
        found = sorted([*path.glob("*.gguf"), *path.glob("export/model.*.gguf")])
        hint = f"the file in it: {found[0]}" if found else "a .gguf file; `petool-lite export` makes one of a run"
        return PetoolError(f"{path} is a folder, not a GGUF file", f"give {hint}")
    parts = sorted(path.parent.glob(f"{escape(path.stem)}-00001-of-*.gguf")) if path.parent.is_dir() else []
    hint = f"give the first part of the split model: {parts[0]}" if parts else "give the path of a .gguf file"
    return PetoolError(f"no such file: {path}", hint)


@lru_cache(maxsize=64)
def _read(path: Path, state: tuple[int, int, int]) -> tuple[int, int]:
    """`_part`, read once for each state of the file."""
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise PetoolError(f"not a GGUF file: {path}", "it does not start with the letters GGUF")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            values = _checked_values(_Cursor(data))
    part, parts = values.get("split.no", 0), values.get("split.count", 1)
    if not (isinstance(part, int) and isinstance(parts, int) and 0 <= part < max(1, parts) <= _MOST_PARTS):
        raise _Damage(f"it says of its parts {part!r} of {parts!r}")
    return part, parts


class _Cursor:
    """A place in the file that cannot leave it."""

    def __init__(self, data: Any) -> None:
        self.data, self.size, self.place = data, len(data), len(MAGIC)

    def skip(self, count: int) -> int:
        """Move on by `count` bytes; where they start."""
        start, self.place = self.place, self.place + count
        if self.place > self.size:
            raise _Damage(f"it ends inside its header, at byte {self.size:,}")
        return start

    def number(self, letter: str) -> Any:
        return struct.unpack_from(f"<{letter}", self.data, self.skip(struct.calcsize(letter)))[0]

    def text(self) -> bytes:
        start = self.skip(self.number("Q"))
        return bytes(self.data[start : min(self.place, start + _KEPT)])

    def texts(self, distinct: bool) -> int:
        """Move over a list of texts, and how many they are; with `distinct` no two may be equal."""
        seen, count = set[bytes](), int(self.number("Q"))
        data, place, read = self.data, self.place, struct.Struct("<Q").unpack_from
        for _ in range(count):
            if self.size - place < 8:
                raise _Damage("it ends inside a list of texts")
            start = place + 8
            place = start + read(data, place)[0]
            if distinct:
                seen.add(data[start:place])
        if distinct and len(seen) < count:
            raise _Damage("a token occurs twice")
        self.skip(place - self.place)
        return count

    def value(self, key: str) -> Any:
        """The value of a key: a number, a text, or of an array its places, a range."""
        if array := (kind := self.number("I")) == _ARRAY:
            kind = self.number("I")
        if kind == _STRING:
            return range(self.texts(key == "tokenizer.ggml.tokens")) if array else self.text()
        if kind not in _SCALARS:
            raise _Damage(f"{key[:60]!r} has the unknown type {kind}")
        if not array:
            return self.number(_SCALARS[kind])
        count = self.number("Q")
        self.skip(count * struct.calcsize(_SCALARS[kind]))
        return range(count)


def _checked_values(cursor: _Cursor) -> dict[str, Any]:
    """The values of all keys, none of which llama.cpp would believe to its end."""
    if (version := cursor.number("I")) not in (2, 3):
        raise _Damage(f"version {version}; 2 and 3 are known, in little-endian order")
    tensors, keys, values = cursor.number("Q"), cursor.number("Q"), dict[str, Any]()
    if tensors > cursor.size // (8 + 4 + 8 + 4 + 8):
        raise _Damage(f"{tensors:,} tensors do not fit into {cursor.size:,} bytes")
    for _ in range(keys):
        key = cursor.text().decode("utf-8", "replace")
        if key in values:
            raise _Damage(f"the key {key[:60]!r} occurs twice")
        values[key] = cursor.value(key)
    if not isinstance(architecture := values.get("general.architecture", b""), bytes):
        raise _Damage("general.architecture is no text")
    for name, (kind, least, most) in _LIMITS.items():
        name = f"{architecture.decode('utf-8', 'replace')}.{name}"
        found: Any = values.get(name, kind(most))
        if not isinstance(found, kind) or not least <= found <= most:
            raise _Damage(f"{name} is {found!r}")
    own = {key.removeprefix("tokenizer.ggml."): value for key, value in values.items() if "tokenizer.ggml." in key}
    lengths = {name: len(value) for name, value in own.items() if isinstance(value, range)}
    for name in ("scores", "token_type"):
        if "tokens" in lengths and lengths.get(name, lengths["tokens"]) != lengths["tokens"]:
            raise _Damage(f"{lengths['tokens']:,} tokens, but {lengths[name]:,} of their {name}")
    for name, value in own.items():  # one beyond the vocabulary counts as unset, in llama.cpp as here
        if name.endswith("_token_id") and not isinstance(value, int):
            raise _Damage(f"tokenizer.ggml.{name} is {value!r}")
    # without types, control tokens would be read as plain text
    lacks = [name for name in ("tokens", "token_type", "merges") if name not in lengths]
    if own.get("model") == b"gpt2" and lacks:
        raise _Damage(f"it lacks the key tokenizer.ggml.{lacks[0]}")
    return values
