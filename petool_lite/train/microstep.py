"""One update in micro-steps: rows are packed side by side up to a token budget, and only answers reach the output head.

A micro-step costs a fixed time for its thousands of kernel launches, so short rows are put into one. No row sees
another: attention is block-diagonal and positions restart. The loss is a sum over answer tokens divided by their number
in the whole update, or where they have weights a weighted sum divided by all of these, so how rows are grouped changes
nothing but rounding. Answers are 1-2 % of the tokens of PEToolBench; the head runs for their positions alone.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from petool_lite.recipe import Recipe
from petool_lite.train.attention import PACKED, bounds_of
from petool_lite.train.model import causal_of, computing, is_whole
from petool_lite.train.stack import Stack, unsuited

Row = Mapping[str, Any]


@dataclass(frozen=True)
class MicroStep:
    """Packed rows: `ids` and `positions` (tokens), `lengths` of the rows, and for the `answers` (1-d) `where` they
    are predicted from, as indices into the tokens, how many each row has, which `entries` the rows are of, and what
    each answer weighs where they do not all weigh the same.

    A row's last token predicts nothing and is not read.
    """

    ids: Any
    positions: Any
    lengths: tuple[int, ...]
    where: Any
    answers: Any
    answer_lengths: tuple[int, ...]
    entries: tuple[str, ...] = ()
    weights: Any = None


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
    """Pack rows (`input_ids`: numbers or an array, `answer_start`, and all or none of them `answer_weights`) into
    micro-steps of at most `budget` tokens; see `group`."""
    import numpy
    import torch

    def joined(parts: Sequence[Any], kind: Any = numpy.int64) -> Any:
        return torch.from_numpy(numpy.concatenate(parts, dtype=kind))

    steps = []
    whole = [numpy.asarray(row["input_ids"]) for row in rows]
    starts = [row["answer_start"] for row in rows]
    weights = [row["answer_weights"] for row in rows if "answer_weights" in row]
    for members in group([len(ids) for ids in whole], budget):
        lengths = tuple(len(whole[index]) - 1 for index in members)
        offsets = numpy.cumsum((0, *lengths))
        places = zip(members, lengths, offsets, strict=False)
        steps.append(
            MicroStep(
                ids=joined([whole[index][:-1] for index in members]),
                positions=joined([numpy.arange(length) for length in lengths]),
                lengths=lengths,
                where=joined([offset + numpy.arange(starts[index] - 1, length) for index, length, offset in places]),
                answers=joined([whole[index][starts[index] :] for index in members]),
                answer_lengths=tuple(len(whole[index]) - starts[index] for index in members),
                entries=tuple(str(rows[index].get("entry_id", index)) for index in members),
                weights=joined([weights[index] for index in members], numpy.float32) if weights else None,
            )
        )
    return steps


def shares(lengths: Sequence[int], devices: int) -> list[list[int]]:
    """Indices of an update's rows for each device, so that their tokens are about the same: the longest row first,
    each to the device with the fewest tokens so far."""
    found: list[list[int]] = [[] for _ in range(devices)]
    tokens = [0] * devices
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        device = tokens.index(min(tokens))
        found[device].append(index)
        tokens[device] += lengths[index]
    return found


def weight_of(rows: Sequence[Row]) -> float:
    """What the loss of an update is divided by: the number of its answer tokens, or the sum of their weights."""
    if "answer_weights" in rows[0]:
        return math.fsum(float(weight) for row in rows for weight in row["answer_weights"])
    return sum(len(row["input_ids"]) - int(row["answer_start"]) for row in rows)


def cross_entropy(logits: Any, answers: Any, weights: Any) -> Any:
    """Summed over answer tokens, each times its weight where there are `weights`."""
    import torch

    if weights is None:
        return torch.nn.functional.cross_entropy(logits.float(), answers, reduction="sum")
    each = torch.nn.functional.cross_entropy(logits.float(), answers, reduction="none")
    return (each * weights.to(each.device, non_blocking=True)).sum()


def answer_loss(stack: Stack, step: MicroStep, seed: int) -> Any:
    """Cross entropy summed over the answer tokens of a micro-step; `seed` decides what dropout drops."""
    device = stack.norm.weight.device
    ids, positions, where, answers = (
        item.to(device, non_blocking=True) for item in (step.ids, step.positions, step.where, step.answers)
    )
    rows, last = stack.rows(positions, step.lengths, where, step.answer_lengths, seed)
    return cross_entropy(stack.logits(stack.forward(ids, rows, last)), answers, step.weights)


def model_loss(model: Any, step: MicroStep) -> Any:
    """The same through the model's own forward pass: where all weights learn, and for models that `layers` does not
    compute, through what Unsloth made of it."""
    import torch

    device = next(model.parameters()).device
    ids, where, answers = (item.to(device, non_blocking=True) for item in (step.ids, step.where, step.answers))
    causal = causal_of(model)
    packed: dict[str, Any] = {}
    if causal.config._attn_implementation == PACKED:
        packed = {"bounds": bounds_of(step.lengths, device)}
    elif len(step.lengths) > 1:
        # Unsloth reads the lengths, and on the host, where they cost no wait for the GPU; transformers the positions.
        packed = {"packed_seq_lengths": torch.tensor(step.lengths, dtype=torch.int32)}
    if len(step.lengths) > 1:
        packed["position_ids"] = step.positions[None].to(device, non_blocking=True)
    with computing(model):
        hidden = causal.model(input_ids=ids[None], use_cache=False, **packed).last_hidden_state
        logits = causal.lm_head(hidden[0].index_select(0, where))
    return cross_entropy(logits, answers, step.weights)


def answer_trainer(recipe: Recipe) -> Any:
    """The class AnswerTrainer for a recipe with a token budget; made in a function because trl is slow to import."""
    import torch
    from accelerate.data_loader import prepare_data_loader
    from trl import SFTTrainer

    settings = recipe.train

    class AnswerTrainer(SFTTrainer):
        """SFTTrainer whose batch is all rows of an update, of which each device takes its share in packed micro-steps.

        `parts` are the micro-steps of the last update: entry ids, loss, and the gradient's norm after it.
        """

        tokens_seen = 0
        parts: tuple[tuple[tuple[str, ...], Any, Any], ...] = ()

        def __init__(self, **arguments: Any) -> None:
            super().__init__(data_collator=self.collate, **arguments)
            model = self.model
            other = unsuited(causal_of(model).config.to_dict())
            told = f"Unsloth's, for {other}" if other else "petool-lite's own"
            print("layers:", "transformers', for all weights learn" if is_whole(model) else told)  # to train.log
            own = not (other or is_whole(model))
            kept = (settings.checkpointing, settings.offload, settings.offload_heads)
            self.stack = Stack(model, *kept) if own else None
            plain = model.forward

            def forward(*inputs: Any, answer_step: MicroStep | None = None, seed: int = 0, **options: Any) -> Any:
                if answer_step is None:
                    with computing(model):
                        return plain(*inputs, **options)
                return self.step_loss(answer_step, seed)

            # several devices' gradients are averaged for what runs through the wrapped model's forward only
            model.forward = forward
            self.tuned = [parameter for parameter in model.parameters() if parameter.requires_grad]
            model.zero_grad = self.forget_gradients

        def forget_gradients(self, set_to_none: bool = True) -> None:
            """As a module's zero_grad does it, which walks through thousands of modules while the GPU waits."""
            for parameter in self.tuned:
                parameter.grad = None

        def floating_point_ops(self, inputs: dict[str, Any]) -> int:
            """Nobody reads this estimate, which costs a walk through the model, too."""
            return 0

        def step_loss(self, step: MicroStep, seed: int) -> Any:
            """Cross entropy summed over the answer tokens of a micro-step."""
            return answer_loss(self.stack, step, seed) if self.stack else model_loss(self.model, step)

        def get_train_dataloader(self) -> Any:
            """Whole updates, the same on every device. Rows come as arrays: lists of numbers would cost an
            update of 100,000 tokens 40 ms, for which the GPU would wait."""
            arrays = [name for name in ("input_ids", "answer_weights") if name in self.train_dataset.column_names]
            rows = self.train_dataset.with_format("numpy", columns=arrays, output_all_columns=True)
            options = {"batch_size": self._train_batch_size, "sampler": self._get_train_sampler(self.train_dataset)}
            loader = torch.utils.data.DataLoader(rows, collate_fn=self.data_collator, **options)
            seeded = {"use_seedable_sampler": True, "data_seed": self.args.data_seed}
            return prepare_data_loader(loader, num_processes=1, process_index=0, put_on_device=False, **seeded)

        def collate(self, rows: Sequence[Row]) -> dict[str, Any]:
            """This device's micro-steps of an update, and what the whole update holds."""
            lengths = [len(row["input_ids"]) for row in rows]
            own = shares(lengths, self.accelerator.num_processes)[self.accelerator.process_index]
            return {
                "steps": micro_steps([rows[index] for index in own or [0]], settings.token_budget),
                "spare": not own,  # fewer rows than devices: this one computes along, for nothing
                "tokens": sum(lengths),
                "weight": weight_of(rows),
            }

        def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
            """Forward and backward of every micro-step; returns this device's share of the update's mean loss."""
            if not model.training:  # it walks through every module
                model.train()
            if self.stack:
                self.stack.refresh()
            steps, accelerator = inputs["steps"], self.accelerator
            # gradients are averaged over the devices, and answers are counted or weighed over all of them
            scale = 0.0 if inputs["spare"] else accelerator.num_processes / inputs["weight"]
            parts = []
            for number, step in enumerate(steps, 1):
                seed = int(torch.randint(2**31, ())) + 7919 * accelerator.process_index
                # several devices exchange their gradients once an update, after the last micro-step
                with nullcontext() if number == len(steps) else accelerator.no_sync(model):
                    loss = model(answer_step=step, seed=seed) * scale
                    accelerator.backward(loss)
                norms = torch._foreach_norm([parameter.grad for parameter in self.tuned])
                parts.append((step.entries, loss.detach(), torch.stack(norms).sum()))
            self.parts = tuple(parts)
            self.tokens_seen += inputs["tokens"]
            return torch.stack([loss for _, loss, _ in parts]).sum()

    return AnswerTrainer
