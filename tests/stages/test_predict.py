"""Stage 7 on real shards and a real, tiny LLM."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from rellax_ds.errors import CheckpointError
from rellax_ds.evaluation import predict
from rellax_ds.model import adapter_io
from rellax_ds.partitions import process
from rellax_ds.schema import PREDICTIONS, check_table
from rellax_ds.shards.collate import Collator
from rellax_ds.shards.read import ShardReader
from rellax_ds.stages.predict import STAGE

if TYPE_CHECKING:
    from rellax_ds.artifacts import WorkDir
    from rellax_ds.config import Recipe
    from rellax_ds.model.rellax import ReLLaX

Run = tuple["Recipe", "WorkDir"]


@pytest.fixture(scope="module")
def model(trained: Run) -> ReLLaX:
    recipe, work = trained
    return adapter_io.load(work.stage_dir("train") / "adapter", recipe.model.backbone)


def readers(work: WorkDir) -> dict[str, ShardReader]:
    folder = work.stage_dir("shards")
    return {split: ShardReader.open(folder, split) for split in predict.SCORED_SPLITS}


def worker(recipe: Recipe, work: WorkDir, batch_size: int) -> predict.PredictWorker:
    return predict.PredictWorker(
        shards=str(work.stage_dir("shards")),
        adapter=str(work.stage_dir("train") / "adapter"),
        backbone=recipe.model.backbone,
        device="cpu",
        precision="fp32",
        batch_size=batch_size,
    )


@pytest.mark.ray
def test_predict_stage_scores_every_valid_and_test_sample_once(run: Run, model: ReLLaX) -> None:
    recipe, work = run
    manifest = STAGE.run(recipe, work)
    assert manifest.counts == {"valid": 32, "test": 40}
    assert set(manifest.files) == {"predictions.parquet"}
    path = work.stage_dir("predict") / "predictions.parquet"
    table = check_table(pq.read_table(path), PREDICTIONS, str(path)).to_pydict()
    opened = readers(work)
    wanted = [
        (split, sample, label)
        for split, reader in zip((1, 2), opened.values(), strict=True)
        for sample, label in sorted(
            zip((int(k) for k in reader.keys), reader.labels.tolist(), strict=True)
        )
    ]
    assert list(zip(table["split"], table["sample"], table["label"], strict=True)) == wanted
    # One sample at a time gives the same logits: the batch does not matter.
    collate = Collator(opened["test"].index)
    samples = [reader[n] for reader in opened.values() for n in range(len(reader))]
    ids, alone = predict.score(model, (collate([sample]) for sample in samples))
    by_id = dict(zip(table["sample"], table["logit"], strict=True))
    assert np.abs(alone - [by_id[n] for n in ids.tolist()]).max() < 1e-4
    assert np.std(alone) > 0.01
    assert STAGE.run(recipe, work) == manifest


@pytest.mark.parametrize(("batch_size", "partition_rows"), [(16, 16), (3, 9), (16, 1000)])
def test_partitions_cover_every_sample_once_at_any_size(
    trained: Run, tmp_path: Path, batch_size: int, partition_rows: int
) -> None:
    recipe, work = trained
    opened, scorer = readers(work), worker(recipe, work, batch_size)
    parts = predict.partitions(opened, batch_size, partition_rows)
    for part in reversed(parts):
        process(scorer, part, tmp_path, "key")
    paths = sorted(tmp_path.glob("*.parquet"))
    assert len(paths) == len(parts)
    table = predict.merge(paths, predict.expected_samples(opened))
    assert table.num_rows == 72
    for path in paths:
        assert pq.read_metadata(path).num_rows <= max(partition_rows, batch_size)


def test_scores_do_not_depend_on_how_batches_are_shared_out(trained: Run, tmp_path: Path) -> None:
    recipe, work = trained
    opened, scorer = readers(work), worker(recipe, work, 8)
    tables = []
    for rows in (8, 24):
        folder = tmp_path / str(rows)
        folder.mkdir()
        for part in predict.partitions(opened, 8, rows):
            process(scorer, part, folder, "key")
        tables.append(
            predict.merge(list(folder.glob("*.parquet")), predict.expected_samples(opened))
        )
    assert tables[0].equals(tables[1])  # bit for bit


def test_score_of_a_diverged_model_names_the_sample(trained: Run, model: ReLLaX) -> None:
    _, work = trained
    reader = readers(work)["test"]
    batch = Collator(reader.index)([reader[0], reader[1]])
    centre = model.centre.clone()
    model.centre.fill_(float("nan"))
    try:
        with pytest.raises(CheckpointError, match=f"sample {reader[0].id} is not finite"):
            predict.score(model, [batch])
    finally:
        model.centre.copy_(centre)


def test_worker_leaves_one_thread_to_an_actor_on_cpu(trained: Run) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        worker(*trained, batch_size=4)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
