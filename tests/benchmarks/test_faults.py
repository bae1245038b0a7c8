"""The fault benchmark's own gate: it must see what it is there to see."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from benchmarks.faults import Bench, Run
from benchmarks.report import Report

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    made = Bench(tmp_path, tmp_path / "recipe.yaml", "embeddings", random.Random(0), Report("t"))
    made.digests = commit(Run(made, "undisturbed"), "1")
    return made


def commit(run: Run, text: str) -> dict[str, str]:
    """Commit stages 1 and 2 with a file of that text; their digests."""
    for stage in ("tables", "embeddings"):
        attempt = run.work.open(stage, {"p": text}, {})
        (attempt.begin() / "data").write_text(text)
        attempt.commit({})
    return {s: run.work.require(s).content for s in ("tables", "embeddings")}


def settled(bench: Bench, run: Run) -> list[str]:
    bench.settle("actor killed", run, ["embeddings at 3"])
    return bench.page.failures


def test_settle_equal_run_is_a_fault_survived(bench: Bench) -> None:
    run = Run(bench, "run")
    commit(run, "1")
    assert settled(bench, run) == []
    assert bench.rows == [["actor killed", "embeddings at 3", "yes"]]


def test_settle_other_bytes_are_no_survival(bench: Bench) -> None:
    run = Run(bench, "run")
    commit(run, "2")
    assert "other digests in tables, embeddings" in settled(bench, run)[0]
    assert bench.rows[0][2] == "no"


def test_settle_record_written_twice_is_no_survival(bench: Bench) -> None:
    run = Run(bench, "run")
    commit(run, "1")
    record = run.work.root / ".running" / "2_embeddings-x" / "part-00000.committed.json"
    record.parent.mkdir(parents=True)
    for _ in range(2):
        record.with_suffix(".new").write_text("{}")
        record.with_suffix(".new").replace(record)
        run.witness()
    failure = settled(bench, run)[0]
    assert "part-00000.committed.json was written again" in failure
    assert ".running is left over" in failure
