"""`torch.compile` of the operator: one graph, the eager results, and no compilation per packing."""

from __future__ import annotations

import pytest
import torch
from operator_cases import PADDED, TWO_RUNS, case
from torch import nn

from rellax_ds.kernels.rows import Rows
from rellax_ds.ops import Dense, Factors, cflora


def loss(x, base, A, B, G, rows, seed):
    (y,) = cflora(x, [base], [Factors(A, B, G, 1.7)], rows, dropout_p=0.2, training=True, seed=seed)
    return y.square().sum()


@pytest.mark.parametrize("rows", [PADDED, TWO_RUNS], ids=["padded", "two-runs"])
@pytest.mark.parametrize("frozen", [False, True])
def test_one_graph_with_the_eager_value_and_gradients(rows: Rows, frozen: bool) -> None:
    made = case(rows)
    m = {k: t.float() for k, t in made.modules[0].items()}
    base = Dense(m["weight"], m["bias"])
    tensors = [made.x.float(), m["gates"]] + ([] if frozen else [m["A"], m["B"]])
    for tensor in tensors:
        tensor.requires_grad_()
    seed = torch.tensor([5])
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (loss, compiled):
        value = function(tensors[0], base, m["A"], m["B"], tensors[1], rows, seed)
        results.append((value.detach(), *torch.autograd.grad(value, tensors)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


def test_a_new_packing_of_as_many_samples_compiles_nothing() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    made = case(Rows.from_lengths([10, 14]))
    m = {k: t.float() for k, t in made.modules[0].items()}
    layer = nn.Linear(31, 33).requires_grad_(False)
    for lengths in ([10, 14], [3, 21], [23, 1]):
        rows = Rows.from_lengths(lengths)
        arguments = (made.x.float(), layer, m["A"], m["B"], m["gates"], rows, torch.tensor([5]))
        torch.testing.assert_close(compiled(*arguments), loss(*arguments), rtol=1e-5, atol=1e-3)
    assert counter.frame_count == 1
