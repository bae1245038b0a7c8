"""The FAISS index against exact integers and against the exact engine: bit-equal when flat, causal
always, good recall otherwise, and a process of its own without torch.
"""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rellax_ds.errors import ConfigError, TableError
from rellax_ds.retrieval import faiss_index, subr
from rellax_ds.retrieval.faiss_index import FaissActor, HistoryIndex, IndexOptions
from rellax_ds.retrieval.similarity import quantise
from rellax_ds.runtime import child_environment
from rellax_ds.tables import synthetic

faiss = pytest.importorskip("faiss")

KINDS = ("flat", "ivf", "hnsw")
# One user with a long history of a catalogue with planted topics.
LONG = synthetic.Spec(num_users=1, num_items=4_000, num_events=6_000, min_events=6_000)


def unit(rows):
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0).astype(np.float32)


def exact(vectors, queries, ends, k):
    """Cosines of whole numbers, rounded to float32 and ranked: the later of equals first."""
    whole, target = (np.rint(rows.astype(np.float64) * 2**26) for rows in (vectors, queries))
    positions = np.full((len(queries), k), -1)
    similarity = np.full((len(queries), k), -np.inf, np.float32)
    for row, end in enumerate(ends):
        value = (whole[:end] @ target[row] / 2**52).astype(np.float32)
        best = np.lexsort((-np.arange(end), -value))[:k]
        positions[row, : best.size], similarity[row, : best.size] = best, value[best]
    return positions, similarity


def long_history(dimensions=32):
    vectors = synthetic.item_vectors(LONG, 0, dimensions)
    return vectors, synthetic.event_columns(LONG, 0)["item"].astype(np.int64)


def options(kind):
    return IndexOptions(kind, num_lists=32, num_probes=8)


@st.composite
def problems(draw):
    """A history with exact copies and near copies, and queries that see any part of it."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dimensions = draw(st.integers(1, 40))
    base = unit(rng.normal(size=(draw(st.integers(1, 12)), dimensions)))
    rows = base[rng.integers(len(base), size=draw(st.integers(1, 900)))]
    if draw(st.booleans()):
        rows = unit(rows + rng.normal(size=rows.shape) * 1e-8)
    rows[rng.random(len(rows)) < 0.05] = 0
    num_queries = draw(st.integers(1, 8))
    queries = rows[rng.integers(len(rows), size=num_queries)]
    return rows, queries, rng.integers(0, len(rows) + 1, size=num_queries)


@settings(max_examples=150, deadline=None)
@given(problems(), st.integers(1, 20), st.sampled_from([0, 5, 512]), st.sampled_from([7, 4096]))
def test_flat_search_random_histories_equal_exact_integers(problem, k, tail, tile):
    rows, queries, ends = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faiss_index, "_TAIL", tail)
        patch.setattr(faiss_index, "_TILE_ROWS", tile)
        patch.setattr(faiss_index, "_TILE_NUMBERS", 40 * tile)
        found = HistoryIndex.build(rows).search(queries, k, ends)
    for got, wanted in zip(found, exact(rows, queries, ends, k), strict=True):
        assert (got == wanted).all()


def test_flat_search_equals_the_exact_engine_on_every_sample_of_a_long_history():
    vectors, item = long_history()
    ends = np.arange(5, LONG.num_events)
    start = np.zeros(ends.size, np.int64)
    whole = quantise(vectors)
    offsets, events, cosine = subr.retrieve(whole, item, item[ends], start, ends, 10)
    positions, similarity = HistoryIndex.build(vectors[item]).search(vectors[item[ends]], 10, ends)
    in_time = np.sort(np.where(positions < 0, LONG.num_events, positions), axis=1)
    assert (in_time[in_time < LONG.num_events] == events).all()
    assert (np.sum(positions >= 0, axis=1) == np.diff(offsets)).all()
    by_time = np.take_along_axis(similarity, np.argsort(positions, axis=1), axis=1)
    assert (by_time[np.isfinite(by_time)] == cosine).all()


def test_flat_search_an_item_repeated_often_settles_the_tie_by_time():
    vectors = unit(np.random.default_rng(0).normal(size=(3, 24)))
    history = vectors[np.tile([0, 1], 5_000)]
    positions, similarity = HistoryIndex.build(history).search(vectors[:1], 7, np.array([9_001]))
    assert positions.tolist() == [list(range(9_000, 8_986, -2))]
    assert np.unique(similarity).size == 1


@pytest.mark.parametrize("kind", KINDS)
def test_search_of_a_prefix_returns_no_later_event(kind):
    vectors, item = long_history()
    index = HistoryIndex.build(vectors[item], options(kind), vectors)
    ends = np.random.default_rng(0).integers(0, 3_000, size=200)
    positions, similarity = index.search(vectors[item[3_000:3_200]], 12, ends)
    assert (positions < ends[:, None]).all()
    assert ((positions >= 0) == np.isfinite(similarity)).all()
    if kind != "hnsw":  # the way through a graph may change, see the module
        before = HistoryIndex.build(vectors[item[:3_000]], options(kind), vectors)
        assert (before.search(vectors[item[3_000:3_200]], 12, ends)[0] == positions).all()


@pytest.mark.parametrize(("kind", "recall"), [("ivf", 0.9), ("hnsw", 0.95)])
def test_search_by_parts_finds_most_of_the_exact_events_with_their_exact_similarity(kind, recall):
    vectors, item = long_history()
    rows, queries = vectors[item[:-500]], vectors[item[-500:]]
    ends = np.full(500, len(rows))
    positions, similarity = HistoryIndex.build(rows, options(kind), vectors).search(queries, 10)
    wanted, value = exact(rows, queries, ends, 10)
    hits = (positions[:, :, None] == wanted[:, None, :]).any(axis=2)
    assert hits.mean() >= recall
    lookup = {(n, p): v for n, row in enumerate(wanted) for p, v in zip(row, value[n], strict=True)}
    for n, column in np.argwhere(hits):
        assert similarity[n, column] == lookup[n, positions[n, column]]
    assert (np.diff(similarity, axis=1) <= 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_add_one_event_at_a_time_answers_like_an_index_built_at_once(kind):
    vectors, item = long_history()
    rows = vectors[item[:400]]
    index = HistoryIndex(32, options(kind), vectors)
    for event in rows:
        index.add(event[None])
    assert len(index) == 400
    queries = vectors[item[400:450]]
    found = index.search(queries, 5)
    assert (
        found[0] == HistoryIndex.build(rows, options(kind), vectors).search(queries, 5)[0]
    ).all()
    index.add(queries[:1])
    positions, similarity = index.search(queries[:1], 1)
    assert positions.tolist() == [[400]]
    assert similarity[0, 0] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_empty_copy_of_a_full_index_holds_only_what_it_is_given(kind):
    vectors, item = long_history()
    full = HistoryIndex.build(vectors[item[:600]], options(kind), vectors)
    copied = full.empty_copy()
    copied.add(vectors[item[600:800]])
    assert (len(full), len(copied)) == (600, 200)
    expected = HistoryIndex.build(vectors[item[600:800]], options(kind), vectors)
    queries = vectors[item[800:850]]
    assert (copied.search(queries, 5)[0] == expected.search(queries, 5)[0]).all()


def test_search_of_an_empty_or_short_history_is_padded():
    index = HistoryIndex(4)
    query = unit(np.ones((1, 4)))
    assert index.search(query, 2)[0].tolist() == [[-1, -1]]
    index.add(query)
    positions, similarity = index.search(query, 2)
    assert positions.tolist() == [[0, -1]]
    assert similarity[0, 1] == -np.inf
    assert index.search(np.zeros((0, 4), np.float32), 2)[0].shape == (0, 2)


def test_index_refuses_what_it_cannot_answer_exactly():
    row = unit(np.ones((1, 4)))
    index = HistoryIndex.build(row)
    with pytest.raises(TableError, match="an event's vector, row 0, has length 2"):
        index.add(2 * row)
    with pytest.raises(TableError, match=r"a query has the shape \(3,\)"):
        index.search(row[:, :3], 1)
    with pytest.raises(TableError, match="must lie in 0 to 1"):
        index.search(row, 1, np.array([2]))
    with pytest.raises(ConfigError, match="k is 0"):
        index.search(row, 0)
    with pytest.raises(ConfigError, match="one of 1 items was given"):
        HistoryIndex(4, IndexOptions("ivf"), row)


def test_actor_keeps_users_apart_and_knows_nothing_of_a_new_one():
    vectors, item = long_history()
    actor = FaissActor(32, options("ivf"), vectors)
    assert actor.device() == ("cuda" if faiss.get_num_gpus() else "cpu")
    assert actor.add(7, vectors[item[:300]]) == 300
    assert actor.add(8, vectors[item[300:310]]) == 10
    assert actor.add(8, vectors[item[310:320]]) == 20
    query = vectors[item[305:306]]
    assert actor.search(8, query, 1)[0].tolist() == [[5]]
    assert actor.search(9, query, 1)[0].tolist() == [[-1]]
    assert actor.search(7, query, 1, np.array([0]))[0].tolist() == [[-1]]


@pytest.mark.ray
def test_start_actor_serves_a_growing_history_from_a_process_without_torch():
    import ray

    vectors, item = long_history()
    actor = faiss_index.start_actor(32)
    try:
        assert ray.get(actor.add.remote(1, vectors[item[:100]])) == 100
        assert ray.get(actor.add.remote(1, vectors[item[100:101]])) == 101
        query = vectors[item[100:101]]
        positions, _ = ray.get(actor.search.remote(1, query, 3))
        assert (positions == exact(vectors[item[:101]], query, [101], 3)[0]).all()
        loaded = ray.get(actor.__ray_call__.remote(lambda _: "torch" in sys.modules))
        assert not loaded
    finally:
        ray.shutdown()


def test_module_imports_no_torch():
    code = "import sys, rellax_ds.retrieval.faiss_index; print('torch' in sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=child_environment(),
    )
    assert found.stdout.strip() == "False"


@pytest.mark.skipif(not faiss.get_num_gpus(), reason="FAISS has no GPU here")
def test_gpu_index_equals_exact_integers():
    vectors, item = long_history()
    index = HistoryIndex.build(vectors[item])
    assert index.device == "cuda"
    queries = vectors[item[-50:]]
    for ends in (np.full(50, LONG.num_events), np.arange(4_000, 4_050)):
        found = index.search(queries, 10, ends)
        for got, wanted in zip(found, exact(vectors[item], queries, ends, 10), strict=True):
            assert (got == wanted).all()
