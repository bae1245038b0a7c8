from __future__ import annotations

from dataclasses import replace
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
    ids: list[int] = []
    slots: list[int] = []
    vectors: list[Any] = []
    answers: list[tuple[int, float, float]] = []
    targets = []
    for sample in samples:
        tokens, item_rows, marks = sample.tokens.tolist()
        start = len(ids)
        ids += tokens
        slots += [start + n for n, item in enumerate(item_rows) if item >= 0]
        vectors += [table[item] for item in item_rows if item >= 0]
        last = len(tokens) - 1
        chosen = [n for n, mark in enumerate(marks) if mark >= 0 and (n == last or weight)]
        whole = 1.0 + weight * (len(chosen) - 1)
        targets.append(len(answers) + len(chosen) - 1)
        answers += [(start + n, marks[n], (1.0 if n == last else weight) / whole) for n in chosen]
    assert batch.size == 4
    assert batch.input_ids.tolist() == ids
    assert batch.num_tokens == len(ids)
    assert batch.lengths.tolist() == [sample.tokens.shape[1] for sample in samples]
    assert batch.slot_positions.tolist() == slots
    np.testing.assert_array_equal(batch.slot_vectors.numpy(), np.stack(vectors))
    got = (batch.answer_positions, batch.answer_labels, batch.answer_weights)
    np.testing.assert_allclose(np.stack([tensor.numpy() for tensor in got], 1), answers, rtol=1e-6)
    assert batch.target_index.tolist() == targets
    assert batch.labels.tolist() == [sample.label for sample in samples]
    assert batch.sample_ids.tolist() == [sample.id for sample in samples]
    assert batch.users.tolist() == [sample.facts["user"] for sample in samples]
    np.testing.assert_array_equal(batch.instance.numpy(), [sample.instance for sample in samples])
    logits = np.array([sample.facts["crm_logit"] for sample in samples], np.float32)
    np.testing.assert_array_equal(batch.crm_logits.numpy(), logits)


def test_collate_question_starts_after_the_answer_to_the_last_question_of_the_history(
    shards: Path,
) -> None:
    reader = ShardReader.open(shards, "train")
    unasked = reader[7].tokens.copy()
    unasked[2, :-1] = -1
    empty = replace(reader[7], tokens=unasked)
    chosen = [empty, reader[3], empty, reader[40]]
    starts = Collator(reader.index)(chosen).question_starts.tolist()
    assert starts[0] == starts[2] == 0
    for sample, start in zip(chosen, starts, strict=True):
        answers = np.flatnonzero(sample.tokens[2] >= 0)
        assert start == (answers[-2] + 2 if len(answers) > 1 else 0)
        assert start < sample.tokens.shape[1]


def test_collate_gives_the_types_the_batch_promises(shards: Path) -> None:
    reader = ShardReader.open(shards, "valid")
    batch = Collator(reader.index)([reader[0]])
    whole = {name for name, tensor in batch.tensors().items() if tensor.dtype == torch.int64}
    assert {n for n, t in batch.tensors().items() if t.dtype == torch.float32} == {
        "slot_vectors",
        "instance",
        "answer_labels",
        "answer_weights",
        "crm_logits",
    }
    assert len(whole) == 8
    assert batch.slot_vectors.shape == (len(batch.slot_positions), reader.index.item_width)
    assert batch.instance.shape == (1, reader.index.instance_width)


def test_collate_of_a_history_without_supervision_refuses_its_weight(shards: Path) -> None:
    index = ShardIndex.open(shards)
    assert index.history_supervised
    unsupervised = ShardIndex(shards, {**index.document, "history_supervised": False})
    with pytest.raises(ConfigError, match=r"train\.history_weight is 0\.5"):
        Collator(unsupervised, 0.5)
    Collator(unsupervised)
