from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pytest

from rellax_ds import schema
from rellax_ds.config import ShardsConfig
from rellax_ds.partitions import process
from rellax_ds.prompts.templates import load_template
from rellax_ds.shards import pool
from rellax_ds.shards.index import write_index
from rellax_ds.shards.write import ShardWorker, write_scale
from rellax_ds.stages.shards import partitions
from rellax_ds.tables import Tables, write_parquet, write_tables
from rellax_ds.testing import made_recommender, made_tables, tiny_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

SEED, LENGTH = 42, 6


@dataclass(frozen=True)
class Inputs:
    """Committed inputs of stage 5, made up."""

    root: Path
    tables: Tables

    def settings(self, scale: Path, **changes: Any) -> dict[str, Any]:
        return {
            "tables": str(self.root / "1_tables"),
            "crm": str(self.root / "4_crm"),
            "retrieval": str(self.root / "3_retrieval"),
            "scale": str(scale),
            "tokenizer": str(self.root / "tokenizer"),
            "template": load_template("question_answer").document(),
            "chat": False,
            "soft_slots": True,
            "history_length": LENGTH,
            "max_tokens": 4096,
            "like_rule": "above 3",
            "suffix_variant": False,
        } | changes

    def write(self, folder: Path, config: ShardsConfig, reverse: bool = False) -> dict[str, Any]:
        """Stage 5 without Ray; `reverse` processes the partitions in the opposite order."""
        folder.mkdir(parents=True)
        split_of = pool.read_splits(self.root / "1_tables")
        folds = pool.read_folds(self.root / "4_crm")
        rows = pool.choose_rows(split_of, config, SEED, None, folds)
        candidates = pool.training_candidates(split_of, config, None, folds)
        scale = folder / "crm.safetensors"
        facts: dict[str, Any] = write_scale(self.root / "4_crm", scale, candidates)
        mixed = config.history in pool.MIXED
        worker = ShardWorker(**self.settings(scale, suffix_variant=mixed))
        parts = partitions(rows, config.samples_per_shard)
        records = {
            part.name: process(worker, part, folder, "key")
            for part in (reversed(parts) if reverse else parts)
        }
        ids = worker.builder.answer_ids
        facts |= {
            "answer_ids": {"yes": ids.yes, "no": ids.no},
            "history_supervised": worker.builder.history_supervised,
            "soft_slots": True,
            "mixed": mixed,
            "slot_id": worker.builder.tokens.slot_id,
        }
        return write_index(folder, [records[part.name] for part in parts], facts)


def config(**changes: Any) -> ShardsConfig:
    values = {"train_rows": 70, "valid_rows": 11, "test_rows": None, "samples_per_shard": 32}
    return ShardsConfig(**(values | changes))


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    root = tmp_path_factory.mktemp("inputs")
    tables = made_tables(root / "raw", num_users=20, num_items=30, num_events=400)
    (root / "1_tables").mkdir()
    (root / "3_retrieval").mkdir()
    write_tables(tables, root / "1_tables")
    made_recommender(root / "4_crm", tables)
    tiny_tokenizer(root / "tokenizer")
    # Up to ten events of the sample's own history, with many equal similarities.
    rng = np.random.default_rng(1)
    events, similarity = [], []
    for row in tables.samples.to_pylist():
        span = np.arange(row["history_start"], row["history_end"])
        chosen = np.sort(rng.permutation(span)[:10])
        events.append(chosen.tolist())
        similarity.append((rng.integers(0, 4, len(chosen)) / 4).tolist())
    retrieved = {
        "sample": np.arange(len(events)),
        "events": events,
        "similarity": similarity,
    }
    table = pa.table(retrieved, schema=pa.schema(list(schema.RETRIEVED.items())))
    write_parquet(table, root / "3_retrieval" / "retrieved.parquet")
    return Inputs(root, tables)


@pytest.fixture(scope="session")
def shards(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A committed set with recent history; tests that damage it work on a copy."""
    folder = tmp_path_factory.mktemp("shards") / "5_shards"
    inputs.write(folder, config())
    return folder


@pytest.fixture(scope="session")
def mixed(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A committed set with mixed history."""
    folder = tmp_path_factory.mktemp("mixed") / "5_shards"
    inputs.write(folder, config(history="mixed", train_rows=20))
    return folder
