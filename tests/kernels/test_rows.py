"""Rows: the same owners however a batch was described, and tables that never straddle a run."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rellax_ds.kernels.rows import Rows


def test_padded_lengths_and_ids_describe_the_same_batch() -> None:
    ids = torch.arange(3).repeat_interleave(4)
    for rows in (Rows.padded(3, 4), Rows.from_lengths([4, 4, 4]), Rows.from_ids(ids)):
        assert (rows.tokens, rows.samples, rows.uniform_length) == (12, 3, 4)
        assert torch.equal(rows.ids(), ids.int())


@given(st.lists(st.integers(-1, 4), max_size=40), st.integers(1, 7))
def test_tiles_cover_every_row_once_with_its_owner(ids: list[int], block: int) -> None:
    rows = Rows.from_ids(torch.tensor(ids, dtype=torch.int64), samples=5)
    assert rows.ids().tolist() == ids
    seen = [0] * len(ids)
    for first, count, sample in rows.tiles(block).tolist():
        assert 1 <= count <= block
        for row in range(first, first + count):
            seen[row] += 1
            assert ids[row] == sample
    assert all(count == 1 for count in seen)


def test_empty_samples_and_rows_of_no_sample_are_not_uniform() -> None:
    assert Rows.from_lengths([3, 0, 3]).uniform_length is None
    assert Rows.from_ids(torch.tensor([-1, -1])).uniform_length is None
    assert Rows.from_ids(torch.tensor([0, 1, 0, 1]), 2).uniform_length is None
    assert Rows.padded(0, 5).tokens == 0


def test_ids_of_unknown_samples_are_refused() -> None:
    for ids in ([0, 2], [-2, 0]):
        with pytest.raises(ValueError, match="name samples below 2"):
            Rows.from_ids(torch.tensor(ids), samples=2)
