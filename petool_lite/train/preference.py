"""DPO: the model prefers the right call to a wrong one, measured against the adapter that it starts from.

TRL keeps a frozen copy of the starting adapter beside the trained one as its reference (not the bare base, which would
undo the first stage).
"""

from collections.abc import Sequence
from typing import Any


def pair_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, list[int]]]:
    """Prepared rows as TRL's collator of preference data takes them: prompt_ids, chosen_ids, rejected_ids."""
    found = []
    for row in rows:
        ids, start = list(row["input_ids"]), row["answer_start"]
        found.append({"prompt_ids": ids[:start], "chosen_ids": ids[start:], "rejected_ids": list(row["rejected_ids"])})
    return found


def preference_trainer() -> Any:
    """The class PreferenceTrainer; made in a function because trl is slow to import."""
    from trl import DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    class PreferenceTrainer(DPOTrainer):
        """DPOTrainer on rows that are token ids already."""

        def __init__(self, **arguments: Any) -> None:
            self.pad = DataCollatorForPreference(pad_token_id=arguments["processing_class"].pad_token_id)
            super().__init__(data_collator=self.collate, **arguments)

        def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
            return {**self.pad(pair_rows(rows)), "entry_ids": [row["entry_id"] for row in rows]}

        def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
            names = inputs.pop("entry_ids")
            loss = super().training_step(model, inputs, num_items_in_batch)
            self.parts = ((names, loss.detach(), loss.detach()),)
            return loss

        def _prepare_dataset(self, dataset: Any, *arguments: Any, **options: Any) -> Any:
            return dataset  # TRL would render and tokenize text here, by other rules than `prompt`

        @property
        def tokens_seen(self) -> int:
            return int(self._total_train_tokens)

    return PreferenceTrainer
