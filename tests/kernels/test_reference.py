"""The oracle itself: against the written-out sum, and its gradients against finite differences."""

from __future__ import annotations

import itertools

import pytest
import torch

from rellax_ds.kernels.philox import Dropout
from rellax_ds.kernels.reference import update
from rellax_ds.kernels.rows import Rows

ROWS = Rows.from_lengths([4, 3, 5])


def made(rows: Rows = ROWS, d_in: int = 5, d_out: int = 6, rank: int = 3):
    torch.manual_seed(0)
    shapes = ((rows.tokens, d_in), (rank, d_in), (d_out, rank), (rows.samples, rank, rank))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def decomposed(x, A, B, gates, rows, scaling):
    """scaling * sum_ij m_ij b_i (a_j . x) per token, with M = G^T of its sample."""
    out = x.new_zeros(x.shape[0], B.shape[0])
    for t, i, j in itertools.product(range(x.shape[0]), range(A.shape[0]), range(A.shape[0])):
        sample = int(rows.ids()[t])
        if sample >= 0:
            m_ij = gates[sample].T[i, j]
            term = scaling * m_ij * (x[t] @ A[j]) * B[:, i]
            out = out.index_add(0, torch.tensor([t]), term[None])
    return out


@pytest.mark.parametrize("rows", [ROWS, Rows.from_ids(torch.tensor([0, -1, 1, 1, 0]), 3)])
def test_update_equals_decomposed_sum_in_value_and_gradient(rows: Rows) -> None:
    inputs = made(rows)
    upstream = torch.randn(rows.tokens, 6, dtype=torch.float64)
    composite = update(*inputs, rows, 1.7)
    written_out = decomposed(*inputs, rows, 1.7)
    torch.testing.assert_close(composite, written_out, rtol=0, atol=1e-10)
    for name, ours, theirs in zip(
        ("x", "A", "B", "gates"),
        torch.autograd.grad(composite, inputs, upstream),
        torch.autograd.grad(written_out, inputs, upstream),
        strict=True,
    ):
        assert (ours - theirs).abs().max() < 1e-10, name


@pytest.mark.parametrize("frozen", [(), (1, 2), (0,), (3,)], ids=["all", "gate", "no-x", "no-gate"])
def test_gradients_match_finite_differences_with_dropout(frozen: tuple[int, ...]) -> None:
    inputs = made(d_in=3, d_out=4, rank=2)
    for index in frozen:
        inputs[index].requires_grad_(False)
    dropout = Dropout(torch.tensor([7]), 20_000, (0,))
    assert torch.autograd.gradcheck(lambda *t: update(*t, ROWS, 0.5, dropout), inputs)


def test_no_gates_equal_identity_gates() -> None:
    x, A, B, _ = made()
    identity = torch.eye(3, dtype=torch.float64).expand(3, 3, 3)
    assert torch.equal(update(x, A, B, None, ROWS, 2.0), update(x, A, B, identity, ROWS, 2.0))


def test_dropout_keeps_the_mean_and_drops_at_its_rate() -> None:
    rows = Rows.padded(1, 301)
    ones, eye = torch.ones(301, 333), torch.eye(333)
    dropout = Dropout(torch.tensor([3]), 3277, (0,))
    dropped = update(ones, eye, eye, None, rows, 1.0, dropout)
    assert dropped.eq(0).float().mean().item() == pytest.approx(0.05, abs=0.003)
    assert dropped[dropped != 0].unique().item() == pytest.approx(1 / 0.95, rel=1e-4)
    for axis in (0, 1):
        assert dropped.eq(0).float().mean(axis).max() < 0.12


def test_sample_without_gradient_gets_an_exact_zero_gate_gradient() -> None:
    inputs = made()
    (gradient,) = torch.autograd.grad(update(*inputs, ROWS, 1.0)[7:].sum(), [inputs[3]])
    assert gradient[:2].abs().max() == 0
    assert gradient[2].abs().max() > 0
