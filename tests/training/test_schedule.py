"""The learning rate as a function of the step."""

from __future__ import annotations

import pytest

from rellax_ds.training.schedule import rate_factor, warmup_steps


def test_warmup_rises_to_the_peak_and_never_takes_every_step() -> None:
    assert warmup_steps(0.1, 25) == 3
    assert warmup_steps(1.0, 4) == 3
    assert warmup_steps(0.0, 4) == 0
    rising = [rate_factor("linear", step, 25, 3) for step in range(4)]
    assert rising == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedule_falls_to_zero_only_after_the_last_step(schedule: str) -> None:
    factors = [rate_factor(schedule, step, 20, 2) for step in range(2, 20)]
    assert factors == sorted(factors, reverse=True)
    assert factors[0] == 1.0
    assert factors[-1] > 0.0
    assert rate_factor(schedule, 20, 20, 2) == pytest.approx(0.0, abs=1e-15)


def test_cosine_is_halfway_at_half_and_constant_stays() -> None:
    assert rate_factor("cosine", 6, 10, 2) == pytest.approx(0.5)
    assert rate_factor("constant", 9, 10, 2) == 1.0
