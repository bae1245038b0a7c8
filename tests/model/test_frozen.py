"""Frozen products: the numbers of torch's own layer, nothing of x kept, all else untouched."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.nn import functional as F

from rellax_ds.model import frozen
from rellax_ds.model.frozen import FrozenProducts

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the products that oneDNN was asked for."""
    seen: list[tuple[int, ...]] = []
    product = frozen._product

    def spy(x: torch.Tensor, weight: torch.Tensor, bias: Any) -> torch.Tensor:
        seen.append(tuple(x.shape))
        return product(x, weight, bias)

    monkeypatch.setattr(frozen, "_product", spy)
    return seen


def layer(bias: bool, dtype: torch.dtype = torch.float32) -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(24, 40, bias=bias, dtype=dtype).requires_grad_(False)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("view", [lambda x: x, lambda x: x.transpose(0, 1), lambda x: x[:, ::2]])
def test_frozen_linear_has_the_values_and_gradient_of_float64(
    bias: bool, view: Callable[[torch.Tensor], torch.Tensor], taken: list[tuple[int, ...]]
) -> None:
    base = layer(bias)
    x = torch.randn(5, 14, 24, requires_grad=True)
    with FrozenProducts():
        y = base(view(x))
    dy = torch.randn(y.shape)
    (dx,) = torch.autograd.grad(y, x, dy)
    exact = x.detach().double().requires_grad_()
    expected = base.double()(view(exact))
    (expected_dx,) = torch.autograd.grad(expected, exact, dy.double())
    # Sums of 24 and 40 float32 products of size 1: a few units in the last place.
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dx.double(), expected_dx, rtol=1e-5, atol=1e-5)
    assert len(taken) == 2, "forward and backward are both taken over"


def test_frozen_linear_keeps_the_weight_itself_and_nothing_of_x() -> None:
    base, saved = layer(bias=True), []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    x = torch.randn(32, 24, requires_grad=True)
    with FrozenProducts(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        base(x)
    assert [tensor is base.weight for tensor in saved] == [True]


@pytest.mark.parametrize(
    ("change", "rows", "dtype"),
    [
        (lambda base: base.weight.requires_grad_(True), 32, torch.float32),
        (lambda base: base.bias.requires_grad_(True), 32, torch.float32),
        (lambda base: base, 2, torch.float32),
        (lambda base: base, 32, torch.float64),
        (lambda base: base, 32, torch.bfloat16),
    ],
    ids=["trained weight", "trained bias", "few rows", "float64", "bfloat16"],
)
def test_products_that_do_not_fit_are_torchs_own(
    change: Callable[[torch.nn.Linear], object],
    rows: int,
    dtype: torch.dtype,
    taken: list[tuple[int, ...]],
) -> None:
    base = layer(bias=True, dtype=dtype)
    change(base)
    x = torch.randn(rows, 24, dtype=dtype)
    with FrozenProducts():
        y = base(x)
    assert not taken
    assert torch.equal(y, F.linear(x, base.weight, base.bias))


@pytest.mark.parametrize(
    ("vendor", "capability", "pays"),
    [
        ("AuthenticAMD", "AVX512", True),
        ("GenuineIntel", "AVX512", False),
        ("AuthenticAMD", "AVX2", False),
        ("", "AVX512", False),
    ],
)
def test_rule_follows_the_cpu(
    vendor: str, capability: str, pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen, "cpu_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    frozen.onednn_pays.cache_clear()
    context = frozen.frozen_products()
    frozen.onednn_pays.cache_clear()
    assert isinstance(context, FrozenProducts if pays else contextlib.nullcontext)
