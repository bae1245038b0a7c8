"""When test rows were scored: one line a scoring, and the sentence a report makes of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rellax_ds.evaluation import test_reads

if TYPE_CHECKING:
    from pathlib import Path


def test_a_scoring_is_noted_once_and_a_torn_line_is_no_scoring(tmp_path: Path) -> None:
    assert test_reads.read(tmp_path) == []
    test_reads.record(tmp_path, "first", 100)
    with (tmp_path / test_reads.NAME).open("a") as file:
        file.write('{"time": "2026')
    test_reads.record(tmp_path, "second", 90)
    test_reads.record(tmp_path, "first", 100)
    assert [(line["key"], line["rows"]) for line in test_reads.read(tmp_path)] == [
        ("first", 100),
        ("second", 90),
    ]


def test_sentence_says_when_and_how_many_models_were_tried_before(tmp_path: Path) -> None:
    assert test_reads.sentence([], "first") is None
    test_reads.record(tmp_path, "first", 100)
    test_reads.record(tmp_path, "second", 100)
    reads = test_reads.read(tmp_path)
    once, again = test_reads.sentence(reads, "first"), test_reads.sentence(reads, "second")
    assert once is not None
    assert again is not None
    assert "once" in once
    assert reads[0]["time"] in once
    assert "other models or settings: 1." in again
