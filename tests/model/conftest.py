"""Tiny random backbones saved like real ones, and batches of made-up prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny_models import FAMILIES, TARGETS, VOCABULARY, tiny_model

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
    for family in FAMILIES:
        folders[family] = tmp_path_factory.mktemp(family)
        tiny_model(family).save_pretrained(folders[family])
    return folders


@pytest.fixture
def build(backbones: dict[str, Path]) -> Callable[..., ReLLaX]:
    def make(family: str = "llama", trained: bool = True, **fields: Any) -> ReLLaX:
        """A model; `trained` gives it random adapter values, as after training."""
        loss = fields.pop("loss", "yes_no")
        dtype = fields.pop("dtype", torch.float32)
        tiny = {
            "target_modules": TARGETS.get(family, FAMILIES[family]),
            "rank": 3,
            "alpha": 4.5,
            "dropout": 0.0,
        }
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


def made_batch() -> Batch:
    """Prompts of 7, 10 and 4 tokens; row 1 has two history answers; slot 2 is an unseen item."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.tensor([7, 10, 4])
    slot_vectors = torch.randn(4, ITEM_DIM, generator=generator)
    slot_vectors[2] = 0.0
    return Batch(
        sample_ids=torch.arange(3),
        users=torch.tensor([0, 0, 1]),
        input_ids=torch.randint(20, VOCABULARY, (21,), generator=generator),
        lengths=lengths,
        question_starts=torch.tensor([0, 9, 0]),
        slot_positions=torch.tensor([2, 7 + 1, 7 + 6, 17 + 3]),
        slot_vectors=slot_vectors,
        instance=torch.randn(3, INSTANCE_DIM, generator=generator),
        crm_logits=torch.tensor([0.5, -1.0, 2.0]),
        answer_positions=torch.tensor([6, 7 + 3, 7 + 7, 7 + 9, 17 + 3]),
        answer_labels=torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0]),
        answer_weights=torch.tensor([1.0, 0.3, 0.3, 1.0, 1.0]),
        target_index=torch.tensor([0, 3, 4]),
    )
