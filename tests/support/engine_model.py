"""A model of three trained tensors of odd sizes, and its rows, for tests of the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from rellax_ds.engine.engine import ParameterGroup

ROOT = Path(__file__).resolve().parents[2]


class Regression(nn.Module):
    """A frozen layer and two trained ones of odd sizes, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(4, 5).requires_grad_(False)
        self.inner = nn.Linear(5, 3, bias=False)
        self.outer = nn.Linear(3, 1)

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> tuple[Any, Any]:
        hidden = nn.functional.dropout(self.inner(self.frozen(inputs)), 0.2, self.training)
        logits = self.outer(hidden)[:, 0]
        return nn.functional.mse_loss(logits, labels), logits.detach()


class Rows:
    """What the engine asks of a batch."""

    def __init__(
        self, seed: int, row: int | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        """Four rows, or one of them."""
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(4, 4, generator=generator).to(dtype)
        self.inputs = inputs if row is None else inputs[[row]]
        self.labels = self.inputs.sum(1)

    def to(self, _device: torch.device) -> Rows:
        return self

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"inputs": self.inputs, "labels": self.labels}


def make_model() -> tuple[Regression, list[ParameterGroup]]:
    torch.manual_seed(1)
    model = Regression()
    groups = [
        ParameterGroup("inner", {"inner.weight": model.inner.weight}, 0.05, 0.1),
        ParameterGroup(
            "outer", {"outer.weight": model.outer.weight, "outer.bias": model.outer.bias}, 0.2, 0.0
        ),
    ]
    return model, groups
