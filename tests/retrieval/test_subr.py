"""Causal top-K against a brute-force search in exact integers, and its independence of how the work
is cut.
"""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rellax_ds import schema
from rellax_ds.partitions import process, split_rows
from rellax_ds.retrieval import subr
from rellax_ds.schema import check_table
from rellax_ds.tables import write_tables
from rellax_ds.testing import made_tables


def unit(rows):
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0).astype(np.float32)


def brute_force(vectors, event_item, targets, starts, ends, k):
    """Ranks whole numbers with Python's own integers, one sample at a time."""
    whole = [[int(x) for x in row] for row in subr.quantise(vectors).tolist()]
    found = []
    for target, start, end in zip(targets, starts, ends, strict=True):

        def score(event, target=target):
            pair = zip(whole[target], whole[event_item[event]], strict=True)
            return sum(a * b for a, b in pair)

        best = sorted(range(start, end), key=lambda e: (-score(e), -e))[:k]
        found.append([(e, score(e) / 2**52) for e in sorted(best)])
    return found


@st.composite
def problems(draw):
    """Users with a log each; vectors with exact copies, so that ties are common."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_items = draw(st.integers(1, 8))
    base = rng.normal(size=(draw(st.integers(1, 4)), draw(st.integers(1, 9))))
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


@settings(max_examples=150, deadline=None)
@given(problems(), st.integers(1, 6))
def test_retrieve_random_logs_equal_brute_force(problem, k):
    vectors, event_item, targets, starts, ends = problem
    offsets, events, similarity = subr.retrieve(
        subr.quantise(vectors), event_item, targets, starts, ends, k
    )
    expected = brute_force(vectors, event_item, targets, starts, ends, k)
    assert np.diff(offsets).tolist() == [len(row) for row in expected]
    flat = [pair for row in expected for pair in row]
    assert events.tolist() == [event for event, _ in flat]
    assert similarity.tolist() == [np.float32(value) for _, value in flat]


@settings(max_examples=60, deadline=None)
@given(problems(), st.integers(1, 6))
def test_retrieve_random_logs_stay_inside_the_history(problem, k):
    vectors, event_item, targets, starts, ends = problem
    offsets, events, _ = subr.retrieve(subr.quantise(vectors), event_item, targets, starts, ends, k)
    counts = np.diff(offsets)
    assert (counts == np.minimum(k, ends - starts)).all()
    assert (events >= np.repeat(starts, counts)).all()
    assert (events < np.repeat(ends, counts)).all()
    same = np.repeat(np.arange(targets.size), counts)
    assert (np.diff(events)[np.diff(same) == 0] > 0).all()


def test_retrieve_equal_items_the_later_events_win():
    vectors = unit(np.array([[1.0, 0.0], [0.6, 0.8]]))
    event_item = np.array([0, 1, 0, 1, 0, 1, 1, 0])
    offsets, events, similarity = subr.retrieve(
        subr.quantise(vectors), event_item, np.array([0]), np.array([0]), np.array([7]), 4
    )
    # Items 0 at 0, 2 and 4 are exact matches; one of the equal 1, 3, 5 and 6 still fits.
    assert offsets.tolist() == [0, 4]
    assert events.tolist() == [0, 2, 4, 6]
    np.testing.assert_allclose(similarity, [1, 1, 1, 0.6], atol=1e-7)


def test_retrieve_cutting_into_blocks_and_tiles_changes_no_bit(monkeypatch):
    rng = np.random.default_rng(5)
    vectors = unit(rng.normal(size=(50, 33)))
    event_item = rng.integers(50, size=400)
    targets, ends = event_item[5:], np.arange(5, 400)
    arguments = (subr.quantise(vectors), event_item, targets, np.zeros(395, np.int64), ends, 7)
    whole = subr.retrieve(*arguments)
    monkeypatch.setattr(subr, "_BLOCK_ELEMENTS", 900)
    monkeypatch.setattr(subr, "_TILE_ROWS", 13)
    for found, expected in zip(subr.retrieve(*arguments), whole, strict=True):
        assert (found == expected).all()


@pytest.mark.parametrize("width", [16, 384, 4096])
def test_quantise_products_are_exact_in_any_order(width):
    rows = unit(np.abs(np.random.default_rng(6).normal(size=(4, width))))
    rows[3] = rows[2]
    whole = subr.quantise(rows)
    product = whole @ whole.T
    exact = [[int(x) for x in row] for row in whole.tolist()]
    for i in range(4):
        for j in range(4):
            assert int(product[i, j]) == sum(a * b for a, b in zip(exact[i], exact[j], strict=True))
    np.testing.assert_allclose(product / 2**52, rows.astype(np.float64) @ rows.T, atol=2e-7)


def test_retriever_any_partitioning_gives_the_same_table(tmp_path):
    tables = made_tables(tmp_path / "raw", num_users=12, num_items=30, num_events=300)
    write_tables(tables, tmp_path)
    vectors = unit(np.random.default_rng(7).normal(size=(30, 16)))
    vectors[5] = vectors[6]
    np.save(tmp_path / "vectors.npy", vectors)
    worker = subr.Retriever(
        events_path=str(tmp_path / "events.parquet"),
        samples_path=str(tmp_path / "samples.parquet"),
        vectors_path=str(tmp_path / "vectors.npy"),
        num_retrieved=5,
    )
    found = []
    for rows in (17, 1000):
        folder = tmp_path / str(rows)
        folder.mkdir()
        parts = split_rows(tables.samples.num_rows, rows)
        for part in parts:
            process(worker, part, folder, "key")
        files = [pq.read_table(folder / f"{part.name}.parquet") for part in parts]
        found.append(pa.concat_tables(files).combine_chunks())
    check_table(found[0], schema.RETRIEVED, "retrieved")
    assert found[0].equals(found[1])
    assert found[0]["sample"].to_pylist() == list(range(tables.samples.num_rows))
    event = tables.samples["event"].to_numpy()
    assert all(max(row) < event[n] for n, row in enumerate(found[0]["events"].to_pylist()))
