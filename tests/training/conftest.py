"""A run folder with handmade shards and a tiny random Llama: all that stage 6 needs to be real."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import webdataset
from safetensors.numpy import save_file
from trainings import train
from transformers import LlamaConfig, LlamaForCausalLM

from rellax_ds.artifacts import WorkDir, file_sha256
from rellax_ds.partitions import PartitionRecord
from rellax_ds.shards.index import write_columns, write_index
from rellax_ds.shards.read import CRM

if TYPE_CHECKING:
    from collections.abc import Callable

ROWS = {"train": 24, "valid": 10, "test": 2}
VOCABULARY, ITEM_WIDTH, INSTANCE_WIDTH, NUM_ITEMS = 60, 6, 5, 9
YES, NO, SLOT = 11, 12, 3


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _npy(array: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _sample(
    number: int, split: str, random: np.random.Generator, poisoned: bool
) -> tuple[dict[str, Any], int]:
    """A prompt whose label can be read off its first token and its instance embedding."""
    label, length = number % 2, int(random.integers(6, 14))
    tokens = np.full((3, length), -1, np.int32)
    tokens[0] = random.integers(20, 40, length)
    tokens[0, 0] = 45 if label else 46
    tokens[0, 2], tokens[1, 2] = SLOT, random.integers(0, NUM_ITEMS + 1)
    tokens[2, -1] = label
    instance = random.normal(size=INSTANCE_WIDTH).astype(np.float32)
    instance[0] = np.nan if poisoned else 1.0 if label else -1.0
    facts = {"sample": number, "user": 0, "item": 0, "label": label, "split": split}
    facts |= {"crm_logit": (label - 0.5) * (-1.0 if number % 3 == 0 else 1.0)}
    facts |= {"history": [], "dropped": 0, "variant": "recent"}
    member = {
        "__key__": f"{number:012d}",
        "tokens.npy": _npy(tokens),
        "instance.npy": _npy(instance),
        "sample.json": json.dumps(facts).encode(),
    }
    return member, length


def write_shards(folder: Path, poisoned: bool) -> None:
    random = np.random.default_rng(7)
    table = random.normal(size=(NUM_ITEMS + 1, ITEM_WIDTH)).astype(np.float32)
    table[0] = 0
    scale = np.ones(INSTANCE_WIDTH, np.float32)
    save_file(
        {"item_table": table, "instance_mean": 0 * scale, "instance_std": scale}, folder / CRM
    )
    records, number = [], 0
    for split, rows in ROWS.items():
        path = folder / f"{split}-00000.tar"
        columns: dict[str, list[int]] = {"sample": [], "tokens": [], "label": []}
        with path.open("wb") as file, webdataset.TarWriter(file, mtime=0, encoder=False) as tar:
            for _ in range(rows):
                member, length = _sample(number, split, random, poisoned and number == 0)
                tar.write(member)
                columns["sample"].append(number)
                columns["tokens"].append(length)
                columns["label"].append(number % 2)
                number += 1
        write_columns(path, {**columns, "variant": [0] * rows}, mixed=False)
        counts = {"split": split, "n": rows, "dropped": {"0": rows}, "clipped": 0}
        facts = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        records.append(PartitionRecord(path.stem, {path.name: facts}, counts, reused=False))
    facts = {
        "answer_ids": {"yes": YES, "no": NO},
        "history_supervised": False,
        "soft_slots": True,
        "mixed": False,
        "slot_id": SLOT,
        "item_width": ITEM_WIDTH,
        "instance_width": INSTANCE_WIDTH,
    }
    write_index(folder, records, facts)


@pytest.fixture(scope="session")
def make_work(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., WorkDir]:
    def make(poisoned: bool = False) -> WorkDir:
        """A run folder whose stage 5 is committed; `poisoned` puts a NaN into one training row."""
        work = WorkDir(tmp_path_factory.mktemp("run"))
        attempt = work.open("shards", {"code": f"made, poisoned {poisoned}"}, {})
        write_shards(attempt.begin(), poisoned)
        attempt.commit({})
        return work

    return make


@pytest.fixture(scope="session")
def recipe_file(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """Four epochs of three steps of eight rows, with dropout, weight decay and accumulation."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(
        f"""
model: {{backbone: {tiny_llama}, rank: 3, alpha: 6, dropout: 0.1}}
train:
  epochs: 4
  global_batch: 8
  micro_batch: 4
  learning_rate: 0.01
  interaction_learning_rate: 0.02
  weight_decay: 0.1
  eval_batch: 4
  checkpoint_every: 1
"""
    )
    return path


@pytest.fixture(scope="session")
def one_rank(recipe_file: Path, make_work: Callable[..., WorkDir]) -> WorkDir:
    """The recipe trained on one rank, undisturbed."""
    return train(recipe_file, make_work(), 1)


@pytest.fixture(scope="session")
def two_ranks(recipe_file: Path, make_work: Callable[..., WorkDir]) -> WorkDir:
    """The recipe trained on two ranks, undisturbed."""
    return train(recipe_file, make_work(), 2)
