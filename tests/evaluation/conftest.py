"""A made-up run: real tables, planted scores, everything a report is made from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from rellax_ds.artifacts import STAGES, Manifest
from rellax_ds.config import parse_recipe
from rellax_ds.evaluation.baselines import Log
from rellax_ds.evaluation.findings import Evidence
from rellax_ds.tables import write_tables
from rellax_ds.testing import made_tables

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    made = made_tables(tmp_path_factory.mktemp("raw"), num_users=40, num_events=2000)
    write_tables(made, folder)
    return folder


@pytest.fixture(scope="session")
def log(tables: Path) -> Log:
    return Log.read(tables)


@pytest.fixture
def evidence(log: Log) -> Evidence:
    """Scores of every valid and every second test sample; the recommender is planted better."""
    rng = np.random.default_rng(0)
    user = np.unique(log.history_start, return_inverse=True)[1]
    noise = rng.normal(size=(2, log.label.size))
    crm = 2.0 * (log.label - 0.5) + noise[0]
    valid, test = (np.flatnonzero(log.split == split) for split in (1, 2))
    scored = np.r_[valid, test[::2]]
    train = np.flatnonzero(log.split == 0)
    manifests = {
        stage: Manifest(
            stage=stage,
            key="k",
            parts={},
            files={"a": {"bytes": 3 << 20, "sha256": "0"}},
            content=f"{number:x}" * 64,
            counts={"rows": 10 + number},
            versions={"python": "3.12.1", "torch": "2.13.0"},
            commit="c0ffee0123456789+",
            seconds=61.5 + number,
            peak_memory_bytes=5 << 28,
            recipe={},
        )
        for number, stage in enumerate(STAGES[:-1])
    }
    recipe = parse_recipe(
        {"name": "made", "description": "made up", "predict": {"bootstrap": 60}}, "test"
    )
    return Evidence(
        recipe=recipe,
        log=log,
        user=user.astype(np.int64),
        scored=scored,
        logits=(1.2 * (log.label - 0.5) + noise[1])[scored],
        crm_logits=crm,
        crm={"holdout_start": None},
        heterogeneity={"recent": {"5": 3.18, "10": 4.62}, "retrieved": {"5": 2.55, "10": 3.73}},
        shots=train[:100],
        training=[
            {"event": "valid", "step": 0, "auc": 0.611, "log_loss": 0.7, "accuracy": 0.5},
            {"event": "step", "step": 1, "loss": 0.69},
            {"event": "step", "step": 2, "loss": None},
            {"event": "step", "step": 3, "loss": 0.66},
            {"event": "valid", "step": 3, "auc": 0.722, "log_loss": 0.6, "accuracy": 0.6},
        ],
        gates=[
            {"layer": f"layers.{n}.self_attn.{kind}", "mean": 0.1 * n + 0.05, "std": 0.02}
            for n in range(3)
            for kind in ("q_proj", "v_proj")
        ],
        prompts=[
            {
                "event": "prompt",
                "step": 0,
                "sample": 7,
                "prompt": "Seen <b>it</b>? Yes",
                "label": 1,
            },
            {"event": "valid", "step": 0, "sample": 7, "label": 1, "probability": 0.444},
            {"event": "valid", "step": 3, "sample": 7, "label": 1, "probability": 0.888},
        ],
        manifests=manifests,
    )
