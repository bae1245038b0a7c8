"""Tiny random backbones saved like real ones, and batches of made-up prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny_models import TARGETS, VOCABULARY, tiny_model

from rellax_ds.batch import Batch
from rellax_ds.config import ModelConfig
from rellax_ds.model.rellax import ReLLaX, build_rellax

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ITEM_DIM, INSTANCE_DIM = 6, 5
ANSWERS = {"yes": 11, "no": 12}


@pytest.fixture(scope="session")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for family in TARGETS:
        folders[family] = tmp_path_factory.mktemp(family)
        tiny_model(family).save_pretrained(folders[family])
    return folders


@pytest.fixture
def build(backbones: dict[str, Path]) -> Callable[..., ReLLaX]:
    def make(family: str = "llama", trained: bool = True, **fields: Any) -> ReLLaX:
        """A model; `trained` gives it random adapter values, as after training."""
        loss = fields.pop("loss", "yes_no")
        dtype = fields.pop("dtype", torch.float32)
        tiny = {"target_modules": TARGETS[family], "rank": 3, "alpha": 4.5, "dropout": 0.0}
        fields = tiny | fields
        torch.manual_seed(4)
        model = build_rellax(
            str(backbones[family]),
            ModelConfig(**fields),
            ANSWERS,
            ITEM_DIM,
            INSTANCE_DIM,
            dtype,
            loss,
        )
        if trained:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_" in name or "cflora_" in name:
                        parameter.add_(torch.randn_like(parameter) * 0.3)
        return model

    return make


@pytest.fixture
def batch() -> Batch:
    return made_batch()


def made_batch(left: bool = False) -> Batch:
    """Prompts of 7, 10 and 4 tokens; row 1 has two history answers; slot 2 is an unseen item."""
    generator = torch.Generator().manual_seed(5)
    lengths, width = torch.tensor([7, 10, 4]), 10
    start = width - lengths if left else torch.zeros(3, dtype=torch.int64)
    ids, mask = torch.full((3, width), 7), torch.zeros(3, width, dtype=torch.int64)
    for row in range(3):
        tokens = torch.randint(20, VOCABULARY, (int(lengths[row]),), generator=generator)
        ids[row, start[row] : start[row] + lengths[row]] = tokens
        mask[row, start[row] : start[row] + lengths[row]] = 1
    slot_rows = torch.tensor([0, 1, 1, 2])
    slot_positions = torch.tensor([2, 1, 6, 3])
    slot_vectors = torch.randn(4, ITEM_DIM, generator=generator)
    slot_vectors[2] = 0.0
    answer_rows = torch.tensor([0, 1, 1, 1, 2])
    answer_positions = torch.tensor([6, 3, 7, 9, 3])
    return Batch(
        sample_ids=torch.arange(3),
        input_ids=ids,
        attention_mask=mask,
        slot_rows=slot_rows,
        slot_positions=slot_positions + start[slot_rows],
        slot_vectors=slot_vectors,
        instance=torch.randn(3, INSTANCE_DIM, generator=generator),
        answer_rows=answer_rows,
        answer_positions=answer_positions + start[answer_rows],
        answer_labels=torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0]),
        answer_weights=torch.tensor([1.0, 0.3, 0.3, 1.0, 1.0]),
        target_index=torch.tensor([0, 3, 4]),
    )


@pytest.fixture
def left_batch() -> Batch:
    return made_batch(left=True)
