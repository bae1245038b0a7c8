"""Counts the traffic of made-up kernels in the interpreter and prints it as JSON.

A process of its own, because Triton decides at import whether it interprets. Two kernels have
masked tails, repeated reads, arguments inside one block of memory, and an atomic; a third projects
the input of a compute path whose other steps are torch.
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

from benchmarks import kernel_passes
from benchmarks.kernel_traffic import Recorder, charged, shares
from rellax_ds.kernels.composable import ComposablePath, gate_rows


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


@triton.jit
def project(x, A, out, rows, columns, BLOCK: tl.constexpr, RANK: tl.constexpr):
    """Out = x A^T, a tile of rows per program."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rank = tl.arange(0, RANK)
    sums = tl.zeros([BLOCK, RANK], tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        left = tl.load(x + row[:, None] * columns + column[None, :], inside, 0.0)
        right = tl.load(A + rank[None, :] * columns + column[:, None], column[:, None] < columns)
        sums += tl.dot(left, right)
    tl.store(out + row[:, None] * RANK + rank[None, :], sums, (row < rows)[:, None])


class Projected(ComposablePath):
    """Torch products, except that a kernel makes H."""

    def down(self, x, A, G, rows, scalings, dropout, keep_mask):
        """H by the kernel, S by torch; no dropout."""
        H = tuple(x.new_empty(x.shape[0], a.shape[0]) for a in A)
        for a, h in zip(A, H, strict=True):
            grid = (triton.cdiv(x.shape[0], 32),)
            project[grid](x, a, h, *x.shape, BLOCK=32, RANK=a.shape[0])
        S = (gate_rows(h, g, rows, s).to(x.dtype) for h, g, s in zip(H, G, scalings, strict=True))
        return H, tuple(S), ()


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
    arm = kernel_passes.Arm("projected", "", dropout_p=0.0)
    learned = [kernel_passes.learn(arm, Projected(), 256, width) for width in (64, 80)]
    found = kernel_passes.measure(arm, Projected(), learned[0], 8192, 4096)
    json.dump(
        {
            "found": dataclasses.asdict(found),
            "disagreement": kernel_passes.disagreement(*learned),
            "small": [dataclasses.asdict(launch) for launch in small.launches],
            "large": {f"{kernel}.{name}": value for (kernel, name), value in bytes_of.items()},
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main()
