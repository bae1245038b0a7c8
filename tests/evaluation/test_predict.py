"""The merged predictions hold every sample once, or say which one is wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rellax_ds.errors import ArtifactError
from rellax_ds.evaluation.predict import check_exactly_once, merge
from rellax_ds.schema import PREDICTIONS

if TYPE_CHECKING:
    from pathlib import Path

EXPECTED = {"valid": np.array([7, 5]), "test": np.array([9, 8, 11])}


def predictions(
    samples: list[int], splits: list[int], logits: list[float] | None = None
) -> pa.Table:
    size = len(samples)
    columns = {
        "sample": samples,
        "user": [0] * size,
        "item": [0] * size,
        "split": splits,
        "label": [1] * size,
        "logit": logits or [0.5] * size,
    }
    return pa.table({name: pa.array(columns[name], kind) for name, kind in PREDICTIONS.items()})


def test_merge_sorts_by_split_and_sample(tmp_path: Path) -> None:
    pq.write_table(predictions([11, 7], [2, 1]), tmp_path / "a")
    pq.write_table(predictions([9, 5, 8], [2, 1, 2]), tmp_path / "b")
    table = merge([tmp_path / "a", tmp_path / "b"], EXPECTED)
    assert table["sample"].to_pylist() == [5, 7, 8, 9, 11]


@pytest.mark.parametrize(
    ("samples", "splits", "logits", "message"),
    [
        ([5, 7, 8, 9, 9, 11], [1, 1, 2, 2, 2, 2], None, "test sample 9 is scored more than once"),
        ([5, 7, 8, 11], [1, 1, 2, 2], None, "test sample 9 has no score"),
        ([5, 8, 9, 11], [1, 2, 2, 2], None, "valid sample 7 has no score"),
        ([5, 7, 7, 8, 9, 11], [1, 1, 2, 2, 2, 2], None, "test sample 7 is scored but not in"),
        ([0, 5, 7, 8, 9, 11], [0, 1, 1, 2, 2, 2], None, "6 rows include other splits"),
        ([5, 7, 8, 9, 11], [1, 1, 2, 2, 2], [0, 0, 0, float("nan"), 0], "logit of sample 9"),
    ],
)
def test_exactly_once_names_the_first_wrong_sample(
    samples: list[int], splits: list[int], logits: list[float] | None, message: str
) -> None:
    with pytest.raises(ArtifactError, match=message) as caught:
        check_exactly_once(predictions(samples, splits, logits), EXPECTED)
    assert "run `rellax predict` again" in str(caught.value)


def test_merge_of_no_partition_says_what_is_missing() -> None:
    with pytest.raises(ArtifactError, match="valid sample 5 has no score"):
        merge([], EXPECTED)
