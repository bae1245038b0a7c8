"""Kept text vectors: found by text, refused when damaged or made another way."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
import pytest

from rellax_ds.artifacts import WorkDir
from rellax_ds.errors import TableError
from rellax_ds.retrieval.text_vectors import (
    DIGESTS,
    VECTORS,
    TextVectors,
    by_length,
    origin,
    read_known,
    read_texts,
    text_digests,
    write_known,
    write_texts,
)

if TYPE_CHECKING:
    from pathlib import Path

TEXTS = ["b", "a much longer text", "", "cc", "été"]
MADE_BY = origin("encoder 1", 128, "cpu")


@pytest.fixture
def work(tmp_path: Path) -> WorkDir:
    """A committed artefact that keeps a vector of every text."""
    work = WorkDir(tmp_path)
    folder = work.open("embeddings", {"e": "1"}, {}).begin()
    np.save(folder / VECTORS, np.arange(10, dtype=np.float32).reshape(5, 2))
    write_known(folder, text_digests(TEXTS), MADE_BY)
    work.open("embeddings", {"e": "1"}, {}).commit({})
    return work


def known(work: WorkDir, made_by: dict[str, str]) -> TextVectors | None:
    return read_known(work.stage_dir("embeddings"), work.manifest("embeddings"), made_by)


def test_text_digests_are_sha256_of_utf8() -> None:
    expected = [hashlib.sha256(text.encode()).hexdigest() for text in TEXTS]
    assert [row.tobytes().hex() for row in text_digests(TEXTS)] == expected
    assert text_digests([]).shape == (0, 32)


def test_find_gives_the_row_of_a_kept_text_and_minus_one_of_a_new_one(work: WorkDir) -> None:
    kept = known(work, MADE_BY)
    assert kept is not None
    rows = kept.find(text_digests(["cc", "new", "b", "été"]))
    assert rows.tolist() == [3, -1, 0, 4]
    assert kept.vectors[rows[0]].tolist() == [6.0, 7.0]
    assert TextVectors(text_digests([]), np.zeros((0, 2), np.float32)).find(
        text_digests(["b"])
    ).tolist() == [-1]


def test_find_texts_that_differ_behind_the_sorted_bytes_are_told_apart() -> None:
    kept = text_digests(["x"])
    asked = kept.copy()
    asked[0, 31] ^= 1
    assert TextVectors(kept, np.zeros((1, 2), np.float32)).find(asked).tolist() == [-1]


@pytest.mark.parametrize(
    "other",
    [origin("encoder 2", 128, "cpu"), origin("encoder 1", 64, "cpu"), {**MADE_BY, "torch": "0"}],
    ids=["encoder", "max_tokens", "torch"],
)
def test_read_known_made_another_way_is_not_taken(work: WorkDir, other: dict[str, str]) -> None:
    assert known(work, MADE_BY) is not None
    assert known(work, other) is None


@pytest.mark.parametrize("name", [VECTORS, DIGESTS])
def test_read_known_damaged_file_is_not_taken(work: WorkDir, name: str) -> None:
    path = work.stage_dir("embeddings") / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert known(work, MADE_BY) is None


def test_read_known_without_an_artefact_is_none(tmp_path: Path) -> None:
    assert known(WorkDir(tmp_path), MADE_BY) is None


def test_by_length_is_stable_and_counts_bytes() -> None:
    assert by_length(TEXTS).tolist() == [2, 0, 3, 4, 1]
    assert by_length(["bb", "aa"]).tolist() == [0, 1]


def test_read_texts_gives_the_range_and_names_a_cut_file(tmp_path: Path) -> None:
    path = tmp_path / "texts.arrow"
    write_texts(path, TEXTS)
    assert read_texts(path, 1, 4) == TEXTS[1:4]
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(TableError, match=r"texts\.arrow: not a readable Arrow file"):
        read_texts(path, 0, 1)
