"""A model's weights: where each tensor lies in the safetensors files, read some rows at a time. A file is mapped for
one read only, so that its pages never add up in this process and several threads read at once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petool_lite.console import Report, silent
from petool_lite.errors import PetoolError, in_words
from petool_lite.families import COMPUTED, Shape, gguf_name, tensor_shapes
from petool_lite.models import weight_files


@dataclass(frozen=True)
class Tensor:
    """One tensor of a model: `shape` (rows, columns) or (columns,)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path

    @property
    def rows(self) -> int:
        """Rows of a matrix; 1 for a vector."""
        return self.shape[0] if len(self.shape) == 2 else 1

    @property
    def columns(self) -> int:
        """Length of one row."""
        return self.shape[-1]

    def read(self, first: int = 0, last: int | None = None) -> Any:
        """Rows [first, last), or all, as a float32 torch tensor (rows, columns)."""
        from safetensors import safe_open

        with safe_open(self.file, "pt") as opened:
            part = opened.get_slice(self.name)[first:last] if len(self.shape) == 2 else opened.get_tensor(self.name)
            return part.reshape(-1, self.columns).float()


def find_tensors(directory: Path, shape: Shape, report: Report = silent) -> list[Tensor]:
    """Every tensor of a model directory, one file or shards, without a tied output head. Raises PetoolError if a file
    is damaged or cut, or a tensor is missing, double, or of a name, type or shape that a model of this `shape` does not
    have. What every program computes anew is left out and told."""
    from safetensors import SafetensorError, safe_open

    expected, found, computed = tensor_shapes(shape), dict[str, Tensor](), 0
    for file in weight_files(directory):
        # the library checks the header, the offsets and the file's length
        damage = in_words(f"damaged weights: {file}", "get the base model again", SafetensorError, OSError)
        with damage, safe_open(file, "pt") as opened:
            parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
        for name, part in parts.items():
            tensor = Tensor(name, tuple(part.get_shape()), part.get_dtype(), file)
            if tensor.name.endswith(COMPUTED):
                computed += 1
            elif tensor.name in found:
                raise PetoolError(f"{directory} holds {tensor.name} twice", "remove the files of another format")
            elif not (tensor.name == "lm_head.weight" and shape.tied):
                found[tensor.name] = _fitting(tensor, expected, shape)
    missing = set(expected) - set(found)
    if missing:
        what = f"incomplete weights in {directory}: {min(missing)} is missing, {len(missing)} in all"
        raise PetoolError(what, "get the model again")
    if computed:
        report(f"left out: {computed} tensors of rotary angles ({COMPUTED[0]}), which are computed anew", 0, 0, "")
    return list(found.values())


def _fitting(tensor: Tensor, expected: dict[str, tuple[int, ...]], shape: Shape) -> Tensor:
    """The tensor, if a model of the expected shapes has it."""
    if tensor.dtype not in ("BF16", "F16", "F32"):
        hint = "give the model in bfloat16, float16 or float32; --set model.precision=nf4 quantizes it for training"
        raise PetoolError(f"{tensor.name} in {tensor.file} has the type {tensor.dtype}", hint)
    if tensor.name not in expected:
        gguf_name(tensor.name, shape.family)  # which has words for what no model of the family has
        raise PetoolError(f"{tensor.name} is more than config.json says", "get the model again")
    if tensor.shape != expected[tensor.name]:
        raise PetoolError(
            f"{tensor.name} in {tensor.file} has the shape {list(tensor.shape)}, by config.json it has "
            f"{list(expected[tensor.name])}",
            "get the model again",
        )
    return tensor
