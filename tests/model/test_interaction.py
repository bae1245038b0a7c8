"""Stacked gates against one ordinary gate network per layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rellax_ds.model.interaction import StackedInteraction


def separate(stacked: StackedInteraction, layer: int) -> nn.Sequential:
    """The published gate of one layer, with the stacked module's parameters."""
    h, k = stacked.weight_in.shape[1:]
    net = nn.Sequential(
        nn.LayerNorm(h), nn.Linear(h, k), nn.GELU(), nn.Linear(k, stacked.rank**2)
    ).double()
    with torch.no_grad():
        net[0].weight.copy_(stacked.norm_weight[layer])
        net[0].bias.copy_(stacked.norm_bias[layer])
        net[1].weight.copy_(stacked.weight_in[layer].T)
        net[1].bias.copy_(stacked.bias_in[layer])
        net[3].weight.copy_(stacked.weight_out[layer].T)
        net[3].bias.copy_(stacked.bias_out[layer])
    return net


@pytest.mark.parametrize("residual", [True, False])
def test_stacked_gates_equal_per_layer_gates_in_value_and_gradient(residual: bool) -> None:
    torch.manual_seed(1)
    stacked = StackedInteraction(4, 7, 3, hidden_dim=5, residual=residual).double()
    with torch.no_grad():
        for parameter in stacked.parameters():
            parameter.copy_(torch.randn_like(parameter))
    instance = torch.randn(6, 7, dtype=torch.float64)
    upstream = torch.randn(4, 6, 3, 3, dtype=torch.float64)
    gates = stacked.per_layer(instance)
    torch.autograd.backward([*gates], list(upstream))
    for layer in range(4):
        net = separate(stacked, layer)
        own = net(instance).view(6, 3, 3) + (torch.eye(3).double() if residual else 0.0)
        torch.testing.assert_close(gates[layer], own, rtol=0, atol=1e-12)
        own.backward(upstream[layer])
        pairs = (
            (stacked.norm_weight, net[0].weight.grad),
            (stacked.norm_bias, net[0].bias.grad),
            (stacked.weight_in, net[1].weight.grad.T),
            (stacked.bias_in, net[1].bias.grad),
            (stacked.weight_out, net[3].weight.grad.T),
            (stacked.bias_out, net[3].bias.grad),
        )
        for ours, theirs in pairs:
            torch.testing.assert_close(ours.grad[layer], theirs, rtol=0, atol=1e-12)


def test_residual_gates_start_at_the_identity_exactly() -> None:
    gates = StackedInteraction(2, 5, 4)(torch.randn(3, 5))
    assert torch.equal(gates, torch.eye(4).expand(2, 3, 4, 4))


def test_reference_gates_start_at_the_published_size() -> None:
    torch.manual_seed(0)
    gates = StackedInteraction(80, 256, 8, residual=False)(torch.randn(16, 256))
    assert gates.abs().mean().item() == pytest.approx(0.16, abs=0.02)
    assert sum(p[0].numel() for p in StackedInteraction(1, 256, 8).parameters()) == 41_664
