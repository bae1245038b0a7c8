"""The door: which path is taken, what is refused, and that its tensors mean what they say."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rellax_ds import ops
from rellax_ds.errors import ConfigError, KernelUnavailableError
from rellax_ds.kernels.rows import Rows
from rellax_ds.ops import Dense, Factors, cflora


def made(samples: int = 3, length: int = 4, d_in: int = 5, d_out: int = 6, rank: int = 2):
    torch.manual_seed(0)
    x = torch.randn(samples, length, d_in)
    A, B = torch.randn(rank, d_in), torch.randn(d_out, rank)
    return x, Dense(torch.randn(d_out, d_in)), Factors(A, B, torch.randn(samples, rank, rank), 2.0)


def test_unknown_path_is_refused_and_the_choice_stays() -> None:
    before = ops.chosen()
    with pytest.raises(ConfigError, match="unknown compute path 'cuda'"):
        ops.use("cuda")
    assert ops.chosen() == before


def test_using_restores_the_choice() -> None:
    with ops.using("reference"):
        assert ops.chosen() == "reference"
    assert ops.chosen() == "auto"


def test_named_path_that_cannot_compute_the_layer_is_refused_with_the_reason() -> None:
    x, _, factors = made()
    trained = nn.Linear(5, 6)
    for path in ops.available():
        if path not in ("reference", "composable"):
            with pytest.raises(KernelUnavailableError, match="must be called normally"):
                cflora(x, [trained], [factors], path=path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gates": torch.randn(2, 2, 2)}, "do not fit 3 samples"),
        ({"gates": torch.randn(3, 3, 3)}, "do not fit 3 samples"),
        ({"A": torch.randn(2, 4)}, "do not fit an input of width 5"),
        ({"B": torch.randn(6, 3)}, "do not fit an input of width 5"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    x, base, factors = made()
    fields = {"A": factors.A, "B": factors.B, "gates": factors.gates} | change
    with pytest.raises(ConfigError, match=message):
        cflora(x, [base], [Factors(**fields)])


def test_rows_of_another_batch_are_refused() -> None:
    x, base, factors = made()
    with pytest.raises(ConfigError, match="describe 11 tokens, the input has 12"):
        cflora(x, [base], [factors], Rows.from_lengths([4, 4, 3]))


@pytest.mark.parametrize("p", [-0.1, 1.0])
def test_impossible_drop_rate_is_refused(p: float) -> None:
    x, base, factors = made()
    with pytest.raises(ConfigError, match="outside"):
        cflora(x, [base], [factors], dropout_p=p, training=True)


def test_dense_layers_are_those_a_path_may_read() -> None:
    plain = nn.Linear(5, 6).requires_grad_(False)
    assert ops.as_dense(plain).weight is plain.weight
    assert ops.as_dense(nn.Linear(5, 6)) is None, "trained"

    class Own(nn.Linear):
        pass

    assert ops.as_dense(Own(5, 6).requires_grad_(False)) is None, "a subclass may compute more"
    plain.register_forward_hook(lambda *_: None)
    assert ops.as_dense(plain) is None, "a hook must run"


def test_weights_partitioned_by_zero3_are_not_read() -> None:
    partitioned = nn.Linear(5, 6).requires_grad_(False)
    partitioned.weight.ds_id = 7  # what DeepSpeed marks them with
    assert ops.as_dense(partitioned) is None
    with ops.using("cpu"), pytest.raises(KernelUnavailableError, match="ZeRO-3"):
        cflora(made()[0], [partitioned], [made()[2]])


def test_conv1d_is_read_transposed_and_equals_its_own_forward() -> None:
    layer = Conv1D(6, 5).requires_grad_(False)
    nn.init.normal_(layer.bias)
    dense = ops.as_dense(layer)
    assert dense is not None
    assert dense.weight.shape == (6, 5)
    x, _, factors = made()
    found, wanted = (cflora(x, [layer], [factors], path=path)[0] for path in ("cpu", "composable"))
    torch.testing.assert_close(found, wanted)


def test_hooks_of_a_base_run_and_its_kept_output_is_not_overwritten() -> None:
    x, _, factors = made()
    kept = []

    class Squared(nn.Linear):
        def forward(self, x):
            return super().forward(x).sigmoid()

    base = Squared(5, 6).requires_grad_(False)
    base.register_forward_hook(lambda module, args, output: kept.append(output.clone()))
    x.requires_grad_()
    (y,) = cflora(x, [base], [factors])
    (theirs,) = cflora(x, [base], [factors], path="reference")
    torch.testing.assert_close(y, theirs)
    mine = torch.autograd.grad(y.square().sum(), x)[0]
    other = torch.autograd.grad(theirs.square().sum(), x)[0]
    torch.testing.assert_close(mine, other)
    assert len(kept) == 2


@pytest.mark.parametrize("path", [None, "reference", "composable"])
def test_autocast_computes_in_its_type_and_returns_gradients_in_the_parameters_type(path) -> None:
    x, _, f = made()
    base = nn.Linear(5, 6).requires_grad_(False)
    A = f.A.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (y,) = cflora(x, [base], [Factors(A, f.B, f.gates)], path=path)
    assert y.dtype == torch.bfloat16
    (gradient,) = torch.autograd.grad(y.float().sum(), A)
    assert gradient.dtype == torch.float32
    (exact,) = cflora(x, [base], [Factors(A, f.B, f.gates)], path=path)
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.1)
