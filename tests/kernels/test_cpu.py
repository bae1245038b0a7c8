"""The CPU path against the oracle: its generator, every gradient, every layout."""

from __future__ import annotations

import itertools
import threading
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from operator_cases import NAMES, PADDED, RAGGED, TWO_RUNS, assert_close, case

from rellax_ds.kernels import cpu, philox, philox_cpu
from rellax_ds.kernels.rows import Rows

if TYPE_CHECKING:
    from collections.abc import Iterator

LAYOUTS = {"padded": PADDED, "ragged": RAGGED, "two-runs": TWO_RUNS}
THRESHOLD = 20_000


@pytest.mark.parametrize("seed", [0, (1 << 40) + 9, -7])
@pytest.mark.parametrize("columns", [1, 8, 29, 576])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_compiled_masks_equal_the_oracle(seed: int, columns: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    mask = philox.keep_mask(seed, 12, columns, THRESHOLD, stream=2)[3:]
    x, term, before = torch.randn(3, 9, columns, dtype=dtype).unbind()
    x[0, 0] = torch.inf
    draw = (np.uint64(seed & 0xFFFFFFFFFFFFFFFF), 3, THRESHOLD, 2)
    kept = torch.where(mask, x, x.new_zeros(()))
    added = before + torch.where(mask, term, term.new_zeros(()))
    dropped, out = torch.full_like(x, torch.nan), before.clone()
    philox_cpu.drop(x.numpy(), dropped.numpy(), *draw)
    philox_cpu.add_kept(term.numpy(), out.numpy(), *draw)
    assert torch.equal(dropped, kept)
    assert torch.equal(out, added)
    dropped, out = torch.full_like(x, torch.nan), before.clone()
    philox_cpu.drop_and_add_kept(x.numpy(), dropped.numpy(), term.numpy(), out.numpy(), *draw)
    assert torch.equal(dropped, kept)
    assert torch.equal(out, added)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_cpu_equals_the_oracle(layout: str, dtype: torch.dtype, p: float) -> None:
    assert_close(case(LAYOUTS[layout], p=p), "cpu", dtype)


@pytest.mark.parametrize("rank", [1, 5, 8, 16, 64])
@pytest.mark.parametrize("d_in", [31, 123, 576])
def test_any_rank_and_width(rank: int, d_in: int) -> None:
    assert_close(case(RAGGED, d_in=d_in, ranks=(rank,), p=0.1), "cpu", torch.float32)


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_threads_share_the_rows_of_one_mask(three_threads: None) -> None:
    x, term, out = torch.randn(3, 601, 257).unbind()
    draw = (np.uint64(5), 11, THRESHOLD, 1)
    wanted = [torch.full_like(x, torch.nan), out.clone()]
    philox_cpu.drop_and_add_kept(
        x.numpy(), wanted[0].numpy(), term.numpy(), wanted[1].numpy(), *draw
    )
    callers = set()

    def walk(*arguments: object) -> None:
        callers.add(threading.get_ident())
        time.sleep(0.05)  # no thread is done before the last one has begun
        philox_cpu.drop_and_add_kept(*arguments)

    found = [torch.full_like(x, torch.nan), out.clone()]
    cpu._share(walk, (x, found[0], term, found[1]), draw)
    assert len(callers) == 3
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_several_threads_equal_the_oracle(three_threads: None) -> None:
    rows = Rows.from_lengths([400, 1, 199])
    assert_close(case(rows, d_in=257, d_outs=(33, 12), ranks=(5, 8), p=0.2), "cpu", torch.float32)


@pytest.mark.parametrize("shared", [False, True])
def test_stacked_modules_equal_the_oracle(shared: bool) -> None:
    made = case(RAGGED, d_outs=(33, 12, 40), ranks=(5, 8, 1), p=0.2)
    assert_close(made, "cpu", torch.float32, share_dropout=shared)


@pytest.mark.parametrize(
    "needs", [c for n in range(5) for c in itertools.combinations(NAMES, n)], ids="-".join
)
def test_any_subset_of_gradients(needs: tuple[str, ...]) -> None:
    assert_close(case(TWO_RUNS, p=0.3), "cpu", torch.float64, needs)


def test_base_called_normally_takes_the_same_masks() -> None:
    made = case(RAGGED, p=0.3)
    (dense,), gradients = made.run("cpu", torch.float64)
    (called,), others = made.run("composable", torch.float64)
    torch.testing.assert_close(dense, called, rtol=0, atol=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name], rtol=0, atol=1e-11)


@pytest.mark.parametrize("rows", [Rows.padded(0, 4), Rows.from_lengths([0, 0])])
def test_empty_batches_give_zero_gradients(rows: Rows) -> None:
    _, gradients = case(rows, p=0.1).run("cpu", torch.float32)
    assert len(gradients) == 4
    for name, gradient in gradients.items():
        assert not gradient.any(), name


def test_inputs_and_upstream_gradients_are_left_alone() -> None:
    made = case(PADDED, p=0.3)
    wide = torch.randn(2 * made.x.shape[0], made.x.shape[1] + 3, dtype=torch.float64)
    view = wide[::2, 1:-2]
    view.copy_(made.x)
    before = wide.clone()
    made.x = view
    assert_close(made, "cpu", torch.float64)
    assert torch.equal(wide, before)


def test_twenty_repeats_are_equal_to_the_bit() -> None:
    made = case(RAGGED, d_in=256, p=0.1)
    (first,), gradients = made.run("cpu", torch.float32)
    for _ in range(19):
        (y,), again = made.run("cpu", torch.float32)
        assert torch.equal(y, first)
        assert all(torch.equal(again[name], gradients[name]) for name in gradients)
