"""What is exported: a base with an adapter on it, or a model of its own; checked before anything is written."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from petool_lite.export.merge import Adapter, check_fit
from petool_lite.export.vocabulary import read_vocabulary
from petool_lite.export.weights import Tensor, find_tensors

from petool_lite.console import Report, silent
from petool_lite.errors import PetoolError
from petool_lite.families import Rope, Shape, chat_template, end_tokens, gguf_name, read_json, rope_of, shape_of
from petool_lite.models import Base


@dataclass(frozen=True)
class Source:
    """A model to export: its base, config.json and tensors, and the adapter and importance, if any. The tensors are the
    base's, or those of a model of its own that training made of it: then `before` has the base's. `importance` maps
    GGUF tensor names to float32 arrays (columns,). `nf4` takes the weights of adapted matrices as 4-bit training saw
    them. `template` goes into the file in place of the base's chat template."""

    base: Base
    config: dict[str, Any]
    tensors: list[Tensor]
    adapter: Adapter | None = None
    importance: dict[str, Any] | None = None
    nf4: bool = False
    before: Mapping[str, Tensor] = field(default_factory=dict)
    template: str | None = None

    @cached_property
    def shape(self) -> Shape:
        """The model's sizes."""
        return shape_of(self.config)

    def gguf_name(self, name: str) -> str:
        """What the tensor `name` is called in a GGUF file."""
        return gguf_name(name, self.shape.family)

    @cached_property
    def rope(self) -> Rope:
        """Its rotary positions."""
        return rope_of(self.config)


def check_exportable(directory: Path, report: Report = silent) -> None:
    """Raise PetoolError for whatever `export` could not write of a model in `directory`, or of what is trained on it.
    That is: sizes, activation, rotary scaling, tensors and their types, the tokenizer's kind, its tokens beyond the
    vocabulary, the chat template and the end token. Reads headers only; `report` gets what is left out of a file."""
    _, tensors = _checked(directory, report)
    rows = next(tensor.rows for tensor in tensors if tensor.name == "model.embed_tokens.weight")
    read_vocabulary(directory, rows)
    chat_template(directory)
    end_tokens(directory)


def _checked(directory: Path, report: Report = silent) -> tuple[dict[str, Any], list[Tensor]]:
    config = read_json(directory / "config.json")
    rope_of(config)
    return config, find_tensors(directory, shape_of(config), report)


def load_source(base: Base, adapter: Adapter | None = None, nf4: bool = False, report: Report = silent) -> Source:
    """The base's tensors, checked to be whole and to fit the adapter."""
    config, tensors = _checked(base.directory, report)
    if adapter is not None:
        check_fit(adapter, tensors, base.name)
    return Source(base, config, tensors, adapter, nf4=nf4)


def load_whole(base: Base, folder: Path) -> Source:
    """The tensors of a model that training made of `base`, checked to be whole and of its shapes. Everything else of a
    file (tokenizer, name, licence) still comes from the base."""
    before = {tensor.name: tensor for tensor in load_source(base).tensors}
    try:
        config, tensors = _checked(folder)
    except PetoolError as error:
        raise PetoolError(error.message, "train the run again") from error
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    odd = [name for name in {*shapes, *before} if name not in before or shapes.get(name) != before[name].shape]
    if odd:
        raise PetoolError(f"{folder} is not of the base {base.name}: {min(odd)} differs", "give the run its own base")
    return Source(base, config, tensors, before=before)
