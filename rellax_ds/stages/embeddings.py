"""Stage 2, embeddings: item text to one unit vector per item.

The vectors of the texts are part of the artefact, so the next run encodes new texts only; its
output is the one that encoding everything would give, see `retrieval.encoder`.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

from rellax_ds import assets, runtime, schema
from rellax_ds.config import digest
from rellax_ds.partitions import PartitionRecord, drop_records, run_partitions, split_rows
from rellax_ds.retrieval import item_text, text_vectors
from rellax_ds.retrieval.encoder import ItemEncoder, check_encoder, distinct_texts, finish_vectors
from rellax_ds.stages.stage import Stage, StageContext
from rellax_ds.tables import read_parquet

if TYPE_CHECKING:
    from pathlib import Path

    import pyarrow as pa
    from numpy.typing import NDArray

    from rellax_ds.config import Recipe


def build(context: StageContext) -> dict[str, Any]:
    """Encode the texts that the last artefact has no vector of, then project and normalise."""
    settings = context.recipe.embeddings
    items = read_parquet(context.input("tables") / "items.parquet", schema.ITEMS)
    texts, position = distinct_texts(item_text.render(items, settings.text))
    _warn_of_empty(items, position)
    encoder = _encoder(context.recipe)
    digests = text_vectors.text_digests(texts)
    made_by = text_vectors.origin(encoder.identity, settings.max_tokens, settings.device)
    known = text_vectors.read_known(
        context.work.stage_dir("embeddings"), context.work.manifest("embeddings"), made_by
    )
    row = known.find(digests) if known else np.full(len(texts), -1, np.int64)
    new = np.flatnonzero(row < 0)
    new = new[text_vectors.by_length([texts[n] for n in new])]
    if known:
        runtime.logger.info(
            "embeddings: %d of %d texts have a vector, %d are new",
            len(texts) - new.size,
            len(texts),
            new.size,
        )
    parts = _encode(context, encoder, [texts[n] for n in new], digests[new])
    encoded = _gather(context.directory / text_vectors.VECTORS, row, known, new, parts)
    text_vectors.write_known(context.directory, digests, made_by)
    vectors = finish_vectors(encoded, position, settings.dimensions)
    np.save(context.directory / "item_vectors.npy", vectors)
    drop_records(context.directory, parts, files=True)
    return {
        "items": items.num_rows,
        "texts": len(texts),
        "encoded": int(new.size),
        "without_text": int(np.count_nonzero(position < 0)),
        "encoder_dimensions": int(encoded.shape[1]),
        "dimensions": int(vectors.shape[1]),
        "encoder": encoder.name,
        "encoder_source": encoder.source,
    }


def _encode(
    context: StageContext, encoder: assets.Asset, texts: list[str], digests: NDArray[np.uint8]
) -> list[PartitionRecord]:
    """Vectors of `texts`, as partitions on Ray."""
    if not texts:
        return []
    settings = context.recipe.embeddings
    check_encoder(encoder.reference)
    path = context.directory / "new_texts.arrow"
    text_vectors.write_texts(path, texts)
    records = run_partitions(
        "embeddings",
        split_rows(len(texts), settings.partition_rows),
        ItemEncoder,
        {
            "texts_path": str(path),
            "model": encoder.reference,
            "batch_size": settings.batch_size,
            "max_tokens": settings.max_tokens,
            "device": settings.device,
        },
        context.directory,
        # What is new depends on the artefact being replaced, which the stage's key does not know.
        digest({"stage": context.key, "texts": hashlib.sha256(digests.tobytes()).hexdigest()}),
        num_gpus=1.0 if settings.device == "cuda" else 0.0,
        unit="texts",
    )
    path.unlink()
    return records


def _gather(
    path: Path,
    row: NDArray[np.int64],
    known: text_vectors.TextVectors | None,
    new: NDArray[np.int64],
    parts: list[PartitionRecord],
) -> NDArray[np.float32]:
    """Kept and new vectors in the order of the texts, float32 [num_texts, d], also at `path`."""
    fresh = [np.load(path.parent / f"{part.name}.npy", mmap_mode="r") for part in parts]
    sources = [*fresh, *([known.vectors] if known else [])]
    width = sources[0].shape[1] if sources else 1
    vectors = np.zeros((len(row), width), np.float32)
    if known:
        vectors[row >= 0] = known.vectors[row[row >= 0]]
    start = 0
    for part in fresh:
        vectors[new[start : start + len(part)]] = part
        start += len(part)
    np.save(path, vectors)
    return vectors


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
    version=2,
    sections=("embeddings",),
    inputs=lambda _recipe: ("tables",),
    build=build,
    identities=_identities,
)
