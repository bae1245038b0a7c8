"""The autograd function and the composable path against the fp64 oracle."""

from __future__ import annotations

import itertools

import pytest
import torch
from operator_cases import NAMES, PADDED, RAGGED, TWO_RUNS, assert_close, case

from rellax_ds.kernels.rows import Rows
from rellax_ds.ops import Dense, Factors, cflora

LAYOUTS = {"padded": PADDED, "ragged": RAGGED, "two-runs": TWO_RUNS}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_composable_equals_the_oracle(layout: str, dtype: torch.dtype, p: float) -> None:
    assert_close(case(LAYOUTS[layout], p=p), "composable", dtype)


@pytest.mark.parametrize("shared", [False, True])
def test_stacked_modules_equal_the_oracle(shared: bool) -> None:
    made = case(RAGGED, d_outs=(33, 12, 40), ranks=(5, 8, 1), p=0.2)
    assert_close(made, "composable", torch.float32, share_dropout=shared)


@pytest.mark.parametrize(
    "needs", [c for n in range(5) for c in itertools.combinations(NAMES, n)], ids="-".join
)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_any_subset_of_gradients(needs: tuple[str, ...], p: float) -> None:
    assert_close(case(TWO_RUNS, p=p), "composable", torch.float64, needs)


def test_without_gates_and_bias() -> None:
    assert_close(case(TWO_RUNS, gated=False, bias=False), "composable", torch.float32)


@pytest.mark.parametrize("rows", [Rows.padded(0, 4), Rows.from_lengths([0, 0]), Rows.padded(2, 0)])
def test_empty_batches_give_zero_gradients_not_none(rows: Rows) -> None:
    ys, gradients = case(rows, p=0.1).run("composable", torch.float32)
    assert ys[0].shape == (0, 33)
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert not gradient.any(), name


def test_rows_of_no_sample_get_the_base_output_only() -> None:
    rows = Rows.from_ids(torch.full((6,), -1), samples=2)
    made = case(rows, bias=False)
    ys, gradients = made.run("composable", torch.float64)
    torch.testing.assert_close(ys[0], made.x @ made.modules[0]["weight"].T)
    for name in ("A0", "B0", "gates0"):
        assert not gradients[name].any()


def test_strided_inputs_are_read_right_and_left_alone() -> None:
    made = case(PADDED, p=0.2)
    wide = torch.randn(2 * made.x.shape[0], made.x.shape[1] + 3, dtype=torch.float64)
    view = wide[::2, 1:-2]
    view.copy_(made.x)
    before = wide.clone()
    made.x = view
    assert_close(made, "composable", torch.float64)
    assert torch.equal(wide, before)


def test_seed_is_drawn_again_by_checkpointing() -> None:
    made = case(PADDED)
    x = made.x.clone().requires_grad_()
    m = made.modules[0]
    factors = Factors(m["A"].requires_grad_(), m["B"], m["gates"])

    def layer(x: torch.Tensor) -> torch.Tensor:
        return cflora(x, [Dense(m["weight"])], [factors], PADDED, dropout_p=0.4, training=True)[0]

    results = []
    for reentrant in (None, False, True):
        torch.manual_seed(8)
        y = (
            layer(x)
            if reentrant is None
            else torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant)
        )
        y.square().sum().backward()
        results.append((y.detach(), x.grad, factors.A.grad))
        x.grad = factors.A.grad = None
    for other in results[1:]:
        for ours, theirs in zip(results[0], other, strict=True):
            assert torch.equal(ours, theirs)


def test_frozen_factors_save_the_projection_and_not_the_input() -> None:
    made = case(RAGGED, d_in=256, p=0.1)
    sizes = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.shape)
        return tensor

    m = {k: t.float() for k, t in made.modules[0].items()}
    gates = m["gates"].requires_grad_()
    x = made.x.float().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        cflora(
            x,
            [Dense(m["weight"])],
            [Factors(m["A"], m["B"], gates)],
            RAGGED,
            dropout_p=0.1,
            training=True,
        )
    assert x.shape not in sizes
    assert (RAGGED.tokens, 5) in sizes
