"""Stacked gates: equal to one ordinary gate network per layer, their start, sizes and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rellax_ds.config import ModelConfig
from rellax_ds.errors import ConfigError
from rellax_ds.family import InteractionSpec
from rellax_ds.model.cflora import CFLoraConfig
from rellax_ds.model.interaction import (
    GateNetworks,
    StackedInteraction,
    interaction_norms,
    stacked_interaction,
)

LAYERS, SAMPLES, INSTANCE_DIM, RANK, EXPERTS = 4, 5, 7, 6, 3

CASES: dict[str, dict[str, Any]] = {
    "scalar": {"kind": "scalar"},
    "diag": {"kind": "diag"},
    "block": {"kind": "block"},
    "block_shared": {"kind": "block", "shared": True},
    "block_full": {"kind": "block_full"},
    "moe": {"kind": "moe"},
    "rec_sum_warm": {"kind": "rec_sum", "temperature": 5.0},
    "rec_prod": {"kind": "rec_prod"},
    "rec_prod_shared": {"kind": "rec_prod", "shared": True, "temperature": 2.0},
    "full": {"kind": "full"},
    "full_reference": {"kind": "full", "init": "reference"},
    "full_factorised": {"kind": "full", "head": "factorised", "factors": 2},
    "diag_reference": {"kind": "diag", "init": "reference"},
    "full_scaled": {"kind": "full", "scale": 0.25},
    "factorised_scaled": {"kind": "full", "head": "factorised", "factors": 2, "scale": 3.0},
    "scalar_reference_scaled": {"kind": "scalar", "init": "reference", "scale": 2.0},
}


def spec_of(case: str, **fields: Any) -> InteractionSpec:
    return InteractionSpec(**{"rank": RANK, "experts": EXPERTS} | CASES[case] | fields)


def gates_of(case: str, **fields: Any) -> GateNetworks:
    module = stacked_interaction(spec_of(case, **fields), LAYERS, INSTANCE_DIM)
    assert isinstance(module, GateNetworks)
    return module


def separate(stacked: GateNetworks, network: int) -> nn.Sequential:
    """The published gate of one layer, with the stacked module's parameters."""
    h, k = stacked.weight_in.shape[1:]
    net = nn.Sequential(
        nn.LayerNorm(h), nn.Linear(h, k), nn.GELU(), nn.Linear(k, stacked.spec.outputs)
    ).double()
    with torch.no_grad():
        net[0].weight.copy_(stacked.norm_weight[network])
        net[0].bias.copy_(stacked.norm_bias[network])
        net[1].weight.copy_(stacked.weight_in[network].T)
        net[1].bias.copy_(stacked.bias_in[network])
        net[3].weight.copy_(stacked.weight_out[network].T)
        net[3].bias.copy_(stacked.bias_out[network])
    return net


def written_out(spec: InteractionSpec, f: torch.Tensor) -> torch.Tensor:
    """G of one sample from the head's outputs, in torch's own block and Kronecker products."""
    size, unit = spec.rank // spec.experts, torch.eye(spec.rank, dtype=f.dtype)
    if spec.head == "factorised":
        u, v = f.view(2, spec.rank, spec.factor_rank)
        return unit + spec.scale * (u @ v.T).T
    w = torch.softmax(f / spec.temperature, 0)
    small = torch.eye(size, dtype=f.dtype)
    if spec.kind == "block":
        return torch.block_diag(*(spec.experts * w_k * small for w_k in w))
    if spec.kind in ("moe", "rec_sum"):
        return torch.kron(torch.diag(w), small)
    if spec.kind == "rec_prod":
        return torch.kron(torch.outer(w, w), small)
    start = torch.zeros_like(unit) if spec.init == "reference" else unit
    if not spec.routed:
        f = spec.scale * f
    if spec.kind == "scalar":
        return start + f * unit
    if spec.kind == "diag":
        return start + torch.diag(f)
    if spec.kind == "block_full":
        return start + torch.block_diag(*f.view(spec.experts, size, size))
    return start + f.view(spec.rank, spec.rank)


@pytest.mark.parametrize("case", CASES)
def test_stacked_gates_equal_per_layer_gates_in_value_and_gradient(case: str) -> None:
    torch.manual_seed(1)
    stacked = gates_of(case, hidden=5).double()
    with torch.no_grad():
        for parameter in stacked.parameters():
            parameter.copy_(torch.randn_like(parameter))
    instance = torch.randn(SAMPLES, INSTANCE_DIM, dtype=torch.float64)
    upstream = torch.randn(LAYERS, SAMPLES, RANK, RANK, dtype=torch.float64)
    gates = stacked.per_layer(instance)
    torch.autograd.backward([*gates], list(upstream))
    networks = stacked.weight_in.shape[0]
    assert networks == (1 if "shared" in case else LAYERS)
    for network in range(networks):
        net = separate(stacked, network)
        own = torch.stack([written_out(stacked.spec, row) for row in net(instance)])
        layers = range(LAYERS) if networks == 1 else [network]
        for layer in layers:
            torch.testing.assert_close(gates[layer], own, rtol=0, atol=1e-12)
        own.backward(sum(upstream[layer] for layer in layers))
        pairs = (
            (stacked.norm_weight, net[0].weight.grad),
            (stacked.norm_bias, net[0].bias.grad),
            (stacked.weight_in, net[1].weight.grad.T),
            (stacked.bias_in, net[1].bias.grad),
            (stacked.weight_out, net[3].weight.grad.T),
            (stacked.bias_out, net[3].bias.grad),
        )
        for ours, theirs in pairs:
            torch.testing.assert_close(ours.grad[network], theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "case", ["scalar", "diag", "block", "block_shared", "block_full", "full", "full_factorised"]
)
def test_gates_start_at_the_identity_exactly(case: str) -> None:
    gates = gates_of(case)(torch.randn(SAMPLES, INSTANCE_DIM))
    assert torch.equal(gates, torch.eye(RANK).expand(LAYERS, SAMPLES, RANK, RANK))


@pytest.mark.parametrize("case", ["moe", "rec_sum_warm", "rec_prod"])
def test_experts_start_with_equal_weight(case: str) -> None:
    gates = gates_of(case)(torch.randn(SAMPLES, INSTANCE_DIM))
    wanted = torch.eye(RANK) / EXPERTS
    if case == "rec_prod":
        wanted = torch.kron(torch.full((EXPERTS, EXPERTS), 1 / EXPERTS**2), torch.eye(2))
    torch.testing.assert_close(gates, wanted.expand_as(gates), rtol=0, atol=1e-7)


def test_reference_gates_start_at_the_published_size() -> None:
    torch.manual_seed(0)
    spec = InteractionSpec("full", 8, init="reference")
    gates = stacked_interaction(spec, 80, 256)(torch.randn(16, 256))
    assert gates.abs().mean().item() == pytest.approx(0.16, abs=0.02)
    norms = torch.linalg.matrix_norm(gates)
    assert norms.mean().item() == pytest.approx(1.56, abs=0.1)


@pytest.mark.parametrize("init", ["identity", "reference"])
def test_full_gates_draw_their_start_in_the_order_saved_runs_did(init: Any) -> None:
    torch.manual_seed(0)
    gates = gates_of("full", init=init)
    torch.manual_seed(0)
    width = 2 * RANK**2
    first = torch.empty(LAYERS, INSTANCE_DIM, width).uniform_(-(7**-0.5), 7**-0.5)
    assert torch.equal(gates.weight_in, first)
    if init == "reference":
        second = torch.empty(LAYERS, width, RANK**2).uniform_(-(width**-0.5), width**-0.5)
        assert torch.equal(gates.weight_out, second)
    assert list(dict(gates.named_parameters())) == [
        "norm_weight",
        "norm_bias",
        "weight_in",
        "bias_in",
        "weight_out",
        "bias_out",
    ]


@pytest.mark.parametrize("case", [c for c in CASES if "reference" not in c])
def test_gradient_reaches_the_first_layer_at_step_two(case: str) -> None:
    torch.manual_seed(2)
    gates = gates_of(case)
    optimizer = torch.optim.SGD(gates.parameters(), lr=0.1)
    instance, target = torch.randn(SAMPLES, INSTANCE_DIM), torch.randn(RANK, RANK)
    largest = []
    for _ in range(2):
        optimizer.zero_grad()
        (gates(instance) * target).sum().backward()
        if case == "full_factorised":
            u_part, v_part = gates.weight_out.grad.chunk(2, dim=-1)
            assert u_part.abs().max() > 0
            assert (v_part.abs().max() > 0) == bool(largest)
        largest.append({n: p.grad.abs().amax().item() for n, p in gates.named_parameters()})
        optimizer.step()
    late = ("norm_weight", "norm_bias", "weight_in", "bias_in")
    assert all(largest[0][name] == 0 for name in late)
    assert largest[0]["weight_out"] > 0
    assert largest[0]["bias_out"] > 0
    assert all(value > 0 for value in largest[1].values())


def num_parameters(instance_dim: int = 256, **fields: Any) -> int:
    """Parameters of one layer's gate."""
    with torch.device("meta"):
        module = stacked_interaction(InteractionSpec(**fields), 1, instance_dim)
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("r", [4, 8, 16, 32])
def test_parameters_of_the_published_head_grow_as_r_to_the_fourth(r: int) -> None:
    count = num_parameters(kind="full", rank=r)
    assert count == 2 * 256 + 2 * r**2 * 256 + 2 * r**2 + 2 * r**4 + r**2
    assert r != 8 or count == 41_664


@pytest.mark.parametrize("r", [8, 16, 32, 64])
def test_parameters_of_the_other_heads_do_not(r: int) -> None:
    h, m, q = 256, 48, 3
    narrow = num_parameters(kind="full", rank=r, hidden=m)
    assert narrow == 2 * h + m * h + m + m * r**2 + r**2
    factored = num_parameters(kind="full", rank=r, head="factorised", hidden=m, factors=q)
    assert factored == 2 * h + m * h + m + 2 * m * q * r + 2 * q * r
    assert num_parameters(kind="full", rank=r, head="factorised") == 66 * h + 64 + 65 * 8 * r
    assert num_parameters(kind="diag", rank=r) == 66 * h + 64 + 65 * r
    assert num_parameters(kind="scalar", rank=r) == 66 * h + 64 + 65
    assert num_parameters(kind="block", rank=r, experts=8) == 66 * h + 64 + 65 * 8
    assert num_parameters(kind="full_static", rank=r) == r**2
    f = r**2 // 4
    assert num_parameters(kind="block_full", rank=r) == 2 * h + (h + 1) * 2 * f + (2 * f + 1) * f


def test_shared_router_has_the_parameters_of_one_layer() -> None:
    one, all_layers = gates_of("moe", shared=True), gates_of("moe")
    size = sum(p.numel() for p in one.parameters())
    assert sum(p.numel() for p in all_layers.parameters()) == LAYERS * size


def test_static_matrices_are_one_per_layer_and_the_transpose_of_the_gates() -> None:
    torch.manual_seed(3)
    static = stacked_interaction(InteractionSpec("full_static", RANK), LAYERS, None)
    assert static.input_independent
    assert torch.equal(static.matrices(), torch.eye(RANK).expand(LAYERS, RANK, RANK))
    with torch.no_grad():
        static.offset.normal_()
    gates = static(torch.empty(SAMPLES, 0))
    assert gates.shape == (LAYERS, SAMPLES, RANK, RANK)
    for sample in range(SAMPLES):
        assert torch.equal(gates[:, sample].mT, static.matrices())
    gates.sum().backward()
    assert torch.equal(static.offset.grad, torch.full_like(static.offset, SAMPLES))
    gated = gates_of("full")
    assert not gated.input_independent
    with pytest.raises(ConfigError, match="differs from sample to sample"):
        gated.matrices()


def test_norms_are_the_mean_distance_from_the_identity_per_layer() -> None:
    torch.manual_seed(4)
    gates = torch.randn(LAYERS, SAMPLES, RANK, RANK, requires_grad=True)
    norms = interaction_norms(gates)
    assert norms.shape == (LAYERS,)
    assert not norms.requires_grad
    for layer in range(LAYERS):
        each = [(g - torch.eye(RANK)).square().sum().sqrt() for g in gates[layer]]
        torch.testing.assert_close(norms[layer], torch.stack(each).mean().detach())
    torch.testing.assert_close(interaction_norms(gates.mT), norms)
    start: StackedInteraction = gates_of("block")
    assert interaction_norms(start(torch.randn(2, INSTANCE_DIM)).bfloat16()).max() == 0
    assert interaction_norms(start(torch.randn(2, INSTANCE_DIM)).bfloat16()).dtype == torch.float32


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"interaction": "block", "interaction_experts": 3}, "interaction_experts 3 .* the rank 8"),
    ({"interaction": "block_full", "interaction_experts": 16}, "interaction_experts 16"),
    ({"interaction": "full", "interaction_shared": True}, "interaction_shared .* router"),
    ({"interaction": "full", "rank": 33}, "rank 33 .*1089.*interaction_head to factorised"),
    ({"interaction": "block_full", "interaction_experts": 2, "rank": 64}, "interaction_hidden"),
    ({"interaction": "diag", "interaction_head": "factorised"}, "needs interaction full"),
    ({"interaction_head": "factorised", "interaction_init": "reference"}, "and reference"),
    ({"interaction_head": "factorised", "interaction_factors": 9}, "interaction_factors 9"),
    ({"interaction": "full_static", "interaction_init": "reference"}, "identity only"),
    ({"interaction": "moe", "interaction_scale": 2.0}, "interaction_scale is 2 .* a router"),
    ({"interaction": "identity", "interaction_scale": 0.5}, "interaction_scale is 0.5"),
]


def test_scale_of_a_static_matrix_counts_in_gates_and_matrices() -> None:
    module = stacked_interaction(InteractionSpec("full_static", 3, scale=0.5), 2, None)
    with torch.no_grad():
        module.offset.copy_(torch.randn_like(module.offset))
    expected = torch.eye(3) + 0.5 * module.offset
    assert torch.allclose(module(torch.zeros(1, 4))[:, 0], expected)
    assert torch.allclose(module.matrices(), expected.transpose(1, 2))


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_undefined_combination_is_refused_by_recipe_and_adapter_alike(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**fields)
    settings = {"r" if name == "rank" else name: value for name, value in fields.items()}
    with pytest.raises(ConfigError, match=message) as caught:
        CFLoraConfig(instance_dim=INSTANCE_DIM, **settings)
    assert "\n" not in str(caught.value)


def test_spec_refuses_unknown_words_and_missing_parts() -> None:
    with pytest.raises(ConfigError, match="'fuller' is unknown; choose identity, scalar"):
        CFLoraConfig(interaction="fuller", instance_dim=INSTANCE_DIM)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="interaction_temperature is 0"):
        InteractionSpec("moe", 8, temperature=0.0)
    with pytest.raises(ConfigError, match="no parameters"):
        stacked_interaction(InteractionSpec("identity", 8), 2, 5)
    with pytest.raises(ConfigError, match="needs instance_dim"):
        stacked_interaction(InteractionSpec("diag", 8), 2, None)


@pytest.mark.parametrize(
    "fields",
    [
        {"rank": 64, "interaction_head": "factorised"},
        {"rank": 64, "interaction_hidden": 32},
        {"rank": 64, "interaction": "block_full", "interaction_experts": 4},
        {"rank": 64, "interaction": "diag"},
        {"rank": 64, "interaction": "full_static"},
        {"rank": 64, "interaction": "identity"},
        {"rank": 32},
    ],
)
def test_large_ranks_are_accepted_where_parameters_stay_few(fields: dict[str, Any]) -> None:
    assert ModelConfig(**fields).spec.rank == fields["rank"]
