"""A model's tokenizer as llama.cpp knows it: byte-level BPE of three ways to split text, or SentencePiece's BPE. What
llama.cpp would read otherwise than transformers does is refused: token ids would change in silence."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petool_lite.errors import PetoolError, in_words
from petool_lite.families import read_json

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_IMAGE = "<image_soft_token>"  # Gemma's text models have no row for it, and no text has it
_SPACE = "▁"  # how SentencePiece writes a space
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Patterns by which text is split -> llama.cpp's name: numbers in groups of up to three digits, or digit by digit.
_SPLITTERS = {_WORDS % r"\p{N}{1,3}": "llama-bpe", _WORDS % r"\p{N}": "qwen2"}
_KINDS = "those of Llama, Mistral, Qwen, Gemma and SmolLM2 can"


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer, in llama.cpp's words."""

    model: str  # "gpt2" for byte-level BPE, "llama" for SentencePiece's
    splitter: str  # the pre-tokenizer's name
    tokens: list[tuple[str, int]]  # text and kind by ID
    scores: list[float] | None = None  # SentencePiece's, of each token
    space: bool | None = None  # whether one is put before a text; None: as llama.cpp does


def read_vocabulary(directory: Path, size: int) -> Vocabulary:
    """The tokenizer of a model of `size` token rows, filled up to them with unused tokens. Raises PetoolError for a
    kind that would be read otherwise by llama.cpp, and for tokens beyond the model's rows."""
    tokenizer = read_json(directory / "tokenizer.json")
    odd = (KeyError, TypeError, ValueError, AttributeError, IndexError)
    with in_words(f"damaged tokenizer: {directory}/tokenizer.json", "get the model again", *odd):
        if tokenizer["model"]["type"] == "BPE" and tokenizer["model"].get("byte_fallback"):
            found = _sentencepiece(directory, tokenizer, size)
        else:
            splitter, vocabulary = _pre_tokenizer(tokenizer), tokenizer["model"]["vocab"]
            by_id = {int(index): (str(token), _NORMAL) for token, index in vocabulary.items()} | _added(tokenizer)
            _check_rows(by_id, size)
            rows = [by_id.get(index, (f"[PAD{index}]", _UNUSED)) for index in range(size)]
            found = Vocabulary("gpt2", splitter, rows)
    text, count = Counter(text for text, _ in found.tokens).most_common(1)[0]
    if count > 1:
        raise PetoolError(f"the tokenizer has {count} tokens {text[:60]!r}", "get the model's own tokenizer")
    return found


def _check_rows(by_id: Mapping[int, tuple[str, int]], size: int) -> None:
    beyond = [repr(by_id[index][0]) for index in sorted(by_id) if index >= size]
    if beyond:
        what = f"the tokenizer has tokens beyond the {size:,} rows of the model: {', '.join(beyond)[:200]}"
        raise PetoolError(what, "take them out of tokenizer.json, or give the model rows for them")


def _pre_tokenizer(tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name of the pre-tokenizer in a parsed tokenizer.json; raises PetoolError for any unknown one."""
    model, normalizer = tokenizer["model"], tokenizer.get("normalizer")
    if model["type"] != "BPE":
        raise PetoolError(f"a tokenizer of the kind {model['type']} cannot be exported", _KINDS)
    stage = tokenizer.get("pre_tokenizer") or {}
    steps = stage.get("pretokenizers", [stage])
    kinds = [step.get("type") for step in steps]
    found = None
    if kinds == ["Split", "ByteLevel"]:
        found = _SPLITTERS.get(str((steps[0].get("pattern") or {}).get("Regex")))
    elif kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        found = "smollm"
    if found is None:
        raise PetoolError(f"a tokenizer that splits text by {kinds} cannot be exported", _KINDS)
    if normalizer and not (found == "qwen2" and normalizer.get("type") == "NFC"):  # which prompts have already
        raise PetoolError("a tokenizer that normalizes its text cannot be exported", "llama.cpp would not do so")
    return found


def _added(tokenizer: Mapping[str, Any]) -> dict[int, tuple[str, int]]:
    """ID -> text and kind of the tokens that are found before text is split."""
    listed = tokenizer.get("added_tokens") or []
    return {int(token["id"]): _kind(str(token["content"]), token["special"]) for token in listed}


def _kind(text: str, special: bool) -> tuple[str, int]:
    """A token's text and kind. What llama.cpp's converter takes for a control token is one, whatever is declared."""
    pairs = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    marked = any(text.startswith(first) and text.endswith(last) for first, last in pairs)
    if special or marked or text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]"):
        return text, _CONTROL
    return text.replace(_SPACE, " "), _USER_DEFINED


def _sentencepiece(directory: Path, tokenizer: Mapping[str, Any], size: int) -> Vocabulary:
    """SentencePiece's BPE: pieces and scores from tokenizer.model where it is there, else from the order of merges."""
    space, model = _spaces(tokenizer), directory / "tokenizer.model"
    ids = {int(index): str(token) for token, index in tokenizer["model"]["vocab"].items()}
    pieces = list(_pieces(model)) if model.is_file() else list(_by_merges(tokenizer, ids))
    added = _added(tokenizer)
    known = {index: (text, _NORMAL) for index, text in ids.items()} | added
    _check_rows({index: token for index, token in known.items() if token[0] != _IMAGE}, size)
    odd = [index for index, (text, *_) in enumerate(pieces) if index not in added and ids.get(index) != text]
    if odd or len(pieces) > max(ids | added) + 1:
        place = odd[0] if odd else len(pieces)
        raise PetoolError(f"{model} and tokenizer.json differ from token {place} on", "get the model's own tokenizer")
    rows = [(f"[PAD{index}]", -10000.0, _UNUSED) for index in range(size)]
    rows[: len(pieces)] = pieces[:size]
    plain = {index: token for index, token in added.items() if index < size and rows[index][2] in (_NORMAL, _UNUSED)}
    listed = read_json(directory / "tokenizer_config.json").get("added_tokens_decoder") or {}
    for index, token in listed.items():  # which go before all others in llama.cpp's converter
        plain[int(index)] = _kind(str(token["content"]), bool(token.get("special")))
    for index, (text, kind) in sorted(plain.items()):
        if index < size:
            rows[index] = (text, -1000.0, kind)
    return Vocabulary("llama", "default", [(text, kind) for text, _, kind in rows], [row[1] for row in rows], space)


def _spaces(tokenizer: Mapping[str, Any]) -> bool | None:
    """Whether a space goes before a text; None where llama.cpp does so anyway. Raises PetoolError for other ways."""
    normalizer, stage = tokenizer.get("normalizer") or {}, tokenizer.get("pre_tokenizer") or {}
    steps = [step.get("type") for step in normalizer.get("normalizers", [normalizer] if normalizer else [])]
    if steps == ["Prepend", "Replace"] and not stage:
        return None
    if not steps and stage.get("type") == "Metaspace" and not stage.get("split", True):
        # else before the very first text only: a chat begins with a control token
        return None if stage.get("prepend_scheme") == "always" else False
    if steps == ["Replace"] and stage.get("type") in (None, "Split"):
        return False
    raise PetoolError(f"a tokenizer that treats spaces by {[*steps, stage.get('type')]} cannot be exported", _KINDS)


def _by_merges(tokenizer: Mapping[str, Any], ids: Mapping[int, str]) -> Iterator[tuple[str, float, int]]:
    """Pieces with scores that make llama.cpp merge in the order of the merges."""
    ranks: dict[str, int] = {}
    last, added = "", {str(token["content"]) for token in tokenizer.get("added_tokens") or []}
    for merge in tokenizer["model"]["merges"]:
        made = "".join(merge if isinstance(merge, list) else merge.split(" ", 1))
        if made != last and made in ranks and made not in added:  # those are found before anything is merged
            raise PetoolError(f"the tokenizer merges to {made[:40]!r} at two ranks", "llama.cpp knows one rank a token")
        last = made
        ranks.setdefault(made, len(ranks))
    for index in range(max(ids) + 1):
        text = ids.get(index, f"[PAD{index}]")
        kind = _BYTE if _BYTE_TOKEN.fullmatch(text) else _NORMAL if index in ids else _UNUSED
        kind = _UNKNOWN if text == tokenizer["model"].get("unk_token") else kind
        yield text, -float(ranks.get(text, len(ranks))) if kind == _NORMAL else 0.0, kind


def _pieces(model: Path) -> Iterator[tuple[str, float, int]]:
    """Text, score and kind of the pieces in a tokenizer.model; raises PetoolError for a damaged file."""
    from google.protobuf.message import DecodeError
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    with in_words(f"damaged tokenizer: {model}", "get the model again", DecodeError):
        found = ModelProto.FromString(model.read_bytes())
    return ((piece.piece, piece.score, piece.type) for piece in found.pieces)
