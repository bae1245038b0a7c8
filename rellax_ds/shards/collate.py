"""Collation: samples from disk become one `Batch`.

Prompts are padded on the right to the longest of the batch; slots and answers stay flat, so nothing
is padded twice. The target's answer has weight 1; the history's own answers are added with
`history_weight`, or left out when it is 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from rellax_ds.batch import Batch
from rellax_ds.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rellax_ds.shards.read import Sample, ShardIndex


class Collator:
    """Makes batches from the samples of one set of shards."""

    def __init__(self, index: ShardIndex, history_weight: float = 0.0) -> None:
        """Load the item table the slots point into.

        Args:
            index: Index of the shards the samples come from.
            history_weight: Weight of the history's answers in the loss; 0 leaves them out.

        Raises:
            ConfigError: The history is to be trained and holds no supervised answer.
        """
        if history_weight and not index.history_supervised:
            raise ConfigError(
                f"train.history_weight is {history_weight:g}, but the history of these prompts"
                " holds no answer in the target's own tokens; use template question_answer with"
                " shards.chat false, or set it to 0"
            )
        self._history_weight = history_weight
        self._padding = int(index.document["slot_id"])
        self._item_table = torch.from_numpy(index.item_table)

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """One batch of `samples`, in their order."""
        lengths = [sample.tokens.shape[1] for sample in samples]
        shape = (len(samples), max(lengths))
        input_ids = np.full(shape, self._padding, np.int64)
        item_rows = np.full(shape, -1, np.int64)
        answers = np.full(shape, -1, np.int64)
        for row, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
            input_ids[row, :length], item_rows[row, :length], answers[row, :length] = sample.tokens
        last = np.array(lengths) - 1
        is_target = np.zeros(shape, bool)
        is_target[np.arange(len(samples)), last] = True
        chosen = (answers >= 0) & (is_target | (self._history_weight > 0))
        answer_rows, answer_positions = np.nonzero(chosen)
        targets = is_target[answer_rows, answer_positions]
        slot_rows, slot_positions = np.nonzero(item_rows >= 0)
        vectors = self._item_table[torch.from_numpy(item_rows[slot_rows, slot_positions])]
        mask = np.arange(shape[1])[None, :] <= last[:, None]
        labels = answers[answer_rows, answer_positions]
        weights = np.where(targets, 1.0, self._history_weight)
        return Batch(
            sample_ids=torch.tensor([sample.id for sample in samples], dtype=torch.int64),
            input_ids=torch.from_numpy(input_ids),
            attention_mask=torch.from_numpy(mask.astype(np.int64)),
            slot_rows=torch.from_numpy(slot_rows),
            slot_positions=torch.from_numpy(slot_positions),
            slot_vectors=vectors,
            instance=torch.from_numpy(np.stack([sample.instance for sample in samples])),
            answer_rows=torch.from_numpy(answer_rows),
            answer_positions=torch.from_numpy(answer_positions),
            answer_labels=torch.from_numpy(labels.astype(np.float32)),
            answer_weights=torch.from_numpy(weights.astype(np.float32)),
            target_index=torch.from_numpy(np.flatnonzero(targets)),
        )
