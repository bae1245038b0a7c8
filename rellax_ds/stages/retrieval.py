"""Stage 3, retrieval: SUBR's top-K history of every sample, and how mixed it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from rellax_ds import runtime, schema
from rellax_ds.artifacts import write_json
from rellax_ds.partitions import PartitionRecord, drop_records, run_partitions, split_rows
from rellax_ds.retrieval.heterogeneity import heterogeneity
from rellax_ds.retrieval.subr import Retriever
from rellax_ds.stages.stage import Stage, StageContext
from rellax_ds.tables import read_parquet, read_tables

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def build(context: StageContext) -> dict[str, Any]:
    """Retrieve on Ray, merge the parts in order and measure the heterogeneity."""
    settings = context.recipe.retrieval
    folder = context.input("tables")
    tables = read_tables(folder)
    records = run_partitions(
        "retrieval",
        split_rows(tables.samples.num_rows, settings.partition_rows),
        Retriever,
        {
            "events_path": str(folder / "events.parquet"),
            "samples_path": str(folder / "samples.parquet"),
            "vectors_path": str(context.input("embeddings") / "item_vectors.npy"),
            "num_retrieved": settings.num_retrieved,
        },
        context.directory,
        context.key,
    )
    path = context.directory / "retrieved.parquet"
    merge(records, context.directory, path)
    drop_records(context.directory, records, files=True)

    retrieved = read_parquet(path, schema.RETRIEVED)
    at = [k for k in settings.heterogeneity_at if k <= settings.num_retrieved]
    figures = heterogeneity(tables.items, tables.events, tables.samples, retrieved, at)
    write_json(context.directory / "heterogeneity.json", figures)
    runtime.logger.info("retrieval: mean distinct first genres in the K events of test samples")
    runtime.logger.info("  %-9s %s", "K", "".join(f"{k:>7d}" for k in at))
    for name, row in figures.items():
        runtime.logger.info("  %-9s %s", name, "".join(f"{value:7.2f}" for value in row.values()))
    return {
        "samples": retrieved.num_rows,
        "events": sum(record.counts["events"] for record in records),
        "heterogeneity": figures,
    }


def merge(records: Sequence[PartitionRecord], directory: Path, path: Path) -> None:
    """Join the parts in order into one file, one part in memory at a time."""
    with pq.ParquetWriter(path, _ARROW_SCHEMA, compression="zstd") as writer:
        for record in records:
            writer.write_table(pq.read_table(directory / f"{record.name}.parquet"))


_ARROW_SCHEMA = pa.schema(list(schema.RETRIEVED.items()))

STAGE = Stage(
    name="retrieval",
    version=1,
    sections=("retrieval",),
    inputs=lambda _recipe: ("tables", "embeddings"),
    build=build,
)
