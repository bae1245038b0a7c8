"""A real ZeRO-3 engine of one rank around a model of three tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from rellax_ds.config import TrainConfig
from rellax_ds.engine.ds_config import resolve_ds_config
from rellax_ds.engine.engine import Engine, ParameterGroup
from rellax_ds.engine.processes import Processes, start_processes

if TYPE_CHECKING:
    from collections.abc import Callable


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

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(4, 4, generator=generator)
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


@pytest.fixture(scope="session")
def processes() -> Processes:
    return start_processes()


def new_engine(processes: Processes) -> Engine:
    train = TrainConfig(global_batch=4, micro_batch=4)
    return Engine(make_model, train, resolve_ds_config(train, 1), processes)


@pytest.fixture
def make_engine(processes: Processes) -> Callable[[], Engine]:
    return lambda: new_engine(processes)


@pytest.fixture(scope="module")
def module_engine(processes: Processes) -> Engine:
    return new_engine(processes)


@pytest.fixture
def step() -> Callable[[Engine, int], float]:
    def take(engine: Engine, number: int) -> float:
        """One optimiser step on rows that depend on its number; returns the loss."""
        engine.set_rate(0.9**number)
        return engine.accumulate(Rows(number), "seed", number)  # type: ignore[arg-type]

    return take


@pytest.fixture
def rows() -> Callable[[int], Rows]:
    return Rows
