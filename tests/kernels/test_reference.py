"""The oracle itself: against the written-out sum, and its gradients against finite differences."""

from __future__ import annotations

import itertools

import pytest
import torch

from rellax_ds.kernels.reference import cflora_delta


def made(batch: int = 3, tokens: int = 4, d_in: int = 5, d_out: int = 6, rank: int = 3):
    torch.manual_seed(0)
    shapes = ((batch, tokens, d_in), (rank, d_in), (d_out, rank), (batch, rank, rank))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def decomposed(x, A, B, gates, scaling):
    """scaling * sum_ij m_ij b_i (a_j . x) per sample, with M = G^T."""
    out = x.new_zeros(*x.shape[:2], B.shape[0])
    for b, i, j in itertools.product(range(x.shape[0]), range(A.shape[0]), range(A.shape[0])):
        m_ij = gates[b].T[i, j]
        out = out.index_add(
            0, torch.tensor([b]), (scaling * m_ij * (x[b] @ A[j])[:, None] * B[:, i])[None]
        )
    return out


def test_delta_with_dense_gates_equals_decomposed_sum_in_value_and_gradient() -> None:
    inputs = made()
    upstream = torch.randn(3, 4, 6, dtype=torch.float64)
    composite = cflora_delta(*inputs, 1.7)
    reference = decomposed(*inputs, 1.7)
    torch.testing.assert_close(composite, reference, rtol=0, atol=1e-10)
    for name, ours, theirs in zip(
        ("x", "A", "B", "gates"),
        torch.autograd.grad(composite, inputs, upstream),
        torch.autograd.grad(reference, inputs, upstream),
        strict=True,
    ):
        difference = (ours - theirs).abs().max()
        assert difference < 1e-10, name


@pytest.mark.parametrize("frozen", [(), (1, 2), (0,), (3,)], ids=["all", "gate", "no-x", "no-gate"])
def test_delta_gradients_match_finite_differences(frozen: tuple[int, ...]) -> None:
    inputs = made(batch=2, tokens=2, d_in=3, d_out=4, rank=2)
    for index in frozen:
        inputs[index].requires_grad_(False)
    assert torch.autograd.gradcheck(lambda *t: cflora_delta(*t, 0.5), inputs)


def test_delta_without_gates_equals_identity_gates() -> None:
    x, A, B, _ = made()
    identity = torch.eye(3, dtype=torch.float64).expand(3, 3, 3)
    assert torch.equal(cflora_delta(x, A, B, None, 2.0), cflora_delta(x, A, B, identity, 2.0))


def test_delta_dropout_keeps_the_mean_drops_at_its_rate_and_acts_in_training_only() -> None:
    x, A, B, gates = made()
    plain = cflora_delta(x, A, B, gates, 1.0)
    assert torch.equal(cflora_delta(x, A, B, gates, 1.0, 0.5, training=False), plain)
    ones, eye = torch.ones(301, 333), torch.eye(333)
    dropped = cflora_delta(ones, eye, eye, None, 1.0, 0.05, training=True)
    assert dropped.eq(0).float().mean().item() == pytest.approx(0.05, abs=0.003)
    assert dropped[dropped != 0].unique().item() == pytest.approx(1 / 0.95, rel=1e-4)
    for axis in (0, 1):
        assert dropped.eq(0).float().mean(axis).max() < 0.12
    again = cflora_delta(ones, eye, eye, None, 1.0, 0.05, training=True)
    assert not torch.equal(dropped, again)


def test_delta_of_a_sample_without_gradient_gets_an_exact_zero_gate_gradient() -> None:
    inputs = made()
    delta = cflora_delta(*inputs, 1.0)
    (gradient,) = torch.autograd.grad(delta[[0, 2]].sum(), [inputs[3]])
    assert gradient[1].abs().max() == 0
    assert gradient[0].abs().max() > 0
