"""Causal top-K against a brute-force search in exact integers, and its independence of how the work
is cut and of what the cache holds.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rellax_ds.retrieval import subr
from rellax_ds.retrieval.similarity import SimilarityCache, cosine, quantise


def unit(rows):
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0).astype(np.float32)


def integers(vectors):
    """Quantised vectors as Python's own integers, in units of 2^-26."""
    return [[int(x * 2**26) for x in row] for row in vectors.tolist()]


def brute_force(vectors, event_item, targets, starts, ends, k):
    """Multiplies with Python's own integers and ranks one sample at a time."""
    whole = integers(quantise(vectors))
    found = []
    for target, start, end in zip(targets, starts, ends, strict=True):

        def score(event, target=target):
            pair = zip(whole[target], whole[event_item[event]], strict=True)
            return np.float32(sum(a * b for a, b in pair) / 2**52)

        best = sorted(range(start, end), key=lambda e: (-score(e), -e))[:k]
        found.append([(e, score(e)) for e in sorted(best)])
    return found


def cached(vectors, event_item, limit):
    return SimilarityCache.build(quantise(vectors), event_item, 10**6, limit)


@st.composite
def problems(draw):
    """Users with a log each; vectors with exact copies and zeros, so that ties are common."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_items = draw(st.integers(1, 8))
    base = rng.normal(size=(draw(st.integers(1, 4)), draw(st.integers(1, 9))))
    base[0] *= draw(st.integers(0, 1))
    vectors = unit(base[rng.integers(len(base), size=num_items)])
    lengths = draw(st.lists(st.integers(0, 12), min_size=1, max_size=4))
    event_item = rng.integers(num_items, size=sum(lengths))
    begins = np.cumsum([0, *lengths])
    starts = np.concatenate([np.full(n, b) for n, b in zip(lengths, begins, strict=False)])
    # A history may end anywhere before its target, as under strict_time or freeze_history.
    event = np.arange(starts.size)
    ends = starts + rng.integers(0, event - starts + 1)
    order = rng.permutation(starts.size)
    targets = event_item[order].astype(np.int64)
    return vectors, event_item, targets, starts[order].astype(np.int64), ends[order]


@settings(max_examples=200, deadline=None)
@given(problems(), st.integers(1, 6), st.integers(0, 8), st.integers(1, 2))
def test_retrieve_random_logs_equal_brute_force(problem, k, cache_limit, num_threads):
    vectors, event_item, targets, starts, ends = problem
    offsets, events, similarity = subr.retrieve(
        quantise(vectors),
        event_item,
        targets,
        starts,
        ends,
        k,
        cache=cached(vectors, event_item, cache_limit),
        num_threads=num_threads,
    )
    expected = brute_force(vectors, event_item, targets, starts, ends, k)
    assert np.diff(offsets).tolist() == [len(row) for row in expected]
    flat = [pair for row in expected for pair in row]
    assert events.tolist() == [event for event, _ in flat]
    assert similarity.tolist() == [value for _, value in flat]


@settings(max_examples=60, deadline=None)
@given(problems(), st.integers(1, 6))
def test_retrieve_random_logs_stay_inside_the_history(problem, k):
    vectors, event_item, targets, starts, ends = problem
    offsets, events, _ = subr.retrieve(quantise(vectors), event_item, targets, starts, ends, k)
    counts = np.diff(offsets)
    assert (counts == np.minimum(k, ends - starts)).all()
    assert (events >= np.repeat(starts, counts)).all()
    assert (events < np.repeat(ends, counts)).all()
    same = np.repeat(np.arange(targets.size), counts)
    assert (np.diff(events)[np.diff(same) == 0] > 0).all()


@pytest.mark.parametrize("cache_limit", [0, 1, 2])
def test_retrieve_equal_items_the_later_events_win(cache_limit):
    vectors = unit(np.array([[1.0, 0.0], [0.6, 0.8]]))
    event_item = np.array([0, 1, 0, 1, 0, 1, 1, 0])
    offsets, events, similarity = subr.retrieve(
        quantise(vectors),
        event_item,
        np.array([0]),
        np.array([0]),
        np.array([7]),
        4,
        cache=cached(vectors, event_item, cache_limit),
    )
    # Items 0 at 0, 2 and 4 are exact matches; one of the equal 1, 3, 5 and 6 still fits.
    assert offsets.tolist() == [0, 4]
    assert events.tolist() == [0, 2, 4, 6]
    np.testing.assert_allclose(similarity, [1, 1, 1, 0.6], atol=1e-7)


def test_retrieve_similarities_of_both_signs_are_ranked_by_value():
    vectors = unit(np.array([[1.0, 0], [-0.9, 0.1], [-0.1, 0.9], [0.2, 0.9], [0, 1]]))
    events = np.arange(5)
    _, found, similarity = subr.retrieve(
        quantise(vectors), events, np.array([0]), np.array([1]), np.array([5]), 3
    )
    assert found.tolist() == [2, 3, 4]
    assert (np.sign(similarity) == [-1, 1, 0]).all()


@pytest.mark.parametrize("cache_limit", [0, 20, 50])
def test_retrieve_cutting_into_blocks_changes_no_bit(monkeypatch, cache_limit):
    rng = np.random.default_rng(5)
    vectors = unit(rng.normal(size=(50, 33)))
    event_item = rng.integers(50, size=400)
    targets, ends = event_item[5:], np.arange(5, 400)
    arguments = (quantise(vectors), event_item, targets, np.zeros(395, np.int64), ends, 7)
    whole = subr.retrieve(*arguments)
    monkeypatch.setattr(subr, "_BLOCK_ROWS", 9)
    cut = subr.retrieve(*arguments, cache=cached(vectors, event_item, cache_limit))
    for found, expected in zip(cut, whole, strict=True):
        assert (found == expected).all()


@pytest.mark.parametrize("width", [16, 384, 4096])
def test_quantise_products_are_exact_in_any_order(width):
    rows = unit(np.abs(np.random.default_rng(6).normal(size=(4, width))))
    rows[3] = rows[2]
    whole = quantise(rows)
    exact = integers(whole)
    expected = [[np.float32(sum(map(int.__mul__, a, b)) / 2**52) for b in exact] for a in exact]
    assert cosine(whole, whole).tolist() == expected
    np.testing.assert_allclose(cosine(whole, whole), rows @ rows.T, atol=4e-7)


def test_cosine_of_a_zero_vector_has_no_sign():
    vectors = quantise(unit(np.array([[0.0, 0.0], [-1.0, -1.0]])))
    assert not np.signbit(cosine(vectors[:1], vectors)).any()


def test_cache_holds_the_most_frequent_items_and_no_more_pairs_than_are_asked_for(monkeypatch):
    vectors = unit(np.random.default_rng(0).normal(size=(6, 4)))
    event_item = np.array([5, 5, 5, 1, 1, 3, 3, 0])
    monkeypatch.setattr("rellax_ds.retrieval.similarity._TILE_ROWS", 2)
    cache = SimilarityCache.build(quantise(vectors), event_item, num_pairs=10)
    assert cache.place.tolist() == [-1, 1, -1, 2, -1, 0]
    expected = cosine(quantise(vectors[[5, 1, 3]]), quantise(vectors[[5, 1, 3]]))
    assert (cache.cosine == expected).all()
    everything = SimilarityCache.build(quantise(vectors), event_item, num_pairs=10**6)
    assert (everything.place >= 0).tolist() == [True, True, False, True, False, True]


def test_cache_saved_and_loaded_is_the_same(tmp_path):
    vectors = unit(np.random.default_rng(0).normal(size=(6, 4)))
    cache = cached(vectors, np.arange(6), 4)
    cache.save(tmp_path)
    loaded = SimilarityCache.load(tmp_path)
    assert (loaded.place == cache.place).all()
    assert (loaded.cosine == cache.cosine).all()
