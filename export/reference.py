"""The merged model in transformers: what a GGUF file is compared with, and what an importance matrix is measured on."""

import io
import logging
from collections.abc import Sequence
from contextlib import redirect_stderr
from functools import partial
from itertools import pairwise
from typing import Any

from petool_lite.export.source import Source, nf4_round_trip

from petool_lite.console import Report
from petool_lite.prompt.prepare import prepare
from petool_lite.prompt.render import Example, chat_from_directory
from petool_lite.recipe import Recipe

_LARGE = 1_000_000_000  # weights from which layers run in bfloat16 on a CPU: float32 would take minutes
_HEAD_ROWS = 8192  # rows of the output head in float32 at once


class Reference:
    """Base + adapter, or the model of its own, on the GPU if there is room, else in this process's memory."""

    def __init__(self, source: Source) -> None:
        logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
        with redirect_stderr(io.StringIO()):  # these libraries print which optional parts they lack, and bars
            import torch
            from accelerate import cpu_offload
            from transformers import AutoModelForCausalLM

            self._source, self._tensors = source, {tensor.name: tensor for tensor in source.tensors}
            size = sum(tensor.rows * tensor.columns for tensor in source.tensors)
            gpu = torch.cuda.is_available()
            dtype = torch.bfloat16 if gpu or size >= _LARGE else torch.float32
            folder = source.tensors[0].file.parent
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)
            if source.adapter is not None:
                for name in source.adapter.modules:
                    weight = self._tensors[name].read()
                    before = nf4_round_trip(weight).float() if source.nf4 else weight
                    model.get_parameter(name).copy_(before + source.adapter.delta(name))
            self._model = model.model
            if gpu and 2.5 * size < torch.cuda.mem_get_info()[0]:
                self._model.to("cuda")
            elif gpu:  # matrices come from the CPU's memory, one at a time
                cpu_offload(self._model, "cuda:0")

    def _states(self, ids: Sequence[int]) -> Any:
        """The last hidden states of a row, (tokens, width)."""
        import torch

        with torch.no_grad():
            row = torch.tensor([list(ids)], device="cuda" if torch.cuda.is_available() else "cpu")
            return self._model(row, use_cache=False).last_hidden_state[0]

    def answer_logits(self, rows: Sequence[Example], report: Report) -> list[Any]:
        """Logits that predict each answer token of `rows`: float32 numpy arrays (answer tokens, vocabulary)."""
        import torch

        head = self._tensors.get("lm_head.weight", self._tensors["model.embed_tokens.weight"])
        ends, found = [*range(0, head.rows, _HEAD_ROWS), head.rows], []
        for number, row in enumerate(rows, 1):
            states = self._states(row.ids)[row.answer_start - 1 : -1].float().cpu()
            parts = [states @ head.read(first, last).T for first, last in pairwise(ends)]
            found.append(torch.cat(parts, dim=1).numpy())
            report("running the merged model", number, len(rows), "")
        return found

    def mean_squares(self, rows: Sequence[Sequence[int]], report: Report) -> dict[str, Any]:
        """GGUF name of each layer matrix -> mean over all tokens of its squared inputs, a float32 numpy array of length
        columns: an importance matrix as llama.cpp defines it."""
        import torch

        sums: dict[str, Any] = {}

        def add(name: str, _: Any, inputs: tuple[Any, ...]) -> None:
            sums[name] = sums.get(name, 0.0) + inputs[0][0].double().square().sum(dim=0).cpu()

        for name, module in self._model.layers.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(partial(add, self._source.gguf_name(f"model.layers.{name}.weight")))
        for number, row in enumerate(rows, 1):
            self._states(row)
            report("measuring importance", number, len(rows), "")
        total = sum(map(len, rows))
        return {name: (values / total).float().numpy() for name, values in sums.items()}


TOKENS = 32_768  # of training rows, prompts and answers


def importance(source: Source, recipe: Recipe, report: Report) -> dict[str, Any]:
    """GGUF tensor name -> float32 array (columns,)."""
    prepared = prepare(recipe, source.base, chat_from_directory(source.base.directory), report)
    step = max(1, prepared.summary["tokens"] // TOKENS)
    return Reference(source).mean_squares(prepared.table["input_ids"][::step], report)  # from all over the data
