"""Stage 2, embeddings: item text to one unit vector per item."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from rellax_ds import assets, runtime, schema
from rellax_ds.partitions import drop_records, run_partitions, split_rows
from rellax_ds.retrieval import item_text
from rellax_ds.retrieval.encoder import ItemEncoder, check_encoder, distinct_texts, finish_vectors
from rellax_ds.stages.stage import Stage, StageContext
from rellax_ds.tables import read_parquet

if TYPE_CHECKING:
    import pyarrow as pa

    from rellax_ds.config import Recipe


def build(context: StageContext) -> dict[str, Any]:
    """Encode the distinct item texts on Ray, then merge, project and normalise."""
    settings = context.recipe.embeddings
    items_path = context.input("tables") / "items.parquet"
    items = read_parquet(items_path, schema.ITEMS)
    texts, position = distinct_texts(item_text.render(items, settings.text))
    _warn_of_empty(items, position)
    encoder = _encoder(context.recipe)
    check_encoder(encoder.reference)
    records = run_partitions(
        "embeddings",
        split_rows(len(texts), settings.partition_rows),
        ItemEncoder,
        {
            "items_path": str(items_path),
            "template": settings.text,
            "model": encoder.reference,
            "batch_size": settings.batch_size,
            "max_tokens": settings.max_tokens,
            "device": settings.device,
        },
        context.directory,
        context.key,
        num_gpus=1.0 if settings.device == "cuda" else 0.0,
    )
    parts = [np.load(context.directory / f"{record.name}.npy") for record in records]
    encoded = np.concatenate(parts) if parts else np.zeros((0, 1), np.float32)
    vectors = finish_vectors(encoded, position, settings.dimensions)
    np.save(context.directory / "item_vectors.npy", vectors)
    drop_records(context.directory, records, files=True)
    return {
        "items": items.num_rows,
        "texts": len(texts),
        "without_text": int(np.count_nonzero(position < 0)),
        "encoder_dimensions": int(encoded.shape[1]),
        "dimensions": int(vectors.shape[1]),
        "encoder": encoder.name,
        "encoder_source": encoder.source,
    }


def _warn_of_empty(items: pa.Table, position: np.ndarray[Any, Any]) -> None:
    empty = np.flatnonzero(position < 0)
    if empty.size:
        runtime.logger.warning(
            "embeddings: %d of %d items have no text and get a zero vector, which is similar to "
            "nothing (first: item_id %s)",
            empty.size,
            items.num_rows,
            items.column("item_id")[int(empty[0])].as_py(),
        )


def _encoder(recipe: Recipe) -> assets.Asset:
    name = recipe.embeddings.encoder
    return assets.resolve_model(recipe.model.backbone if name == "backbone" else name)


def _identities(recipe: Recipe) -> dict[str, str]:
    return {"encoder": _encoder(recipe).identity}


STAGE = Stage(
    name="embeddings",
    version=1,
    sections=("embeddings",),
    inputs=lambda _recipe: ("tables",),
    build=build,
    identities=_identities,
)
