"""Stage 1, tables: raw files to users, items, events and samples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rellax_ds import assets, runtime, schema
from rellax_ds.stages.stage import Stage, StageContext
from rellax_ds.tables import generic, oracles, readers, split, write_tables

if TYPE_CHECKING:
    from rellax_ds.config import Recipe


def build(context: StageContext) -> dict[str, Any]:
    """Read the log, split it, compare it with what is published, and write the four tables."""
    data = context.recipe.data
    sources = _sources(context.recipe)
    for source in sources.values():
        runtime.logger.info("tables: reading %s (%s)", source.reference, source.source)
    folder = Path(next(iter(sources.values())).reference)
    tables = split.build_tables(readers.read_log(data, folder), data)
    published = oracles.check(data, tables)
    write_tables(tables, context.directory)
    counts: dict[str, Any] = oracles.count(tables)
    runtime.logger.info(
        "tables: %d users, %d items, %d events, %d samples (train %d, valid %d, test %d)",
        *(counts[name] for name in ("users", "items", "events", "samples", *schema.SPLITS)),
    )
    runtime.logger.info("tables: published counts: %s", published)
    origin = ", ".join(source.source for source in sources.values())
    return counts | {"source": origin, "published_counts": published}


def _sources(recipe: Recipe) -> dict[str, assets.Asset]:
    """The raw files by what they are: one folder, or the files of a generic log."""
    data = recipe.data
    if data.dataset == "generic":
        return {
            f"raw {role}": assets.resolve_dataset(path)
            for role, path in generic.files(data).items()
        }
    return {"raw files": assets.resolve_dataset(data.path or data.dataset)}


def _identities(recipe: Recipe) -> dict[str, str]:
    return {name: source.identity for name, source in _sources(recipe).items()}


STAGE = Stage(
    name="tables",
    version=2,
    # Not `data.path` nor file names: the raw files' identities stand for them, so a moved folder is
    # the same input.
    sections=(
        "data.dataset",
        "data.columns",
        "data.label_threshold",
        "data.label_inclusive",
        "data.drop_implicit",
        "data.min_history",
        "data.split",
        "data.split_by",
        "data.split_seed",
        "data.samples_per_user",
        "data.strict_time",
        "data.freeze_history",
    ),
    inputs=lambda _recipe: (),
    build=build,
    identities=_identities,
)
