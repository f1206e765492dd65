"""The merged model in transformers, with one layer's weights in memory at a time: what a GGUF file is compared with.

The model is built without weights. Each layer gets its merged weights just before it runs and gives them back after,
so a model of any size needs the memory of one layer, and no merged copy is ever written.
"""

import io
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr
from itertools import pairwise
from pathlib import Path
from typing import Any

from petool_lite.export.merge import nf4_round_trip
from petool_lite.export.source import Source
from petool_lite.export.weights import Tensor

from petool_lite.console import Report
from petool_lite.prompt.render import Example

_LARGE = 1_000_000_000  # weights from which layers run in bfloat16 on a CPU: float32 would take minutes
_TOKENS = 4096  # padded tokens that run through a layer at once
_HEAD_ROWS = 8192  # rows of the output head in memory at once


def _empty_model(directory: Path, dtype: Any) -> Any:
    """The model of a directory without weights; its rotary buffers are real."""
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    with redirect_stderr(io.StringIO()):  # these libraries print which optional parts they lack
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoModelForCausalLM

        with init_empty_weights(include_buffers=False):
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype=dtype).eval()


class Reference:
    """Runs rows of token ids through base + adapter. `dtype` and `device` are those of the layers."""

    def __init__(self, source: Source) -> None:
        import torch

        self._source = source
        self._tensors = {tensor.name: tensor for tensor in source.tensors}
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        size = sum(tensor.rows * tensor.columns for tensor in source.tensors)
        self.dtype = torch.float32 if size < _LARGE and self.device == "cpu" else torch.bfloat16
        self.model = _empty_model(source.base.directory, self.dtype)
        self.model.model.rotary_emb.to(self.device)
        self._scale = source.shape.width**0.5 if source.shape.family.scaled else 1.0
        norm = {"weight": self._weight("model.norm.weight")}
        self.model.model.norm.load_state_dict(norm, assign=True)
        for index, layer in enumerate(self.model.model.layers):
            layer.register_forward_pre_hook(self._filler(index))
            layer.register_forward_hook(lambda module, *_: module.to("meta") and None)

    def _filler(self, index: int) -> Callable[..., None]:
        prefix = f"model.layers.{index}."

        def fill(layer: Any, *_: Any) -> None:
            names = [name for name in self._tensors if name.startswith(prefix)]
            layer.load_state_dict({name.removeprefix(prefix): self._weight(name) for name in names}, assign=True)

        return fill

    def _weight(self, name: str) -> Any:
        return merged(self._source, self._tensors[name]).to(self.device, self.dtype)

    def batches(self, rows: Sequence[Sequence[int]], report: Report, stage: str) -> Iterator[tuple[list[int], Any]]:
        """Yield indices of some rows and their last hidden states, (rows, longest, width), padded on the right.
        Attention is causal, so the padding is never seen by a real token."""
        import torch

        done = 0
        for group in _groups(rows):
            longest = max(len(rows[index]) for index in group)
            padded = [[*rows[index], *[0] * (longest - len(rows[index]))] for index in group]
            with torch.no_grad():
                states = self.model.model(inputs_embeds=self._embed(padded), use_cache=False).last_hidden_state
            done += len(group)
            report(stage, done, len(rows), "")
            yield group, states

    def _embed(self, padded: list[list[int]]) -> Any:
        import torch

        embedding = self._tensors["model.embed_tokens.weight"]
        found = {token: embedding.read(token, token + 1)[0] for row in padded for token in row}
        table = torch.stack([torch.stack([found[token] for token in row]) for row in padded])
        scale = torch.tensor(self._scale, dtype=self.dtype).to(self.device)
        return table.to(self.device, self.dtype) * scale

    def answer_logits(self, rows: Sequence[Example], report: Report) -> list[Any]:
        """Logits that predict each answer token of `rows`: float32 numpy arrays (answer tokens, vocabulary)."""
        results: list[Any] = [None] * len(rows)
        for group, states in self.batches([row.ids for row in rows], report, "running the merged model"):
            for place, index in enumerate(group):
                row = rows[index]
                results[index] = self._head(states[place, row.answer_start - 1 : len(row.ids) - 1])
        return results

    def _head(self, states: Any) -> Any:
        import torch

        head = self._tensors.get("lm_head.weight", self._tensors["model.embed_tokens.weight"])
        ends = [*range(0, head.rows, _HEAD_ROWS), head.rows]
        parts = [states.float().cpu() @ head.read(first, last).T for first, last in pairwise(ends)]
        return torch.cat(parts, dim=1).numpy()

    def input_squares(self, rows: Sequence[Sequence[int]], report: Report) -> dict[str, tuple[Any, int]]:
        """GGUF name of each layer matrix -> (sum over all tokens of its squared inputs, number of tokens). The sums are
        float32 numpy arrays of length columns: an importance matrix as llama.cpp defines it."""
        import torch

        sums: dict[str, Any] = {}
        lengths: list[int] = []

        def watch(name: str) -> Callable[..., None]:
            def add(_: Any, inputs: tuple[Any, ...]) -> None:
                for row, length in zip(inputs[0], lengths, strict=True):
                    squares = row[:length].double().square().sum(dim=0).cpu()
                    sums[name] = sums[name] + squares if name in sums else squares

            return add

        for name, module in self.model.model.layers.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(watch(self._source.gguf_name(f"model.layers.{name}.weight")))
        for group in _groups(rows):
            lengths[:] = [len(rows[index]) for index in group]
            for _ in self.batches([rows[index] for index in group], report, "measuring importance"):
                pass
        total = sum(map(len, rows))
        return {name: (values.float().numpy(), total) for name, values in sums.items()}


def _groups(rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Indices of rows of like length, at most _TOKENS padded tokens together."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    group: list[int] = []
    for index in order:
        if group and (len(group) + 1) * len(rows[index]) > _TOKENS:
            yield group
            group = []
        group = [*group, index]
    yield group


def merged(source: Source, tensor: Tensor) -> Any:
    """A whole tensor of the merged model in float32, in its own shape."""
    weight = tensor.read().reshape(tensor.shape)
    if source.adapter is None or tensor.name not in source.adapter.modules:
        return weight
    return (nf4_round_trip(weight).float() if source.nf4 else weight) + source.adapter.delta(tensor.name)
