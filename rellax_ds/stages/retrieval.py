"""Stage 3, retrieval: SUBR's top-K history of every sample, and how mixed it is."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from rellax_ds import runtime
from rellax_ds.artifacts import write_json
from rellax_ds.partitions import drop_records, run_partitions
from rellax_ds.retrieval.heterogeneity import heterogeneity
from rellax_ds.retrieval.partition import Retriever, cut, merge, prepare
from rellax_ds.stages.stage import Stage, StageContext

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

COLUMNS = "columns"
"""Folder of the arrays that workers map; gone from the artefact."""

_GROUPS = 16


def build(context: StageContext) -> dict[str, Any]:
    """Retrieve on Ray, merge the parts and measure the heterogeneity."""
    settings = context.recipe.retrieval
    tables, columns = context.input("tables"), context.directory / COLUMNS
    vectors = context.input("embeddings") / "item_vectors.npy"
    prepare(tables, vectors, columns)
    records = run_partitions(
        "retrieval",
        cut(columns, settings.partition_rows),
        Retriever,
        {
            "columns": str(columns),
            "vectors_path": str(vectors),
            "num_retrieved": settings.num_retrieved,
            "device": settings.device,
        },
        context.directory,
        context.key,
        num_gpus=1.0 if settings.device == "cuda" else 0.0,
        unit="samples",
    )
    path = context.directory / "retrieved.parquet"
    num_samples = pq.read_metadata(tables / "samples.parquet").num_rows
    merge([context.directory / f"{record.name}.parquet" for record in records], path, num_samples)
    at = [k for k in settings.heterogeneity_at if k <= settings.num_retrieved]
    figures = measure(tables, path, at)
    write_json(context.directory / "heterogeneity.json", figures)
    _log(at, figures)
    drop_records(context.directory, records, files=True)
    shutil.rmtree(columns)
    return {
        "samples": num_samples,
        "events": sum(record.counts["events"] for record in records),
        "heterogeneity": figures,
    }


def measure(tables: Path, retrieved: Path, at: Sequence[int]) -> dict[str, dict[str, float]]:
    """Heterogeneity of the test samples, a few row groups of the retrieved lists at a time."""
    wanted = {
        "items": ["genre"],
        "events": ["item"],
        "samples": ["split", "history_start", "history_end"],
    }
    read = {
        name: pq.read_table(tables / f"{name}.parquet", columns=c) for name, c in wanted.items()
    }
    file = pq.ParquetFile(retrieved)
    numbers = range(file.num_row_groups)
    pieces = (file.read_row_groups(numbers[n : n + _GROUPS]) for n in numbers[::_GROUPS])
    return heterogeneity(read["items"], read["events"], read["samples"], pieces, at)


def _log(at: Sequence[int], figures: Mapping[str, Mapping[str, float]]) -> None:
    runtime.logger.info("retrieval: mean distinct first genres in the K events of test samples")
    runtime.logger.info("  %-9s %s", "K", "".join(f"{k:>7d}" for k in at))
    for name, row in figures.items():
        runtime.logger.info("  %-9s %s", name, "".join(f"{value:7.2f}" for value in row.values()))


STAGE = Stage(
    name="retrieval",
    version=2,
    sections=("retrieval",),
    inputs=lambda _recipe: ("tables", "embeddings"),
    build=build,
)
