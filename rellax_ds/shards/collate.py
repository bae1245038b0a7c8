"""Collation: samples from disk become one `Batch`.

Prompts are laid end to end; nothing is padded. The history's own answers count `history_weight`
times as much as the target's, or are left out when it is 0. The weights of a sample add up to 1, so
what it contributes does not depend on the samples it shares a batch with.
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
            history_weight: Weight of one of the history's answers in the loss, as a multiple of the
                target's; 0 leaves them out.

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
        self._item_table = torch.from_numpy(index.item_table)

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """One batch of `samples`, in their order."""
        input_ids, item_rows, answers = np.concatenate(
            [sample.tokens for sample in samples], axis=1
        )
        lengths = np.array([sample.tokens.shape[1] for sample in samples], np.int64)
        ends = np.cumsum(lengths)
        starts = ends - lengths
        is_target = np.zeros(len(input_ids), bool)
        is_target[ends - 1] = True
        asked = np.flatnonzero((answers >= 0) & ~is_target)  # the history's own questions
        before = np.r_[-1, asked][np.searchsorted(asked, ends)]  # the last one in front of the end
        question_starts = np.where(before >= starts, before + 2 - starts, 0)
        answer_positions = np.flatnonzero((answers >= 0) & (is_target | (self._history_weight > 0)))
        targets = is_target[answer_positions]
        slot_positions = np.flatnonzero(item_rows >= 0)
        labels = answers[answer_positions].astype(np.float32)
        weights = np.where(targets, 1.0, self._history_weight)
        rows = np.repeat(np.arange(len(samples)), lengths)[answer_positions]
        weights /= np.bincount(rows, weights)[rows]
        return Batch(
            sample_ids=torch.tensor([sample.id for sample in samples], dtype=torch.int64),
            users=torch.tensor([sample.facts["user"] for sample in samples], dtype=torch.int64),
            input_ids=torch.from_numpy(input_ids.astype(np.int64)),
            lengths=torch.from_numpy(lengths),
            question_starts=torch.from_numpy(question_starts),
            slot_positions=torch.from_numpy(slot_positions),
            slot_vectors=self._item_table[torch.from_numpy(item_rows[slot_positions]).long()],
            instance=torch.from_numpy(np.stack([sample.instance for sample in samples])),
            crm_logits=torch.tensor(
                [sample.facts["crm_logit"] for sample in samples], dtype=torch.float32
            ),
            answer_positions=torch.from_numpy(answer_positions),
            answer_labels=torch.from_numpy(labels),
            answer_weights=torch.from_numpy(weights.astype(np.float32)),
            target_index=torch.from_numpy(np.flatnonzero(targets)),
        )
