"""A base model with its adapter on a GPU through transformers: batches of token ids in, greedy replies out."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from petool_lite.errors import MACHINE, PetoolError
from petool_lite.inference.constrain import Constraint, logits_processor
from petool_lite.inference.llama import Reply

_TOKENS_A_BATCH = 65_536  # prompt tokens padded together; the KV cache of a 3B model takes 7 GB for them


def left_padded(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Any, Any]:
    """Prompts as one tensor (prompts, longest), padded on the left as generation needs it, and its attention mask."""
    import torch

    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


class GpuModel:
    """A model in bfloat16, its adapter merged in memory. Raises PetoolError where there is no GPU."""

    def __init__(self, directory: Path, adapter: Path | None) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        if not torch.cuda.is_available():
            raise PetoolError("the GPU variants need a GPU, and torch finds none", "bench the GGUF variants", MACHINE)
        model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, device_map={"": 0})
        if adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
        self._model = model.eval()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        eos_id: int,
        decode: Any,
        constrain: Callable[[int], Constraint] | None = None,
    ) -> Iterator[tuple[int, Reply]]:
        """Yield (index, reply) for every prompt, in batches of similar length; times are those of the batch, shared.

        `decode` turns a list of ids into text; `constrain` makes the constraint of the prompt with that index.
        Prompts are padded on the left and the padding is masked.
        """
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        while order:
            batch = self._take(order, prompts)
            started = time.perf_counter()
            constraints = [constrain(index) for index in batch] if constrain else None
            replies = self._batch([prompts[index] for index in batch], max_tokens, eos_id, constraints)
            share = (time.perf_counter() - started) / len(batch)
            for index, ids in zip(batch, replies, strict=True):
                ended = eos_id in ids
                ids = ids[: ids.index(eos_id)] if ended else ids
                finish = "stop" if ended else "length"
                yield index, Reply(decode(ids), tuple(ids), finish, len(prompts[index]), 0.0, share)

    @staticmethod
    def _take(order: list[int], prompts: Sequence[Sequence[int]]) -> list[int]:
        """Remove from the end of `order` (the longest) as many prompts as fit a batch."""
        size = max(1, _TOKENS_A_BATCH // max(1, len(prompts[order[-1]])))
        batch = order[-size:]
        del order[-size:]
        return batch

    def _batch(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        eos_id: int,
        constraints: Sequence[Constraint] | None = None,
    ) -> list[list[int]]:
        import torch

        ids, mask = left_padded(prompts, eos_id)
        longest = ids.shape[1]
        device = self._model.device
        with torch.inference_mode():
            output = self._model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                logits_processor=[logits_processor(constraints, longest)] if constraints else None,
                max_new_tokens=max_tokens,
                do_sample=False,
                eos_token_id=eos_id,
                pad_token_id=eos_id,
            )
        return [row.tolist() for row in output[:, longest:].cpu()]
