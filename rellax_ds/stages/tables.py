"""Stage 1, tables: raw files to users, items, events and samples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rellax_ds import assets, runtime, schema
from rellax_ds.stages.stage import Stage, StageContext
from rellax_ds.tables import movielens, split, write_tables

if TYPE_CHECKING:
    from rellax_ds.config import Recipe


def build(context: StageContext) -> dict[str, Any]:
    """Read the log, split it and write the four tables."""
    data = context.recipe.data
    source = _source(context.recipe)
    runtime.logger.info("tables: reading %s (%s)", source.reference, source.source)
    tables = split.build_tables(movielens.read(Path(source.reference)), data)
    write_tables(tables, context.directory)
    of_split = tables.samples.column("split").to_numpy()
    label = tables.samples.column("label").to_numpy()
    sizes = np.bincount(of_split, minlength=len(schema.SPLITS))
    likes = np.bincount(of_split[label == 1], minlength=len(schema.SPLITS))
    counts: dict[str, Any] = {
        "users": tables.users.num_rows,
        "items": tables.items.num_rows,
        "events": tables.events.num_rows,
        "samples": tables.samples.num_rows,
        "source": source.source,
    }
    for name, size, liked in zip(schema.SPLITS, sizes, likes, strict=True):
        counts[name] = int(size)
        counts[f"{name}_likes"] = int(liked)
    runtime.logger.info(
        "tables: %d users, %d items, %d events, %d samples (train %d, valid %d, test %d)",
        *(counts[name] for name in ("users", "items", "events", "samples", *schema.SPLITS)),
    )
    return counts


def _source(recipe: Recipe) -> assets.Asset:
    return assets.resolve_dataset(recipe.data.path or recipe.data.dataset)


def _identities(recipe: Recipe) -> dict[str, str]:
    return {"raw files": _source(recipe).identity}


STAGE = Stage(
    name="tables",
    version=1,
    # Not `data.path`: the raw files' identity stands for it, so a moved folder is the same input.
    sections=(
        "data.dataset",
        "data.label_threshold",
        "data.min_history",
        "data.split",
        "data.strict_time",
        "data.freeze_history",
    ),
    inputs=lambda _recipe: (),
    build=build,
    identities=_identities,
)
