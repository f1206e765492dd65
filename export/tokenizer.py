"""Tokenizer metadata for a base in Hugging Face format: byte-level BPE as llama.cpp's converter writes it."""

import json
import logging
from pathlib import Path
from typing import Any

from petool_lite.errors import PetoolError

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
# Llama 3 splits numbers into groups of up to three digits; SmolLM2 into single digits.
_LLAMA3_MARK = r"\p{N}{1,3}"
_NO_BOS_VOCABULARY = 49152  # the converter turns the start token off for models of this vocabulary, SmolLM2's too


def pre_tokenizer(tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name of the pre-tokenizer in a parsed tokenizer.json: "llama-bpe" or "smollm".

    Raises PetoolError for any other: a wrong name would change token ids in silence.
    """
    stage = tokenizer.get("pre_tokenizer") or {}
    steps = stage.get("pretokenizers", [stage])
    kinds = [step.get("type") for step in steps]
    if kinds == ["Split", "ByteLevel"] and _LLAMA3_MARK in str(steps[0].get("pattern")):
        return "llama-bpe"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    raise PetoolError(f"unknown pre-tokenizer: {kinds}", "petool-lite knows those of Llama 3 and SmolLM2")


def add_tokenizer(writer: Any, directory: Path, vocab_size: int) -> None:
    """Add tokens, types, merges, special ids and the chat template of `directory` to a GGUF writer."""
    import gguf

    logging.getLogger("gguf.vocab").setLevel(logging.ERROR)  # it warns of separators, which a causal model has not
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    if tokenizer["model"].get("type") != "BPE":
        raise PetoolError(f"tokenizer type {tokenizer['model'].get('type')} is not supported", "BPE is")
    by_id = {index: (token, _NORMAL) for token, index in tokenizer["model"]["vocab"].items()}
    for added in tokenizer["added_tokens"]:
        control = added["special"] or _looks_special(added["content"])
        by_id[added["id"]] = (added["content"], _CONTROL if control else _USER_DEFINED)
    if max(by_id) >= vocab_size:
        raise PetoolError(
            f"the tokenizer has {max(by_id) + 1} tokens, the model {vocab_size}", "they are not of one model"
        )
    rows = [by_id.get(index, (f"[PAD{index}]", _UNUSED)) for index in range(vocab_size)]
    config_file = directory / "tokenizer_config.json"
    config = json.loads(config_file.read_text()) if config_file.is_file() else {}
    if config.get("add_prefix_space") is not None:
        writer.add_add_space_prefix(config["add_prefix_space"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(tokenizer))
    writer.add_token_list([token for token, _ in rows])
    writer.add_token_types([kind for _, kind in rows])
    gguf.SpecialVocab(directory, load_merges=True, n_vocab=vocab_size).add_to_gguf(writer, quiet=True)
    if vocab_size == _NO_BOS_VOCABULARY:
        writer.kv_data[0].pop("tokenizer.ggml.add_bos_token", None)  # the writer warns of a key set twice
        writer.add_add_bos_token(False)


def _looks_special(token: str) -> bool:
    return token in ("<pad>", "<mask>") or (token.startswith("<|") and token.endswith("|>"))
