"""Heterogeneity against a plain loop, and against the published figures of the real data."""

import itertools

import numpy as np
import pyarrow as pa
import pytest

from rellax_ds import assets, schema
from rellax_ds.config import DataConfig, EmbeddingsConfig
from rellax_ds.errors import AssetError
from rellax_ds.retrieval import subr
from rellax_ds.retrieval.encoder import ItemEncoder, distinct_texts, finish_vectors
from rellax_ds.retrieval.heterogeneity import heterogeneity
from rellax_ds.retrieval.item_text import render
from rellax_ds.retrieval.similarity import quantise
from rellax_ds.tables import movielens
from rellax_ds.tables.split import build_tables
from rellax_ds.testing import made_tables

AT = (5, 10, 15, 20, 25, 30)
RECENT = (3.18, 4.62, 5.55, 6.27, 6.84, 7.33)
RETRIEVED = (2.55, 3.73, 4.53, 5.16, 5.69, 6.13)


def retrieve(tables, vectors, k):
    columns = (
        tables.samples[name].to_numpy().astype(np.int64)
        for name in ("item", "history_start", "history_end")
    )
    offsets, events, similarity = subr.retrieve(
        quantise(vectors), tables.events["item"].to_numpy().astype(np.int64), *columns, k
    )
    return pa.table(
        [
            pa.array(np.arange(tables.samples.num_rows)),
            pa.LargeListArray.from_arrays(offsets, events),
            pa.LargeListArray.from_arrays(offsets, similarity),
        ],
        schema=pa.schema(list(schema.RETRIEVED.items())),
    )


def pieces(table):
    """The table in pieces of uneven size."""
    cuts = [0, 3, 20, table.num_rows]
    return (table.slice(a, b - a) for a, b in itertools.pairwise(cuts))


@pytest.mark.parametrize("freeze_history", [False, True])
def test_heterogeneity_equals_a_plain_loop(tmp_path, freeze_history):
    tables = made_tables(
        tmp_path,
        num_users=12,
        num_items=30,
        num_events=250,
        config=DataConfig(freeze_history=freeze_history),
    )
    vectors = np.random.default_rng(0).normal(size=(30, 4))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    vectors[10:20] = vectors[20:30]
    found = heterogeneity(
        tables.items, tables.events, tables.samples, pieces(retrieve(tables, vectors, 8)), (1, 3, 8)
    )

    genre = np.array(tables.items["genre"].to_pylist())[tables.events["item"].to_numpy()]
    item = tables.events["item"].to_numpy()
    for k in (1, 3, 8):
        recent, retrieved = [], []
        for row in tables.samples.to_pylist():
            if row["split"] != schema.SPLITS.index("test"):
                continue
            history = range(row["history_start"], row["history_end"])
            recent.append(len(set(genre[history[-k:]]) if history else ()))
            score = {e: np.float32(vectors[item[e]] @ vectors[row["item"]]) for e in history}
            best = sorted(history, key=lambda e: (-round(float(score[e]), 5), -e))[:k]
            retrieved.append(len({genre[e] for e in best}))
        assert found["recent"][str(k)] == pytest.approx(np.mean(recent))
        assert found["retrieved"][str(k)] == pytest.approx(np.mean(retrieved))


@pytest.fixture(scope="module")
def real_tables():
    try:
        folder = assets.resolve_dataset("movielens-100k").path
    except AssetError as error:
        pytest.skip(str(error))
    return build_tables(movielens.read(folder), DataConfig())


@pytest.mark.assets
@pytest.mark.slow
def test_heterogeneity_movielens_100k_meets_the_published_figures(real_tables, tmp_path):
    try:
        model = assets.resolve_model("all-minilm-l6-v2").reference
    except AssetError as error:
        pytest.skip(str(error))
    settings = EmbeddingsConfig()
    encoder = ItemEncoder(
        texts_path=str(tmp_path / "texts.arrow"),
        model=model,
        batch_size=settings.batch_size,
        max_tokens=settings.max_tokens,
        device="cpu",
    )
    texts, position = distinct_texts(render(real_tables.items, settings.text))
    vectors = finish_vectors(encoder.encode(texts), position, None)

    def measure(vectors):
        found = heterogeneity(
            real_tables.items,
            real_tables.events,
            real_tables.samples,
            [retrieve(real_tables, vectors, max(AT))],
            AT,
        )
        return (np.array(list(found[name].values())) for name in ("recent", "retrieved"))

    recent, retrieved = measure(vectors)
    np.testing.assert_allclose(recent, RECENT, atol=0.005)
    np.testing.assert_allclose(retrieved, RETRIEVED, atol=0.01)
    # Vectors of the wrong items, here shifted by one, must not look like a retrieval.
    _, shifted = measure(np.roll(vectors, 1, axis=0))
    assert (retrieved < shifted).all()
    assert recent[0] - retrieved[0] >= 0.4
