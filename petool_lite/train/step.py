"""One update in micro-batches: rows packed up to a token budget, and only answers reach the output head; or, for DPO,
one pair after the other. A micro-batch costs a fixed time for thousands of kernel launches, so short rows share one.
The loss is a sum over answer tokens divided by their number in the update: grouping changes nothing but rounding."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from petool_lite.train.attention import PACKED, bounds_of
from petool_lite.train.devices import sharded, together
from petool_lite.train.load import causal_of, computing

Row = Mapping[str, Any]


@dataclass(frozen=True)
class MicroBatch:
    """Packed rows: `ids` and `positions` (tokens), `lengths`, `answers` (1-d), `where` they are predicted from, as
    indices into the tokens, and `entries`. A row's last token predicts nothing and is not read. Up to seven tokens of
    no entry fill up the end, as a row of their own: a GPU's matrix products are slow where 8 does not divide them."""

    ids: Any
    positions: Any
    lengths: tuple[int, ...]
    where: Any
    answers: Any
    entries: tuple[str, ...] = ()


def group(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of rows, packed so that no group has more than `budget` tokens but a row that alone exceeds it. First fit
    decreasing: groups with the most tokens come first, so memory that is too little shows in the first micro-batch."""
    groups: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        place = next((place for place, left in enumerate(room) if lengths[index] <= left), len(room))
        if place == len(room):
            groups.append([])
            room.append(budget)
        groups[place].append(index)
        room[place] -= lengths[index]
    return groups


def micro_batches(rows: Sequence[Row], budget: int) -> list[MicroBatch]:
    """Pack rows (`input_ids`: numbers or an array, `answer_start`, perhaps `earlier`: start and end of each learned
    answer before that one) into micro-batches of at most `budget` tokens."""
    import numpy
    import torch

    def joined(parts: Sequence[Any]) -> Any:
        return torch.from_numpy(numpy.concatenate(parts, dtype=numpy.int64))

    batches = []
    whole = [numpy.asarray(row["input_ids"]) for row in rows]
    learned = [numpy.concatenate([numpy.arange(*span) for span in learned_spans(row)]) for row in rows]
    for members in group([len(ids) for ids in whole], budget):
        lengths = [len(whole[index]) - 1 for index in members]
        starts = list(zip(members, numpy.cumsum((0, *lengths)), strict=False))
        spare = -sum(lengths) % 8
        lengths += [spare] if spare else []
        ids = joined([*(whole[index][:-1] for index in members), numpy.zeros(spare, numpy.int64)])
        positions = joined([numpy.arange(length) for length in lengths])
        where = joined([start + learned[index] - 1 for index, start in starts])
        answers = joined([whole[index][learned[index]] for index in members])
        entries = tuple(str(rows[index].get("entry_id", index)) for index in members)
        batches.append(MicroBatch(ids, positions, tuple(lengths), where, answers, entries))
    return batches


def learned_spans(row: Row) -> list[tuple[int, int]]:
    """Start and end of what is learned among a row's ids: the earlier answers that it marks, then its own."""
    bounds = [int(bound) for bound in row.get("earlier", ())]
    return [*zip(bounds[::2], bounds[1::2], strict=True), (int(row["answer_start"]), len(row["input_ids"]))]


def shares(lengths: Sequence[int], devices: int) -> list[list[int]]:
    """Each device's rows of an update, by index: the longest first, each to that with the fewest tokens so far."""
    found: list[list[int]] = [[] for _ in range(devices)]
    tokens = [0] * devices
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        device = tokens.index(min(tokens))
        found[device].append(index)
        tokens[device] += lengths[index]
    return found


def answer_loss(model: Any, batch: MicroBatch) -> Any:
    """Cross entropy summed over the answer tokens of a micro-batch, through the layers as Unsloth or transformers has
    them: the hidden states of all tokens, then norm, output head and loss for what answers are predicted from."""
    import torch

    device = next(model.parameters()).device
    parts = batch.ids, batch.positions, batch.where, batch.answers
    ids, positions, where, answers = (part.to(device, non_blocking=True) for part in parts)
    causal = causal_of(model)
    if causal.config._attn_implementation == PACKED:
        packed: dict[str, Any] = {"bounds": bounds_of(batch.lengths, device)}
    else:  # for Unsloth's layers; on the host, where reading them costs no wait for the GPU
        packed = {"packed_seq_lengths": torch.tensor(batch.lengths, dtype=torch.int32)}
    with computing(model):
        hidden = causal.model(input_ids=ids[None], position_ids=positions[None], use_cache=False, **packed)
        logits = causal.lm_head(hidden.last_hidden_state[0].index_select(0, where))
    return torch.nn.functional.cross_entropy(logits.float(), answers, reduction="sum")


def answer_trainer() -> Any:
    """The class AnswerTrainer; made in a function, for trl is slow to import."""
    import torch
    from accelerate.data_loader import prepare_data_loader
    from trl import SFTTrainer

    class AnswerTrainer(SFTTrainer):
        """SFTTrainer whose batch is all rows of an update, of which each device takes its share in micro-batches."""

        tokens_seen = 0
        token_budget = 0  # of a micro-batch; to be set before it trains

        def __init__(self, **arguments: Any) -> None:
            model = arguments["model"]
            parts = (part for part in model.modules() if hasattr(part, "gradient_checkpointing"))
            self.kept = [(part, part.gradient_checkpointing) for part in parts]
            super().__init__(data_collator=self.collate, **arguments)
            model.train()  # Unsloth's trainer leaves it ready to generate, which the dry step is not about
            self.keep_checkpointing()
            plain = model.forward

            def forward(*inputs: Any, micro_batch: MicroBatch | None = None, **options: Any) -> Any:
                if micro_batch is None:
                    with computing(model):
                        return plain(*inputs, **options)
                return answer_loss(model, micro_batch)

            # several devices' gradients are averaged for what runs through the wrapped model's forward only
            model.forward = forward
            self.tuned = [parameter for parameter in model.parameters() if parameter.requires_grad]
            model.zero_grad = self.forget_gradients

        def keep_checkpointing(self) -> None:
            """As the model was loaded: the trainer switches the model by settings of its own."""
            for part, wanted in self.kept:
                part.gradient_checkpointing = wanted

        def forget_gradients(self, set_to_none: bool = True) -> None:
            """As a module's zero_grad does it, which walks through thousands of modules while the GPU waits."""
            for parameter in self.tuned:
                parameter.grad = None

        def floating_point_ops(self, inputs: dict[str, Any]) -> int:
            return 0  # an estimate that nobody reads, for another walk through the model

        def get_train_dataloader(self) -> Any:
            """Whole updates, the same on every device. Rows come as arrays: lists would let the GPU wait 40 ms for an
            update of 100,000 tokens. Compiled layers would wait for collating, too, so a thread does that ahead."""
            rows = self.train_dataset.with_format("numpy", columns=["input_ids"], output_all_columns=True)
            options = {"batch_size": self._train_batch_size, "sampler": self._get_train_sampler(self.train_dataset)}
            submit = ThreadPoolExecutor(1).submit if self.compiled else None

            def now(places: Sequence[int]) -> dict[str, Any]:
                return self.collate(rows.__getitems__(list(places)))

            collate = (lambda places: {"later": submit(now, places)}) if submit else now
            loader = torch.utils.data.DataLoader(range(len(rows)), collate_fn=collate, **options)
            seeded = {"use_seedable_sampler": True, "data_seed": self.args.data_seed}
            return prepare_data_loader(loader, num_processes=1, process_index=0, put_on_device=False, **seeded)

        def collate(self, rows: Sequence[Row]) -> dict[str, Any]:
            lengths = [len(row["input_ids"]) for row in rows]
            own = shares(lengths, self.accelerator.num_processes)[self.accelerator.process_index]
            return {
                "batches": micro_batches([rows[index] for index in own or [0]], self.token_budget),
                "spare": not own,  # fewer rows than devices: this one computes along, for nothing
                "tokens": sum(lengths),
                "answers": sum(end - start for row in rows for start, end in learned_spans(row)),
            }

        def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
            """Forward and backward of every micro-batch; returns this device's share of the update's mean loss."""
            inputs = inputs["later"].result() if "later" in inputs else inputs
            if sharded() and not self.tokens_seen:  # which made parameters anew
                self.tuned = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            if not model.training:  # it walks through every module
                model.train()
            self.keep_checkpointing()
            batches, accelerator = inputs["batches"], self.accelerator
            # a parted model's layers are put together for every micro-batch, by all devices at once: all take as many
            spare = max(together([len(batches)])) - len(batches) if sharded() else 0
            # gradients are averaged over the devices, and answers are counted over all of them
            scale = 0.0 if inputs["spare"] else accelerator.num_processes / inputs["answers"]
            parts = []
            for number, batch in enumerate([*batches, *batches[:1] * spare], 1):
                # several devices exchange their gradients once an update, after the last micro-batch
                with nullcontext() if sharded() or number == len(batches) else accelerator.no_sync(model):
                    loss = model(micro_batch=batch) * (scale if number <= len(batches) else 0.0)
                    accelerator.backward(loss)
                grads = (parameter.grad for parameter in self.tuned)  # of a parted model each process has its part
                norms = torch._foreach_norm([grad.to_local() if hasattr(grad, "to_local") else grad for grad in grads])
                parts.append((batch.entries, loss.detach(), torch.stack(norms).sum()))
            self.update += tuple(parts)
            self.tokens_seen += inputs["tokens"]
            return torch.stack([loss for _, loss, _ in parts]).sum()

    return AnswerTrainer


def preference_trainer() -> Any:
    """The class PreferenceTrainer, for DPO: the model prefers the right call to a wrong one, measured against a frozen
    copy of the adapter that it starts from, which TRL keeps (not the bare base: that would undo the first stage)."""
    from trl import DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    class PreferenceTrainer(DPOTrainer):
        """DPOTrainer on rows that are token ids already."""

        def __init__(self, **arguments: Any) -> None:
            self.pad = DataCollatorForPreference(pad_token_id=arguments["processing_class"].pad_token_id)
            super().__init__(data_collator=self.collate, **arguments)

        def collate(self, rows: Sequence[Row]) -> dict[str, Any]:
            pairs = []
            for row in rows:
                ids, start, other = row["input_ids"], row["answer_start"], row["rejected_ids"]
                pairs.append({"prompt_ids": ids[:start], "chosen_ids": ids[start:], "rejected_ids": other})
            return {**self.pad(pairs), "entry_ids": [row["entry_id"] for row in rows]}

        def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
            names = inputs.pop("entry_ids")
            loss = super().training_step(model, inputs, num_items_in_batch)
            self.update += ((names, loss.detach(), loss.detach()),)
            return loss

        def _prepare_dataset(self, dataset: Any, *arguments: Any, **options: Any) -> Any:
            return dataset  # TRL would render and tokenize text here, by other rules than `prompt`

        @property
        def tokens_seen(self) -> int:
            return int(self._total_train_tokens)

    return PreferenceTrainer
