from __future__ import annotations

import hashlib
import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from rellax_ds.config import ShardsConfig
from rellax_ds.errors import ArtifactError, ConfigError, TableError
from rellax_ds.partitions import Partition, process
from rellax_ds.prompts.render import display_name
from rellax_ds.shards import pool, write
from rellax_ds.shards.read import MEMBERS, ShardIndex, ShardReader
from rellax_ds.shards.write import ShardWorker, write_scale

if TYPE_CHECKING:
    from pathlib import Path

    from rellax_ds.shards.pool import Variant

LENGTH = 6
VALUES = ("events", "similarity")


def content(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if not path.name.endswith(".committed.json")
    }


def test_shards_written_again_in_another_order_are_equal_byte_for_byte(
    inputs: Any, shards: Path, tmp_path: Path
) -> None:
    values = {"train_rows": 70, "valid_rows": 11, "test_rows": None, "samples_per_shard": 32}
    inputs.write(tmp_path / "again", ShardsConfig(**values), reverse=True)
    assert content(tmp_path / "again") == content(shards)


def test_stock_webdataset_reads_every_sample(shards: Path) -> None:
    reader = ShardReader.open(shards, "train")
    names = sorted(str(path) for path in shards.glob("train-*.tar"))
    found = list(webdataset.WebDataset(names, shardshuffle=False, empty_check=False))
    assert len(names) == 3
    assert [sample["__key__"] for sample in found] == reader.keys
    for position in (0, 31, 69):
        facts = json.loads(found[position]["sample.json"])
        assert facts == reader[position].facts
        assert {name for name in found[position] if name[0] != "_"} == set(MEMBERS)


def test_samples_show_only_earlier_events_of_their_own_user(
    inputs: Any, shards: Path, mixed: Path
) -> None:
    events, samples = inputs.tables.events.to_pydict(), inputs.tables.samples.to_pylist()
    checked = 0
    for folder in (shards, mixed):
        for split in ("train", "valid", "test"):
            for sample in map(ShardReader.open(folder, split).__getitem__, range(11)):
                row, kept = samples[sample.id], sample.facts["history"]
                user, target = row["user"], row["event"]
                assert (sample.facts["user"], sample.label) == (user, row["label"])
                assert kept == sorted(set(kept))
                assert all(row["history_start"] <= e < row["history_end"] for e in kept)
                assert all(events["user"][e] == user and e < target for e in kept)
                # What the ids show is what the facts say: slots carry the items of those events.
                items = [events["item"][e] for e in kept] + [row["item"]]
                seen = [0 if item == 29 else item + 1 for item in items]
                slots = sample.tokens[1][sample.tokens[1] >= 0]
                assert slots.tolist() == seen
                marks = sample.tokens[2][sample.tokens[2] >= 0]
                assert marks.tolist() == [events["label"][e] for e in kept] + [row["label"]]
                assert sample.tokens[2][-1] == row["label"]
                checked += 1
    assert checked == 66


@pytest.fixture(scope="session")
def worker(inputs: Any, tmp_path_factory: pytest.TempPathFactory) -> ShardWorker:
    scale = tmp_path_factory.mktemp("scale") / "crm.safetensors"
    write_scale(inputs.root / "4_crm", scale, np.arange(50))
    return ShardWorker(**inputs.settings(scale))


@settings(deadline=None)
@given(sample=st.integers(0, 299), variant=st.sampled_from(pool.VARIANTS))
def test_any_prompt_holds_the_titles_of_allowed_events_only(
    inputs: Any, worker: ShardWorker, sample: int, variant: Variant
) -> None:
    row = inputs.tables.samples.slice(sample, 1).to_pylist()[0]
    titles = inputs.tables.items["title"].to_pylist()
    allowed = inputs.tables.events.slice(
        row["history_start"], row["history_end"] - row["history_start"]
    )
    found = worker.prompts(np.array([sample]), np.array([pool.VARIANTS.index(variant)]))
    text = worker.builder.tokens._tokenizer.decode(found.prompts.input_ids)
    lead_in, *lines, question = text.split("\n")
    shown = {
        f"{display_name(titles[item])}~? {'Yes' if label else 'No'}"
        for item, label in zip(
            *(allowed[name].to_pylist() for name in ("item", "label")), strict=True
        )
    }
    assert lead_in == "Does this viewer like these films?"
    assert set(lines) <= shown
    assert len(lines) == min(LENGTH, allowed.num_rows)
    assert question == f"{display_name(titles[row['item']])}~?"


def test_half_mixed_shards_are_the_first_rows_of_mixed_ones(
    inputs: Any, mixed: Path, tmp_path: Path
) -> None:
    values = {"train_rows": 20, "valid_rows": 11, "test_rows": None, "samples_per_shard": 32}
    inputs.write(tmp_path / "half", ShardsConfig(history="half_mixed", **values))
    half, whole = (ShardReader.open(folder, "train") for folder in (tmp_path / "half", mixed))
    assert half.keys == whole.keys[:20]


def test_index_grows_with_shards_and_not_with_samples(shards: Path) -> None:
    document = json.loads((shards / "index.json").read_text())
    for split in document["shards"].values():
        assert all(set(shard) == {"name", "bytes", "sha256", "n"} for shard in split)
    assert pq.read_metadata(shards / "samples.parquet").num_rows == sum(
        shard["n"] for split in document["shards"].values() for shard in split
    )


def test_mixed_shards_hold_both_histories_of_a_shot(mixed: Path) -> None:
    reader = ShardReader.open(mixed, "train")
    recent, retrieved = reader[0], reader[1]
    assert recent.id == retrieved.id
    assert (recent.key, retrieved.key) == (
        f"{recent.id:012d}-recent",
        f"{recent.id:012d}-retrieved",
    )
    pairs = [(reader[n].facts["history"], reader[n + 1].facts["history"]) for n in range(0, 40, 2)]
    assert any(one != other for one, other in pairs)


def test_instance_is_standardised_over_training_rows_with_a_floor(
    inputs: Any, shards: Path
) -> None:
    raw = np.load(inputs.root / "4_crm" / "instances.npy")
    train = np.flatnonzero(inputs.tables.samples["split"].to_numpy() == 0)
    mean, std = raw[train].mean(0), raw[train].std(0)
    sample = ShardReader.open(shards, "test")[0]
    expected = (raw[sample.id] - mean) / np.where(std > 0, std, 0.25 * std.mean())
    np.testing.assert_allclose(sample.instance, expected, rtol=1e-4, atol=1e-5)
    # The unit dead in training fires in test, and stays within a few of the others' deviations.
    assert std[-1] == 0
    assert 0 < abs(sample.instance[-1]) < 4 * abs(raw[sample.id, -1]) / std[:-1].mean() * 1.3


def test_item_table_is_standardised_over_seen_items(inputs: Any, shards: Path) -> None:
    table = ShardReader.open(shards, "train").index.item_table
    assert table.shape == (31, 6)
    np.testing.assert_allclose(table[1:-1].mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(table[1:-1].std(0), 1, rtol=1e-5)
    assert not table[[0, -1]].any()


def test_folds_of_the_recommender_choose_the_item_vectors_and_the_rows(
    inputs: Any, tmp_path: Path
) -> None:
    root = tmp_path / "inputs"
    shutil.copytree(inputs.root, root)
    crm = root / "4_crm"
    split = inputs.tables.samples["split"].to_numpy()
    fold = np.where(split == 0, np.arange(len(split)) % 3 - 1, -1).astype(np.int8)
    table = np.load(crm / "item_table.npy")
    stacked = np.stack([table * factor for factor in (2.0, 3.0)]).astype(np.float32)
    stacked[1, 5] = 0.0  # item 4 is new to the second fold's recommender
    np.save(crm / "folds.npy", fold)
    np.save(crm / "fold_tables.npy", stacked)
    folded = type(inputs)(root, inputs.tables)
    folded.write(tmp_path / "shards", ShardsConfig(train_rows=60, valid_rows=9, test_rows=9))
    index = ShardIndex.open(tmp_path / "shards")
    height = len(table)
    assert index.item_table.shape == (3 * height, table.shape[1])
    for name in ("train", "test"):
        reader = ShardReader.open(tmp_path / "shards", name)
        for n in range(len(reader)):
            own = fold[reader[n].id]
            assert own >= 0 or name == "test", "a row the recommender was trained on is a shot"
            slots = reader[n].tokens[1]
            known = slots[slots >= 0]
            part = known[known % height > 0]
            assert set((part // height).tolist()) <= {own + 1}
            assert not (own == 1 and height * 2 + 5 in part)
            assert not index.item_table[known[known % height == 0]].any()


def test_index_states_lengths_labels_and_statistics(shards: Path) -> None:
    reader = ShardReader.open(shards, "train")
    samples = [reader[n] for n in range(len(reader))]
    assert reader.lengths.tolist() == [sample.tokens.shape[1] for sample in samples]
    assert reader.labels.tolist() == [sample.label for sample in samples]
    facts = reader.index.document["splits"]["train"]
    assert (facts["rows"], facts["shards"]) == (70, 3)
    assert facts["tokens_max"] == reader.lengths.max()
    assert facts["label_mean"] == pytest.approx(reader.labels.mean(), abs=1e-6)
    assert sum(facts["dropped"].values()) == 70
    assert {len(sample.facts["history"]) for sample in samples} <= {5, LENGTH}


def test_long_prompts_drop_the_oldest_or_the_least_similar(inputs: Any, tmp_path: Path) -> None:
    scale = tmp_path / "crm.safetensors"
    write_scale(inputs.root / "4_crm", scale, np.arange(50))
    whole = ShardWorker(**inputs.settings(scale))
    samples, variants = np.array([100, 100]), np.array([0, 1])
    limit = int(whole.prompts(samples, variants).prompts.lengths.min()) - 1
    short = ShardWorker(**inputs.settings(scale, max_tokens=limit)).prompts(samples, variants)
    assert short.prompts.lengths.max() <= limit
    assert short.num_dropped.min() >= 1
    stop = inputs.tables.samples["history_end"][100].as_py()
    recent = short.facts(0, "test")
    assert recent["history"] == list(range(stop - LENGTH + recent["dropped"], stop))
    row = pq.read_table(inputs.root / "3_retrieval" / "retrieved.parquet").slice(100, 1).to_pylist()
    scores = sorted(zip(row[0]["similarity"], row[0]["events"], strict=True), reverse=True)
    similar = short.facts(1, "test")
    best = [event for _, event in scores[: LENGTH - similar["dropped"]]]
    assert similar["history"] == sorted(best)


def test_high_and_low_show_the_retrieved_events_by_similarity(
    inputs: Any, worker: ShardWorker
) -> None:
    orders = {
        kind: worker.prompts(np.array([120]), np.array([n])).facts(0, "test")["history"]
        for n, kind in enumerate(pool.VARIANTS)
    }
    row = pq.read_table(inputs.root / "3_retrieval" / "retrieved.parquet").slice(120, 1).to_pylist()
    scores = sorted(zip(row[0]["similarity"], row[0]["events"], strict=True), reverse=True)
    assert orders["high"] == [event for _, event in scores[:LENGTH]]
    assert orders["low"] == orders["high"][::-1]
    assert orders["retrieved"] == sorted(orders["high"])
    assert orders["high"] != orders["retrieved"]


def test_partition_in_batches_equals_the_partition_at_once(
    inputs: Any, worker: ShardWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale = tmp_path / "crm.safetensors"
    write_scale(inputs.root / "4_crm", scale, np.arange(50))
    rows = [(sample, kind) for sample in range(50, 61) for kind in pool.VARIANTS]
    part = Partition("p", {"split": "train", "rows": rows})
    mixed = inputs.settings(scale) | {"suffix_variant": True, "cuts": worker.builder.cuts}
    once = process(ShardWorker(**mixed), part, tmp_path / "once", "k")
    monkeypatch.setattr(write, "_ROWS_AT_ONCE", 7)
    pieces = process(ShardWorker(**mixed), part, tmp_path / "pieces", "k")
    assert once == pieces


def test_shards_are_written_in_the_secure_mode_of_webdataset_only(
    worker: ShardWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = Partition("p", {"split": "train", "rows": [(9, "recent")]})
    monkeypatch.setenv("WDS_SECURE", "0")
    with pytest.raises(ConfigError, match="WDS_SECURE"):
        worker(part, tmp_path)
    monkeypatch.delenv("WDS_SECURE")
    monkeypatch.setattr(webdataset.utils, "enforce_security", False)
    with pytest.raises(ConfigError, match="WDS_SECURE"):
        worker(part, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda table: table.slice(1), "row 9 is of sample 10"),
        (
            lambda table: pa.table(
                [
                    table["sample"],
                    *(table[name].take([len(table) - 1] * len(table)) for name in VALUES),
                ],
                schema=table.schema,
            ),
            "are not ascending rows of its history",
        ),
    ],
)
def test_retrieved_rows_of_another_sample_or_time_are_refused(
    inputs: Any, worker: ShardWorker, tmp_path: Path, change: Any, said: str
) -> None:
    table = pq.read_table(inputs.root / "3_retrieval" / "retrieved.parquet")
    pq.write_table(change(table), tmp_path / "retrieved.parquet")
    scale = tmp_path / "crm.safetensors"
    write_scale(inputs.root / "4_crm", scale, np.arange(50))
    wrong = ShardWorker(**inputs.settings(scale, retrieval=str(tmp_path)))
    part = Partition("p", {"split": "train", "rows": [(9, "retrieved")]})
    with pytest.raises(TableError, match=said):
        process(wrong, part, tmp_path / "out", "k")
    assert not list((tmp_path / "out").iterdir())


def test_scale_of_outputs_that_are_not_finite_is_refused(inputs: Any, tmp_path: Path) -> None:
    bad = np.full((31, 6), np.nan, np.float32)
    np.save(tmp_path / "item_table.npy", bad)
    np.save(tmp_path / "instances.npy", bad)
    with pytest.raises(ArtifactError, match="not finite"):
        write_scale(tmp_path, tmp_path / "crm.safetensors", np.arange(3))


def test_scale_measured_in_pieces_is_that_of_all_rows(
    inputs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crm, rows = inputs.root / "4_crm", np.arange(50, 120)
    monkeypatch.setattr(write, "_MOMENT_ROWS", 16)
    write_scale(crm, tmp_path / "pieces", rows)
    found = load_file(tmp_path / "pieces")
    instances = np.load(crm / "instances.npy")[rows].astype(np.float64)
    std = instances.std(axis=0)
    np.testing.assert_allclose(found["instance_mean"], instances.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(found["instance_std"], np.maximum(std, std.mean() / 4), rtol=1e-6)
