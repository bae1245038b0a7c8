"""The search that proposes in half precision gives the exact search's result, ties included."""

import numpy as np
import pytest

from rellax_ds.retrieval import subr, subr_device
from rellax_ds.retrieval.similarity import quantise
from rellax_ds.retrieval.subr_device import DeviceSearch


def problem(kind):
    rng = np.random.default_rng(3)
    vectors = rng.normal(size=(90, 24))
    if kind == "near ties":
        vectors = vectors[:1] + 1e-4 * vectors
    elif kind == "copies":
        vectors = vectors[rng.integers(3, size=90)]
    elif kind == "zeros":
        vectors[rng.random(90) < 0.5] = 0.0
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors = (vectors / np.where(norms > 0, norms, 1)).astype(np.float32)
    lengths = np.array([3, 250, 40])
    event_item = rng.integers(90, size=lengths.sum())
    start = np.repeat(np.cumsum(lengths) - lengths, lengths)
    order = rng.permutation(event_item.size)
    return quantise(vectors), (event_item, event_item[order], start[order], order)


@pytest.mark.parametrize("kind", ["spread", "near ties", "copies", "zeros"])
@pytest.mark.parametrize("k", [1, 7, 30])
def test_device_search_equals_the_exact_search(monkeypatch, kind, k):
    vectors, arguments = problem(kind)
    monkeypatch.setattr(subr_device, "_BLOCK_ROWS", 50)
    found = DeviceSearch(vectors, "cpu").retrieve(*arguments, k)
    for ours, expected in zip(found, subr.retrieve(vectors, *arguments, k), strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_rough_products_stay_within_the_bound_the_decision_rests_on():
    vectors, _ = problem("spread")
    search = DeviceSearch(vectors, "cpu")
    rough = subr_device._product(search._half, search._half).double()
    exact = vectors @ vectors.T
    error = (rough - exact).abs().max()
    assert 0.02 * search._error < error < search._error
