"""The engine's own promises: seeds, skipped steps, the stage it accepts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from rellax_ds.config import TrainConfig
from rellax_ds.engine import elastic
from rellax_ds.engine.ds_config import resolve_ds_config
from rellax_ds.engine.engine import Engine
from rellax_ds.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from rellax_ds.engine.processes import Processes


def test_step_with_an_infinite_loss_is_skipped_and_leaves_weights_alone(
    module_engine: Engine, rows: Callable[[int], object]
) -> None:
    before, _ = elastic.capture(module_engine)
    poisoned = rows(0)
    poisoned.labels = poisoned.labels * float("nan")  # type: ignore[attr-defined]
    module_engine.accumulate(poisoned, 0)  # type: ignore[arg-type]
    assert module_engine.outcome().skipped
    after, _ = elastic.capture(module_engine)
    assert all(torch.equal(before[name], after[name]) for name in before)
    module_engine.accumulate(rows(0), 0)  # type: ignore[arg-type]
    assert not module_engine.outcome().skipped


def test_engine_refuses_another_zero_stage(processes: Processes) -> None:
    train = TrainConfig(global_batch=4, micro_batch=4)
    resolved = resolve_ds_config(train, 1)
    resolved["zero_optimization"]["stage"] = 2
    with pytest.raises(ConfigError, match="stage is 2"):
        Engine(lambda: (torch.nn.Module(), []), train, resolved, processes)
