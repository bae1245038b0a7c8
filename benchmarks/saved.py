"""Bytes a layer keeps for its backward pass.

What autograd saves lives until the backward pass of the layer, so over all layers it is the
activation memory of training. A tensor saved twice is one storage and counts once, a saved view
keeps its whole storage, and parameters are there anyway.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from benchmarks.passes import peft_layer
from rellax_ds import ops
from rellax_ds.kernels.rows import Rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

SAMPLES = 4


def saved_bytes(run: Callable[[], object], parameters: Iterable[torch.Tensor]) -> int:
    """Bytes of distinct storages that autograd saves during `run`, those of `parameters` left out.

    Args:
        run: Runs the forward pass and returns what keeps its graph alive.
        parameters: Tensors that exist regardless: weights, factors and their like.
    """
    known = {_key(parameter) for parameter in parameters}
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if _key(tensor) not in known:
            found[_key(tensor)] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = run()
    total = sum(storage.nbytes() for storage in found.values())
    del kept
    return total


def peft_saved(
    tokens: int, width: int, rank: int, dtype: torch.dtype, adapter_dtype: torch.dtype, p: float
) -> int:
    """Bytes PEFT's LoRA layer keeps, with dropout as a GPU runs it: a mask of a byte an element."""
    layer = peft_layer(width, rank, p, dtype, adapter_dtype)
    x = torch.empty(tokens, width, dtype=dtype, device="meta", requires_grad=True)
    return saved_bytes(lambda: layer(x), layer.parameters())


def our_saved(
    tokens: int,
    width: int,
    rank: int,
    dtype: torch.dtype,
    p: float,
    trains_factors: bool,
    path: str | None = None,
    device: str = "cpu",
) -> int:
    """Bytes the operator keeps, with gates and either A and B trained or the gates alone.

    The gates are counted: they are made anew for every batch.
    """
    x = torch.randn(tokens, width, dtype=dtype, device=device, requires_grad=True)
    weight = torch.randn(width, width, dtype=dtype, device=device)
    A = torch.randn(rank, width, dtype=dtype, device=device, requires_grad=trains_factors)
    B = torch.randn(width, rank, dtype=dtype, device=device, requires_grad=trains_factors)
    gates = torch.randn(SAMPLES, rank, rank, device=device, requires_grad=True)
    rows = Rows.padded(SAMPLES, tokens // SAMPLES)

    def run() -> object:
        return ops.cflora(
            x,
            [ops.Dense(weight)],
            [ops.Factors(A, B, gates, 2.0)],
            rows,
            dropout_p=p,
            training=True,
            path=path,
        )

    return saved_bytes(run, [weight, A, B])


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
