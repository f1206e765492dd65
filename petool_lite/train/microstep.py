"""One update in micro-steps: rows are packed side by side up to a token budget, and only answers reach the output head.

A micro-step costs a fixed time for its thousands of kernel launches, so short rows are put into one. No row sees
another: attention is block-diagonal and positions restart. The loss is a sum over answer tokens divided by their number
in the whole update, so how rows are grouped changes nothing but rounding. Answers are 1-2 % of the tokens of
PEToolBench; the head runs for their positions alone.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True)
class MicroStep:
    """Packed rows: `ids` and `positions` (1, tokens), `lengths` of the rows, and for the `answers` (1-d) `where` they
    are predicted from, as indices into the tokens."""

    ids: Any
    positions: Any
    lengths: tuple[int, ...]
    where: Any
    answers: Any


def group(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of rows, packed so that no group has more than `budget` tokens but a row that alone exceeds it.

    First fit decreasing: the longest row first, each into the first group with room. The groups with the most
    tokens come first, so memory that is too little shows in the first micro-step.
    """
    groups: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        place = next((place for place, left in enumerate(room) if lengths[index] <= left), None)
        if place is None:
            groups.append([index])
            room.append(budget - lengths[index])
        else:
            groups[place].append(index)
            room[place] -= lengths[index]
    return groups


def micro_steps(rows: Sequence[Row], budget: int) -> list[MicroStep]:
    """Pack rows (`input_ids`, `answer_start`) into micro-steps of at most `budget` tokens; see `group`."""
    import torch

    steps = []
    for members in group([len(row["input_ids"]) for row in rows], budget):
        ids: list[int] = []
        positions: list[int] = []
        where: list[int] = []
        answers: list[int] = []
        for row in (rows[index] for index in members):
            own, start, offset = row["input_ids"], row["answer_start"], len(ids)
            ids += own
            positions += range(len(own))
            where += range(offset + start - 1, offset + len(own) - 1)
            answers += own[start:]
        lengths = tuple(len(rows[index]["input_ids"]) for index in members)
        pair = torch.tensor([ids, positions])
        steps.append(MicroStep(pair[:1], pair[1:], lengths, torch.tensor(where), torch.tensor(answers)))
    return steps


def answer_loss(model: Any, step: MicroStep) -> Any:
    """Cross entropy summed over the answer tokens of a micro-step; a PEFT model of the Llama family."""
    import torch

    device = next(model.parameters()).device
    ids, where, answers = (item.to(device, non_blocking=True) for item in (step.ids, step.where, step.answers))
    packed: dict[str, Any] = {}
    if len(step.lengths) > 1:
        # Unsloth reads the lengths, and on the host, where they cost no wait for the GPU; transformers the positions.
        packed = {
            "position_ids": step.positions.to(device, non_blocking=True),
            "packed_seq_lengths": torch.tensor(step.lengths, dtype=torch.int32),
        }
    causal = model.get_base_model()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        hidden = causal.model(input_ids=ids, use_cache=False, **packed).last_hidden_state
        logits = causal.lm_head(hidden[0].index_select(0, where))
    return torch.nn.functional.cross_entropy(logits.float(), answers, reduction="sum")


def answer_trainer(budget: int) -> Any:
    """The class AnswerTrainer for micro-steps of `budget` tokens; made in a function because trl is slow to import."""
    import torch
    from trl import SFTTrainer

    class AnswerTrainer(SFTTrainer):
        """SFTTrainer whose batch is all rows of an update on this device, taken in packed micro-steps."""

        tokens_seen = 0

        def __init__(self, **arguments: Any) -> None:
            super().__init__(data_collator=self.collate, **arguments)
            # the loss is divided by the items of the whole update, which the trainer counts only for models that say so
            self.model_accepts_loss_kwargs = True

        @staticmethod
        def collate(rows: Sequence[Row]) -> dict[str, Any]:
            steps = micro_steps(rows, budget)
            return {"steps": steps, "shift_labels": torch.cat([step.answers for step in steps])}

        def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
            """Forward and backward of every micro-step; returns this device's share of the update's mean loss."""
            model.train()
            steps = inputs["steps"]
            items = num_items_in_batch if num_items_in_batch is not None else len(inputs["shift_labels"])
            inner = self.accelerator.unwrap_model(model)
            total = None
            for number, step in enumerate(steps, 1):
                # several devices average their gradients once an update, after the last micro-step
                waits = nullcontext() if number == len(steps) else self.accelerator.no_sync(model)
                with waits:
                    # gradients are averaged over the devices and items are counted over all of them
                    loss = answer_loss(inner, step) / items * self.accelerator.num_processes
                    self.accelerator.backward(loss)
                total = loss.detach() if total is None else total + loss.detach()
                self.tokens_seen += sum(step.lengths)
            return total

    return AnswerTrainer
