"""Scores of a split are the same on any number of ranks, each sample counted once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from ranks import run_job

from rellax_ds import metrics

ROWS = 10_003


@pytest.mark.distributed
def test_metrics_of_one_two_and_four_ranks_equal_those_of_all_rows(tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    users, labels = random.integers(0, 900, ROWS), random.integers(0, 2, ROWS)
    logits = np.round(random.normal(size=ROWS) + labels, 1)  # many ties
    np.save(tmp_path / "rows.npy", np.stack([users, labels, logits], 1).astype(np.float64))
    job = Path(__file__).with_name("score_job.py")
    run_job(job, str(tmp_path / "rows.npy"), str(tmp_path))
    expected = {
        "auc": metrics.auc(labels, logits),
        "log_loss": metrics.log_loss(labels, logits),
        "accuracy": metrics.accuracy(labels, logits),
        "gauc": metrics.gauc(users, labels, logits).value,
        "ndcg_10": metrics.ndcg(users, labels, logits),
    }
    for ranks in (1, 2, 4):
        found = json.loads((tmp_path / f"{ranks}.json").read_text())
        assert found["ids"] == list(range(ROWS))
        assert found["paired"], "the recommender's logits stay with their rows"
        assert len(found["metrics"]) == ranks
        for everywhere in found["metrics"]:
            assert everywhere == pytest.approx(expected, abs=1e-12)
