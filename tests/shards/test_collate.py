from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from rellax_ds.errors import ConfigError
from rellax_ds.shards.collate import Collator
from rellax_ds.shards.read import ShardIndex, ShardReader

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("weight", [0.0, 0.25])
def test_collate_equals_a_sample_by_sample_reading(shards: Path, weight: float) -> None:
    reader = ShardReader.open(shards, "train")
    samples = [reader[n] for n in (0, 40, 3, 69)]
    batch = Collator(reader.index, weight)(samples)
    table = reader.index.item_table
    slots: list[tuple[int, int, Any]] = []
    answers: list[tuple[int, int, float, float]] = []
    targets = []
    for row, sample in enumerate(samples):
        ids, item_rows, marks = sample.tokens.tolist()
        length = len(ids)
        assert batch.input_ids[row, :length].tolist() == ids
        assert batch.attention_mask[row].tolist() == [1] * length + [0] * (
            batch.input_ids.shape[1] - length
        )
        slots += [(row, n, table[item]) for n, item in enumerate(item_rows) if item >= 0]
        for position, label in enumerate(marks):
            target = position == length - 1
            if label >= 0 and (target or weight):
                targets += [len(answers)] * target
                answers.append((row, position, label, 1.0 if target else weight))
    assert batch.size == 4
    assert batch.input_ids.shape[1] == max(sample.tokens.shape[1] for sample in samples)
    assert list(zip(batch.slot_rows.tolist(), batch.slot_positions.tolist(), strict=True)) == [
        slot[:2] for slot in slots
    ]
    np.testing.assert_array_equal(batch.slot_vectors.numpy(), np.stack([v for *_, v in slots]))
    got = (batch.answer_rows, batch.answer_positions, batch.answer_labels, batch.answer_weights)
    assert list(zip(*(tensor.tolist() for tensor in got), strict=True)) == answers
    assert batch.target_index.tolist() == targets
    assert batch.labels.tolist() == [sample.label for sample in samples]
    assert batch.sample_ids.tolist() == [sample.id for sample in samples]
    np.testing.assert_array_equal(batch.instance.numpy(), [sample.instance for sample in samples])


def test_collate_gives_the_types_the_batch_promises(shards: Path) -> None:
    reader = ShardReader.open(shards, "valid")
    batch = Collator(reader.index)([reader[0]])
    whole = {name for name, tensor in batch.tensors().items() if tensor.dtype == torch.int64}
    assert {n for n, t in batch.tensors().items() if t.dtype == torch.float32} == {
        "slot_vectors",
        "instance",
        "answer_labels",
        "answer_weights",
    }
    assert len(whole) == 8
    assert batch.slot_vectors.shape == (len(batch.slot_rows), reader.index.item_width)
    assert batch.instance.shape == (1, reader.index.instance_width)


def test_collate_of_a_history_without_supervision_refuses_its_weight(shards: Path) -> None:
    index = ShardIndex.open(shards)
    assert index.history_supervised
    unsupervised = ShardIndex(shards, {**index.document, "history_supervised": False})
    with pytest.raises(ConfigError, match=r"train\.history_weight is 0\.5"):
        Collator(unsupervised, 0.5)
    Collator(unsupervised)
