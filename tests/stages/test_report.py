"""Stage 8 on a run whose predictions are made up."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rellax_ds import metrics
from rellax_ds.errors import ArtifactError
from rellax_ds.schema import PREDICTIONS
from rellax_ds.stages.report import STAGE
from rellax_ds.tables import read_tables

if TYPE_CHECKING:
    from rellax_ds.artifacts import WorkDir
    from rellax_ds.config import Recipe

Run = tuple["Recipe", "WorkDir"]


def commit_predictions(work: WorkDir) -> pa.Table:
    """Noisy scores of the valid and test split, in no particular order."""
    samples = read_tables(work.stage_dir("tables")).samples
    rng = np.random.default_rng(0)
    ids = rng.permutation(np.flatnonzero(samples["split"].to_numpy() > 0))
    chosen = samples.take(ids)
    logit = chosen["label"].to_numpy() + rng.normal(size=ids.size)
    columns = {name: chosen[name].to_numpy() for name in ("user", "item", "split", "label")}
    columns |= {"sample": ids, "logit": logit}
    table = pa.table({name: pa.array(columns[name], kind) for name, kind in PREDICTIONS.items()})
    attempt = work.open("predict", {"code": "made"}, {})
    pq.write_table(table, attempt.begin() / "predictions.parquet")
    attempt.commit({})
    return table


def test_report_stage_writes_the_page_and_the_numbers(run: Run) -> None:
    recipe, work = run
    with pytest.raises(ArtifactError, match="rellax predict"):
        STAGE.run(recipe, work)
    table = commit_predictions(work)
    manifest = STAGE.run(recipe, work)
    assert set(manifest.files) == {"report.html", "report.json", "report.md"}
    found = json.loads((work.stage_dir("report") / "report.json").read_text())
    test = table["split"].to_numpy() == 2
    auc = metrics.auc(table["label"].to_numpy()[test], table["logit"].to_numpy()[test])
    assert manifest.counts["auc"]["value"] == pytest.approx(auc)
    assert found["results"][0]["auc"]["value"] == pytest.approx(auc)
    assert found["shots"]["rows"] == recipe.shards.train_rows
    assert [stage["stage"] for stage in found["stages"]][-1] == "predict"
    assert found["training"]["zero_shot"]["auc"] == 0.51
    assert STAGE.run(recipe, work) == manifest


def test_report_stage_runs_again_when_the_recipe_it_prints_changes(run: Run) -> None:
    recipe, work = run
    commit_predictions(work)
    first = STAGE.run(recipe, work)
    renamed = recipe.model_copy(update={"description": "another"})
    assert STAGE.run(renamed, work).key != first.key
