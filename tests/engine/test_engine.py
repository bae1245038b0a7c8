"""The engine's own promises: seeds, skipped steps, the stage it accepts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_step_without_a_finite_loss_is_skipped_and_leaves_weights_alone(
    make_engine: Callable[[], Engine], rows: Callable[[int], Any], factor: float
) -> None:
    engine = make_engine()
    engine.accumulate(rows(1), 0)
    before, facts = elastic.capture(engine)
    poisoned = rows(0)
    poisoned.labels = poisoned.labels * factor
    engine.accumulate(poisoned, 0)
    assert engine.outcome().skipped
    after, later = elastic.capture(engine)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert later["groups"] == facts["groups"]
    engine.accumulate(rows(0), 0)
    assert not engine.outcome().skipped


def test_engine_refuses_another_zero_stage(processes: Processes) -> None:
    train = TrainConfig(global_batch=4, micro_batch=4)
    resolved = resolve_ds_config(train, 1)
    resolved["zero_optimization"]["stage"] = 1
    with pytest.raises(ConfigError, match="stage is 1"):
        Engine(lambda: (torch.nn.Module(), []), train, resolved, processes)
