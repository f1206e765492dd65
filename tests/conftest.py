"""Shared fixtures: an isolated cache and run folder, the embedded base, and a tiny random model of its shape."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
OPEN_ENTRIES = REPOSITORY.parent / "shared" / "petoolbench" / "user_entries_open.json.zip"

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session", autouse=True)
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setenv("PETOOL_LITE_CACHE", str(tmp_path_factory.mktemp("cache")))
    patch.setenv("PETOOL_LITE_RUNS", str(tmp_path_factory.mktemp("runs")))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def open_entries() -> Path:
    if not OPEN_ENTRIES.is_file():
        pytest.skip("the published entries are not on this machine")
    return OPEN_ENTRIES


@pytest.fixture(scope="session")
def smollm2():
    from petool_lite.base import resolve_base

    return resolve_base("smollm2-135m")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a tiny random Llama with the tokenizer of `tokenizer_from`; keyword arguments change its config."""
    import shutil

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(tokenizer_from: Path, **changes) -> Path:
        from tokenizers import Tokenizer

        target = tmp_path_factory.mktemp("tiny")
        vocabulary = Tokenizer.from_file(str(tokenizer_from / "tokenizer.json")).get_vocab_size()
        settings = {
            "vocab_size": vocabulary,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        }
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).to(torch.bfloat16)
        model.save_pretrained(target)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tokenizer_from / name, target / name)
        return target

    return make


@pytest.fixture(scope="session")
def llama3_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tokenizer built like Llama 3's: same splitting rule, same kind of special tokens, own vocabulary."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    from petool_lite.data.demo import generate

    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(words), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    texts = [row["instruction_ratings"] for row in generate("train", 200)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet))
    special = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|pad|>"]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        pair="<|begin_of_text|> $A <|begin_of_text|>:1 $B:1",
        special_tokens=[("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))],
    )
    target = tmp_path_factory.mktemp("llama3-tokenizer")
    tokenizer.save(str(target / "tokenizer.json"))
    template = (
        "{{- bos_token }}{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + "
        "'<|end_header_id|>\\n\\n' + (date_string if loop.first else '') + message['content'] | trim + '<|eot_id|>' }}"
        "{%- endfor %}{%- if add_generation_prompt %}"
        "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "pad_token": "<|pad|>",
        "chat_template": template,
    }
    (target / "tokenizer_config.json").write_text(json.dumps(config))
    return target


@pytest.fixture(scope="session")
def command() -> Callable[..., subprocess.CompletedProcess]:
    """Run `petool-lite ARGS` as a user would, in a process of its own."""

    def run(*arguments: str, **options) -> subprocess.CompletedProcess:
        line = [sys.executable, "-m", "petool_lite", *map(str, arguments)]
        return subprocess.run(line, capture_output=True, text=True, timeout=280, **options)

    return run
