"""Milliseconds and memory of a call on a GPU, or roughly on a CPU to try the suite out."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

CPU_REPEATS = 3


def median_ms(call: Callable[[], object], device: str) -> float:
    """Median milliseconds of a call; on a GPU with the L2 cache flushed before each repeat."""
    if device == "cuda":
        from triton.testing import do_bench

        return float(do_bench(call, warmup=25, rep=100, return_mode="median"))
    call()
    times = []
    for _ in range(CPU_REPEATS):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e3


def peak_mib(call: Callable[[], object], device: str) -> float | None:
    """MiB that a call adds to what is allocated, at its peak; None without a GPU."""
    if device != "cuda":
        return None
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
