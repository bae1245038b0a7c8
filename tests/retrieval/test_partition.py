"""Retrieval in partitions: any cut gives one and the same table, in sample order."""

import itertools

import numpy as np
import pyarrow.parquet as pq
import pytest

from rellax_ds import schema
from rellax_ds.errors import ArtifactError
from rellax_ds.partitions import process
from rellax_ds.retrieval import partition, subr
from rellax_ds.retrieval.similarity import quantise
from rellax_ds.tables import read_parquet, write_tables
from rellax_ds.testing import made_tables

K = 5


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Tables, vectors with a pair of equals, and the folder of both."""
    folder = tmp_path_factory.mktemp("made")
    tables = made_tables(folder / "raw", num_users=12, num_items=30, num_events=300)
    write_tables(tables, folder)
    vectors = np.random.default_rng(7).normal(size=(30, 16))
    vectors[5] = vectors[6]
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    np.save(folder / "vectors.npy", vectors)
    return tables, vectors, folder


def run(folder, out, samples_per_partition):
    columns = out / "columns"
    partition.prepare(folder, folder / "vectors.npy", columns)
    worker = partition.Retriever(
        columns=str(columns), vectors_path=str(folder / "vectors.npy"), num_retrieved=K
    )
    parts = partition.cut(columns, samples_per_partition)
    for part in parts:
        process(worker, part, out, "key")
    return [out / f"{part.name}.parquet" for part in parts]


@pytest.mark.parametrize("samples_per_partition", [7, 60, 1000])
def test_retriever_any_partitioning_gives_the_table_of_one_search(
    made, tmp_path, monkeypatch, samples_per_partition
):
    tables, vectors, folder = made
    monkeypatch.setattr(partition, "_PART_GROUP", 16)
    monkeypatch.setattr(partition, "_CHUNK", 50)
    parts = run(folder, tmp_path, samples_per_partition)
    assert len(parts) == -(-tables.samples.num_rows // samples_per_partition)
    partition.merge(parts, tmp_path / "whole", tables.samples.num_rows)
    table = read_parquet(tmp_path / "whole", schema.RETRIEVED)
    assert table["sample"].to_pylist() == list(range(tables.samples.num_rows))
    item, start, end = (
        tables.samples[name].to_numpy() for name in ("item", "history_start", "history_end")
    )
    offsets, events, similarity = subr.retrieve(
        quantise(vectors), tables.events["item"].to_numpy(), item, start, end, K
    )
    assert table["events"].combine_chunks().offsets.to_numpy().tolist() == offsets.tolist()
    assert table["events"].combine_chunks().flatten().to_pylist() == events.tolist()
    found = table["similarity"].combine_chunks().flatten().to_numpy()
    assert (found == similarity).all()
    assert pq.ParquetFile(tmp_path / "whole").num_row_groups == -(-tables.samples.num_rows // 50)
    event = tables.samples["event"].to_numpy()
    assert all(max(row) < event[n] for n, row in enumerate(table["events"].to_pylist()))


def test_cut_partitions_are_of_like_cost_and_cover_every_sample_once(made, tmp_path):
    tables, _, folder = made
    partition.prepare(folder, folder / "vectors.npy", tmp_path / "columns")
    parts = partition.cut(tmp_path / "columns", 30)
    bounds = [(part.payload["start"], part.payload["stop"]) for part in parts]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == tables.samples.num_rows
    assert all(one[1] == two[0] for one, two in itertools.pairwise(bounds))
    length = np.load(tmp_path / "columns/end.npy") - np.load(tmp_path / "columns/start.npy")
    cost = [float((length[a:b] + subr.SAMPLE_COST).sum()) for a, b in bounds]
    assert max(cost) < 1.2 * min(cost)


def test_prepare_keeps_a_folder_that_is_there_and_leaves_no_other(made, tmp_path):
    _, _, folder = made
    partition.prepare(folder, folder / "vectors.npy", tmp_path / "columns")
    before = (tmp_path / "columns/item.npy").stat().st_ino
    partition.prepare(folder, folder / "vectors.npy", tmp_path / "columns")
    assert (tmp_path / "columns/item.npy").stat().st_ino == before
    assert [path.name for path in tmp_path.iterdir()] == ["columns"]


@pytest.mark.parametrize("wrong", ["missing", "doubled"])
def test_merge_of_parts_that_miss_or_double_a_sample_is_refused(made, tmp_path, wrong):
    tables, _, folder = made
    parts = run(folder, tmp_path, 60)
    parts = parts[1:] if wrong == "missing" else [*parts, parts[0]]
    with pytest.raises(ArtifactError, match=r"do not hold samples 0 to .* once each"):
        partition.merge(parts, tmp_path / "whole", tables.samples.num_rows)
