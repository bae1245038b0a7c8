"""A real ZeRO-3 engine of one rank around a model of three tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from engine_model import ROOT, Rows, make_model

from rellax_ds.config import TrainConfig
from rellax_ds.engine.ds_config import resolve_ds_config
from rellax_ds.engine.engine import Engine
from rellax_ds.engine.processes import Processes, start_processes

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(scope="session")
def processes() -> Processes:
    return start_processes()


def new_engine(processes: Processes, stage: int = 3) -> Engine:
    path = ROOT / "ds_configs" / f"zero{stage}_fp32_cpu.json"
    train = TrainConfig(ds_config=path, global_batch=4, micro_batch=4)
    return Engine(make_model, train, resolve_ds_config(train, 1), processes)


@pytest.fixture(params=[2, 3], ids=["zero2", "zero3"])
def make_engine(request: pytest.FixtureRequest, processes: Processes) -> Callable[[], Engine]:
    return lambda: new_engine(processes, request.param)


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
