"""Stage 7, predict: adapter and shards to one score for every valid and test sample."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from rellax_ds.assets import resolve_model
from rellax_ds.evaluation import predict, test_reads
from rellax_ds.partitions import drop_records, run_partitions
from rellax_ds.schema import SPLITS
from rellax_ds.shards.read import ShardReader
from rellax_ds.stages.stage import Stage, StageContext

if TYPE_CHECKING:
    from rellax_ds.config import Recipe


def _identities(recipe: Recipe) -> dict[str, str]:
    return {"backbone": resolve_model(recipe.model.backbone).identity}


def build(context: StageContext) -> dict[str, Any]:
    """Score the partitions on Ray, merge them and check that nothing is missing or doubled."""
    recipe, shards = context.recipe, context.input("shards")
    readers = {split: ShardReader.open(shards, split) for split in predict.SCORED_SPLITS}
    settings = {
        "shards": str(shards),
        "adapter": str(context.input("train") / "adapter"),
        "backbone": resolve_model(recipe.model.backbone).reference,
        "device": recipe.predict.device,
        "precision": recipe.train.precision,
        "batch_size": recipe.predict.batch_size,
    }
    records = run_partitions(
        "predict",
        predict.partitions(readers, recipe.predict.batch_size, recipe.predict.partition_rows),
        predict.PredictWorker,
        settings,
        context.directory,
        context.key,
        num_gpus=1.0 if recipe.predict.device == "cuda" else 0.0,
    )
    paths = [context.directory / name for record in records for name in record.files]
    table = predict.merge(paths, predict.expected_samples(readers))
    pq.write_table(table, context.directory / "predictions.parquet")
    test_reads.record(context.work.root, context.key, len(readers[SPLITS[-1]]))
    drop_records(context.directory, records, files=True)
    return {split: len(reader) for split, reader in readers.items()}


STAGE = Stage(
    name="predict",
    version=1,
    sections=(
        "model.backbone",
        "train.precision",
        "predict.batch_size",
        "predict.partition_rows",
        "predict.device",
    ),
    inputs=lambda _recipe: ("shards", "train"),
    build=build,
    identities=_identities,
)
