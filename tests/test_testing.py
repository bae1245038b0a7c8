"""The made-up data has what tests of the rest count on: a signal, ties, and repeatability."""

import numpy as np

from rellax_ds.testing import made_tables, write_movielens_100k


def test_made_tables_liked_genres_predict_the_label(tmp_path):
    tables = made_tables(tmp_path)
    genre = np.array(tables.items["genre"].to_pylist())[tables.events["item"].to_numpy()]
    label = tables.events["label"].to_numpy()
    hits = []
    for start, end in zip(
        tables.users["event_start"].to_pylist(), tables.users["event_end"].to_pylist(), strict=True
    ):
        for n in range(start + 10, end):
            same = label[start:n][genre[start:n] == genre[n]]
            if same.size:
                hits.append((same.mean() > 0.5) == label[n])
    assert np.mean(hits) > 0.85


def test_made_tables_hold_same_second_ties_and_all_splits(tmp_path):
    tables = made_tables(tmp_path)
    user, time = tables.events["user"].to_numpy(), tables.events["time"].to_numpy()
    ties = (user[1:] == user[:-1]) & (time[1:] == time[:-1])
    assert 0.2 < ties.mean() < 0.8
    assert np.bincount(tables.samples["split"].to_numpy()).min() > 100


def test_write_movielens_100k_same_seed_gives_equal_files(tmp_path):
    a, b = (write_movielens_100k(tmp_path / name, seed=3) for name in "ab")
    c = write_movielens_100k(tmp_path / "c", seed=4)
    name = "ml-100k.inter"
    assert (a / name).read_bytes() == (b / name).read_bytes() != (c / name).read_bytes()
