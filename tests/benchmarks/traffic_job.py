"""Counts the traffic of two made-up kernels in the interpreter and prints it as JSON.

A process of its own, because Triton decides at import whether it interprets. The kernels have
masked tails, repeated reads, arguments inside one block of memory, and an atomic.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
import triton.language as tl
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.kernel_traffic import Recorder, charged, shares


@triton.jit
def row_sums(x, out, total, rows, columns, BLOCK: tl.constexpr):
    """Out[t] = sum of row t, total += it; the row is read in blocks with a masked tail."""
    row = tl.program_id(0)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        sums += tl.load(x + row * columns + column, column < columns, 0.0)
    tl.store(out + row, tl.sum(sums))
    tl.atomic_add(total, tl.sum(sums))


@triton.jit
def outer_tiles(a, b, out, rows, columns, BLOCK: tl.constexpr):
    """Out = a b^T by square tiles: a is read once per column of tiles, b once per row of tiles."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    left = tl.load(a + row, row < rows, 0.0)
    right = tl.load(b + column, column < columns, 0.0)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    place = row[:, None] * columns + column[None, :]
    tl.store(out + place, left[:, None] * right[None, :], inside)


def run(rows: int, columns: int) -> torch.Tensor:
    """Launch both on tensors of one shape; the two vectors share a block of memory."""
    x = torch.ones(rows, columns)
    vectors = torch.ones(rows + columns)
    a, b = vectors[:rows], vectors[rows:]
    total = torch.zeros(1)
    row_sums[(rows,)](x, a, total, rows, columns, BLOCK=16)
    out = torch.empty(rows, columns)
    grid = (triton.cdiv(rows, 16), triton.cdiv(columns, 16))
    outer_tiles[grid](a, b, out, rows, columns, BLOCK=16)
    return out


def main() -> None:
    """Count at a small shape, then charge a shape that is never executed."""
    with Recorder() as small:
        out = run(40, 37)
    assert torch.equal(out, torch.full((40, 37), 37.0))
    with Recorder(execute=False) as large, FakeTensorMode():
        run(8192, 4096)
    bytes_of = charged(large.launches, shares(small.launches))
    json.dump(
        {
            "small": [dataclasses.asdict(launch) for launch in small.launches],
            "large": {f"{kernel}.{name}": value for (kernel, name), value in bytes_of.items()},
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main()
