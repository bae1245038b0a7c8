"""The learning rate as a plain function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["linear", "cosine", "constant"]


def warmup_steps(share: float, total: int) -> int:
    """Steps with a rising rate: the share of all steps, rounded up, and never all of them."""
    return min(math.ceil(share * total), max(total - 1, 0))


def rate_factor(schedule: Schedule, step: int, total: int, warmup: int) -> float:
    """What the peak learning rate is multiplied by in a step.

    Args:
        schedule: Shape after the warm-up; linear and cosine fall to 0 at `total`.
        step: Step from 0; steps skipped for a non-finite gradient are not counted.
        total: Steps of the whole run.
        warmup: Steps with a rising rate; the first one has rate 1 / (warmup + 1), never 0.

    Returns:
        A number in (0, 1] for every step before `total`.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    done = (step - warmup) / max(total - warmup, 1)
    if schedule == "linear":
        return max(1.0 - done, 0.0)
    return 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))
