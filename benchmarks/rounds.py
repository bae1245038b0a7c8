"""Rounds of arms that take turns, and what is read from them.

Every round runs each arm once, in an order that rotates, so that ratios within a round are free of
what slows the whole round. glibc hands large freed blocks back to the system until it has seen how
large they get, and an arm that needs more memory then pays page faults in every step. One block is
freed first that teaches it to keep up to 62 MiB: the state of a process that has run for long.
"""

from __future__ import annotations

import dataclasses
import gc
import resource
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.gpu_suite.layer import Arm, Layer

WARM_UP, LEAST_ROUNDS = 2, 3
RESAMPLES = 2000
KEPT_BLOCK = 31 * 2**20
"""Just below the largest block glibc learns from."""


@dataclass(frozen=True)
class Times:
    """Seconds of one arm, an entry a round.

    Attributes:
        inference: Forward without a graph; dropout stays on.
        forward: Forward that saves for a backward.
        full: Forward and backward.
        busy: CPU seconds of the full step.
        faults: Page faults of the full step.
    """

    inference: list[float] = dataclasses.field(default_factory=list)
    forward: list[float] = dataclasses.field(default_factory=list)
    full: list[float] = dataclasses.field(default_factory=list)
    busy: list[float] = dataclasses.field(default_factory=list)
    faults: list[float] = dataclasses.field(default_factory=list)


def warm_up(arms: Sequence[Arm], layer: Layer) -> None:
    """Run every arm, which compiles what is compiled, with a settled allocator."""
    torch.empty(KEPT_BLOCK, dtype=torch.uint8)
    for arm in arms:
        for _ in range(WARM_UP):
            time_once(arm, layer)


def measure(arms: Sequence[Arm], layer: Layer, rounds: int, seconds: float) -> dict[str, Times]:
    """Rounds of all arms until the time is over, the first and last arm at their places."""
    times = {arm.name: Times() for arm in arms}
    first, *middle, last = arms
    deadline = time.perf_counter() + seconds
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            if number >= LEAST_ROUNDS and time.perf_counter() > deadline:
                break
            turn = number % len(middle)
            for arm in (first, *middle[turn:], *middle[:turn], last):
                for name, value in time_once(arm, layer).items():
                    getattr(times[arm.name], name).append(value)
    finally:
        gc.enable()
    return times


def time_once(arm: Arm, layer: Layer) -> dict[str, float]:
    """Seconds of one forward without a graph, after which caches hold the arm's own data, and of
    one full step.
    """
    wanted = [layer.x, *arm.trained.values()]
    start = time.perf_counter()
    with torch.no_grad():
        arm.call(layer.x)
    inference = time.perf_counter() - start
    faults, busy, start = page_faults(), time.process_time(), time.perf_counter()
    y = arm.call(layer.x)
    forward = time.perf_counter() - start
    torch.autograd.grad(y, wanted, layer.upstream)
    del y
    full, busy = time.perf_counter() - start, time.process_time() - busy
    return {
        "inference": inference,
        "forward": forward,
        "full": full,
        "busy": busy,
        "faults": page_faults() - faults,
    }


def page_faults() -> int:
    """Minor page faults of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def spread(above: list[float], below: list[float]) -> str:
    """Median and quartiles of the ratio within rounds."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def interval(values: list[float]) -> str:
    """95 % bootstrap interval of the median."""
    picked = np.random.default_rng(0).choice(values, (RESAMPLES, len(values)))
    low, high = np.quantile(np.median(picked, axis=1), [0.025, 0.975])
    return f"{low:.3f} to {high:.3f}"
