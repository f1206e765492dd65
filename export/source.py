"""What is exported: the tensors of a base with an adapter on it, or of a model of its own, all checked beforehand. A
file is mapped for some rows only: its pages never add up in this process, and several threads read at once."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from petool_lite import families
from petool_lite.adapters import WEIGHTS, AdapterConfig, read_adapter_config
from petool_lite.console import Report, silent
from petool_lite.errors import PetoolError, in_words
from petool_lite.export.vocabulary import read_vocabulary
from petool_lite.families import Shape, read_json
from petool_lite.models import Base, weight_files


@dataclass(frozen=True)
class Tensor:
    """One tensor of a model: `shape` (rows, columns) or (columns,)."""

    name: str
    shape: tuple[int, ...]
    file: Path

    @property
    def rows(self) -> int:
        """Rows of a matrix; 1 for a vector."""
        return self.shape[0] if len(self.shape) == 2 else 1

    def read(self, first: int = 0, last: int | None = None) -> Any:
        """Rows [first, last), or all, as a float32 torch tensor (rows, columns)."""
        from safetensors import safe_open

        with safe_open(self.file, "pt") as opened:
            part = opened.get_slice(self.name)[first:last] if len(self.shape) == 2 else opened.get_tensor(self.name)
            return part.reshape(-1, self.shape[-1]).float()


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: tensor name -> (A of shape (r, in), B of shape (out, r)), both float32, and its settings."""

    modules: Mapping[str, tuple[Any, Any]]
    config: AdapterConfig

    def delta(self, name: str, first: int = 0, last: int | None = None) -> Any:
        """Rows [first, last) of scaling * B @ A for the tensor `name`, float32, computed as PEFT does."""
        low, high = self.modules[name]
        return (high[first:last] @ low) * self.config.scaling


@dataclass(frozen=True)
class Source:
    """A model to export: the tensors of a base, or of a model that training made of it; `template` and `keys` go in."""

    base: Base
    config: dict[str, Any]  # config.json
    tensors: Mapping[str, Tensor]
    adapter: Adapter | None = None
    importance: dict[str, Any] | None = None  # GGUF name -> float32 array (columns,)
    nf4: bool = False  # merge into weights as 4-bit training saw them
    before: Mapping[str, Tensor] = field(default_factory=dict)  # the base's, where the tensors are not
    template: str | None = None
    keys: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def shape(self) -> Shape:
        """The model's sizes."""
        return families.shape_of(self.config)


def check_exportable(directory: Path, report: Report = silent) -> None:
    """Raise PetoolError for whatever `export` could not write of a model in `directory`, or of what is trained on it:
    sizes, rotary scaling, tensors, tokenizer, template. Reads headers only; `report` gets what is left out."""
    config, _ = find_tensors(directory, report)
    read_vocabulary(directory, families.shape_of(config).vocabulary)
    families.chat_template(directory)
    families.end_tokens(directory)


def load_source(base: Base, adapter: Adapter | None = None, nf4: bool = False, report: Report = silent) -> Source:
    """The base's tensors, checked to be whole; raises PetoolError where a matrix of the adapter fits none of them."""
    config, tensors = find_tensors(base.directory, report)
    hint = "the adapter belongs to another base model"
    for name, (low, high) in (adapter.modules if adapter else {}).items():
        if name not in tensors:
            raise PetoolError(f"the adapter changes {name}, which the base {base.name} does not have", hint)
        own = (high.shape[0], low.shape[1])
        if own != tensors[name].shape or low.shape[0] != high.shape[1]:
            raise PetoolError(f"{name} has the shape {tensors[name].shape}, its adapter {own}", hint)
    return Source(base, config, tensors, adapter, nf4=nf4)


def load_whole(base: Base, folder: Path) -> Source:
    """The tensors of a model that training made of `base`, checked against it; all else of a file is the base's."""
    _, before = find_tensors(base.directory)
    try:
        config, tensors = find_tensors(folder)
    except PetoolError as error:
        raise PetoolError(error.message, "train the run again") from error
    mine, theirs = ({(name, tensor.shape) for name, tensor in found.items()} for found in (tensors, before))
    if odd := mine ^ theirs:
        raise PetoolError(f"{folder} is not of the base {base.name}: {min(odd)[0]} differs", "give the run its base")
    return Source(base, config, tensors, before=before)


def find_tensors(directory: Path, report: Report = silent) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and every tensor of a model directory by name, without a tied output head and what every program
    computes. Raises PetoolError for a damaged file, and a tensor missing, double, or other than config.json has it."""
    from safetensors import SafetensorError, safe_open

    config = read_json(directory / "config.json")
    families.rope_of(config)
    shape = families.shape_of(config)
    expected, found, computed = families.tensor_shapes(shape), dict[str, Tensor](), 0
    for file in weight_files(directory):
        # the library checks the header, the offsets and the file's length
        damage = in_words(f"damaged weights: {file}", "get the base model again", SafetensorError, OSError)
        with damage, safe_open(file, "pt") as opened:
            parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
        for name, part in parts.items():
            if name.endswith(families.COMPUTED):
                computed += 1
            elif name in found:
                raise PetoolError(f"{directory} holds {name} twice", "remove the files of another format")
            elif not (name == "lm_head.weight" and shape.tied):
                found[name] = Tensor(name, tuple(part.get_shape()), file)
                _check_tensor(found[name], part.get_dtype(), expected.get(name))
    if missing := expected.keys() - found.keys():
        what = f"incomplete weights in {directory}: {min(missing)} is missing, {len(missing)} in all"
        raise PetoolError(what, "get the model again")
    if computed:
        report(f"left out: {computed} tensors of rotary angles ({families.COMPUTED[0]}), computed anew", 0, 0, "")
    return config, found


def _check_tensor(tensor: Tensor, dtype: str, wanted: tuple[int, ...] | None) -> None:
    if dtype not in ("BF16", "F16", "F32"):
        hint = "give the model in bfloat16, float16 or float32; --set model.precision=nf4 quantizes it for training"
        raise PetoolError(f"{tensor.name} in {tensor.file} has the type {dtype}", hint)
    if wanted is None:
        what = f"{tensor.name[:100]} in {tensor.file} is more than a model of its config.json has"
        raise PetoolError(what, "other parts cannot be exported; get the model again")
    if tensor.shape != wanted:
        found = f"{tensor.name} in {tensor.file} has the shape {list(tensor.shape)}"
        raise PetoolError(f"{found}, by config.json it has {list(wanted)}", "get the model again")


def load_adapter(folder: Path) -> Adapter:
    """A saved adapter; raises PetoolError if it is missing, damaged, more than plain LoRA, or was never trained."""
    from safetensors.torch import load_file

    config = read_adapter_config(folder)
    pairs: dict[str, dict[str, Any]] = {}
    for name, matrix in load_file(folder / WEIGHTS).items():
        # base_model.model.model.layers.0.mlp.up_proj.lora_A.weight
        module, _, side = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        pairs.setdefault(module, {})[side] = matrix.float().contiguous()
    for module, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            raise PetoolError(f"the adapter {folder} is incomplete: {module}", "train the run again")
        if not all(bool(matrix.isfinite().all()) for matrix in pair.values()):
            raise PetoolError(f"damaged adapter: {module} holds values that are not finite", "train the run again")
        if not all(bool(matrix.any()) for matrix in pair.values()):
            raise PetoolError(f"the adapter does not change {module}", "the adapter is untrained; train the run again")
    return Adapter({f"{module}.weight": (pair["A"], pair["B"]) for module, pair in pairs.items()}, config)


def nf4_round_trip(weight: Any) -> Any:
    """A float32 matrix (rows, columns) through NF4 and back, bfloat16 on the CPU: what 4-bit training saw. bitsandbytes
    with the settings of training: blocks of 64, scales quantized again, bfloat16 weights and compute."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = weight.to("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16)
    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    return dequantize_4bit(packed, state).to("cpu", torch.bfloat16)
