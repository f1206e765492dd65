"""One micro-step: rows become tensors, and tensors the loss on answer tokens.

The output head runs for the answers' positions only: in PEToolBench they are 1-2 % of a row.
"""

from collections.abc import Sequence
from typing import Any

_IGNORED = -100  # label of a token without loss, as torch's cross entropy has it


def collate(rows: Sequence[dict[str, Any]], pad_id: int) -> dict[str, Any]:
    """Pad rows (`input_ids`, `answer_start`) on the right into (rows, longest) tensors of input_ids and labels.

    No attention mask: attention is causal, so the padding at the end is never seen by a real token.
    """
    import torch

    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.full((len(rows), longest), pad_id)
    labels = torch.full((len(rows), longest), _IGNORED)
    for index, row in enumerate(rows):
        start, end = row["answer_start"], len(row["input_ids"])
        ids[index, :end] = torch.tensor(row["input_ids"])
        labels[index, start:end] = ids[index, start:end]
    return {"input_ids": ids, "labels": labels}


def answer_loss(model: Any, ids: Any, labels: Any) -> tuple[Any, int]:
    """Summed cross entropy over the labelled tokens and their number; the head runs for those positions only.

    `ids` and `labels` have the shape (rows, length); a label of -100 carries no loss.
    """
    import torch

    causal = model.get_base_model()
    with torch.autocast(ids.device.type, dtype=torch.bfloat16):
        hidden = causal.model(input_ids=ids, use_cache=False).last_hidden_state
        targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=_IGNORED)
        keep = targets != _IGNORED
        logits = causal.lm_head(hidden[keep])
    return torch.nn.functional.cross_entropy(logits.float(), targets[keep], reduction="sum"), int(keep.sum())


def answer_trainer() -> Any:
    """The class AnswerTrainer; made in a function because trl is slow to import."""
    from trl import SFTTrainer

    class AnswerTrainer(SFTTrainer):
        """SFTTrainer whose loss is `answer_loss`, each answer token of an update weighing the same."""

        tokens_seen = 0

        def __init__(self, **arguments: Any) -> None:
            pad_id = arguments["processing_class"].pad_token_id
            super().__init__(data_collator=lambda batch: collate(batch, pad_id), **arguments)
            # answer_loss divides by the items of the whole update, which the trainer counts only for models that say so
            self.model_accepts_loss_kwargs = True

        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            """The micro-step's share of the update's mean loss."""
            loss, count = answer_loss(self.accelerator.unwrap_model(model), inputs["input_ids"], inputs["labels"])
            self.tokens_seen += int((inputs["input_ids"] != self.processing_class.pad_token_id).sum())
            loss = loss / (num_items_in_batch if num_items_in_batch is not None else count)
            return (loss, None) if return_outputs else loss

    return AnswerTrainer
