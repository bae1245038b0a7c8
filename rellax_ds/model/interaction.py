"""M(h): the interaction matrices of all adapted layers, computed together once per step.

Every adapted layer t has its own gate network LayerNorm(h) -> Linear -> GELU -> Linear whose
outputs are the free entries of an R x R matrix. The networks' parameters are stacked over the T
layers, so one step costs two batched products in place of 2 T tiny ones inside the layer loop, one
ZeRO-3 gather in place of T, and nothing is recomputed under gradient checkpointing.

The kinds differ only in how the outputs fill the matrix; the operator always gets a dense G. Which
kinds exist and what they need is in `rellax_ds.family`.

Legend: T adapted layers, P gate networks (T, or 1 when shared), B samples, H width of the instance
embedding h, K hidden width, F free entries, R rank, N experts, r = R / N.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from rellax_ds.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rellax_ds.family import InteractionSpec


class StackedInteraction(nn.Module):
    """Interaction matrices of T layers as one module; `stacked_interaction` makes the right one.

    Attributes:
        spec: The kind of M and its sizes.
        num_layers: T.
    """

    def __init__(self, spec: InteractionSpec, num_layers: int) -> None:
        super().__init__()
        self.spec = spec
        self.num_layers = num_layers

    @property
    def input_independent(self) -> bool:
        """Whether M is the same for every sample."""
        return self.spec.input_independent

    def reset_parameters(self) -> None:
        """Draw the starting point."""
        raise NotImplementedError

    def forward(self, instance: torch.Tensor) -> torch.Tensor:
        """Gates for a batch.

        Args:
            instance: h, [B, H], any float type; a static kind reads only its B.

        Returns:
            G [T, B, R, R] in the row convention S = H G, that is M = G^T.
        """
        raise NotImplementedError

    def per_layer(self, instance: torch.Tensor, plain: bool = False) -> Sequence[torch.Tensor]:
        """Gates as one [B, R, R] tensor per layer; unbinding once makes the backward one stack.

        Args:
            instance: h, [B, H].
            plain: Add a sample B whose gate is I.
        """
        gates: torch.Tensor = self(instance)
        if plain:
            eye = _eye(self.spec.rank, gates).expand(gates.shape[0], 1, -1, -1)
            gates = torch.cat([gates, eye], dim=1)
        return gates.unbind(0)

    def matrices(self) -> torch.Tensor:
        """M itself (not G) of every layer, [T, R, R], where it does not depend on the sample.

        Raises:
            ConfigError: It does.
        """
        raise ConfigError(
            f"interaction {self.spec.kind} has no one matrix: M(h) differs from sample to sample"
        )


class GateNetworks(StackedInteraction):
    """Gates conditioned on h (ReLLaX, CFLoRA: G = W2 GELU(W1 LN(h) + c1) + c2, and its relatives).

    Started at the identity, W2 = c2 = 0: the matrix is I, or that of equally weighted experts, and
    changes nothing until it is trained. The factorised head zeroes the half of W2 that gives U and
    draws the half that gives V, else neither would ever get a gradient.

    Attributes:
        norm_weight, norm_bias: [P, H].
        weight_in, bias_in: [P, H, K], [P, K].
        weight_out, bias_out: [P, K, F], [P, F].
    """

    def __init__(self, spec: InteractionSpec, num_layers: int, instance_dim: int) -> None:
        super().__init__(spec, num_layers)
        networks = 1 if spec.shared else num_layers
        self.norm_weight = nn.Parameter(torch.empty(networks, instance_dim))
        self.norm_bias = nn.Parameter(torch.empty(networks, instance_dim))
        self.weight_in = nn.Parameter(torch.empty(networks, instance_dim, spec.width))
        self.bias_in = nn.Parameter(torch.empty(networks, spec.width))
        self.weight_out = nn.Parameter(torch.empty(networks, spec.width, spec.outputs))
        self.bias_out = nn.Parameter(torch.empty(networks, spec.outputs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the starting point; the weights follow torch's own Linear initialisation, biases are
        zero.
        """
        nn.init.ones_(self.norm_weight)
        _uniform_fan_in(self.weight_in)
        if self.spec.head == "factorised":
            _uniform_fan_in(self.weight_out)
            with torch.no_grad():
                self.weight_out[..., : self.spec.outputs // 2] = 0.0
        elif self.spec.init == "identity":
            nn.init.zeros_(self.weight_out)
        else:
            _uniform_fan_in(self.weight_out)
        for bias in (self.norm_bias, self.bias_in, self.bias_out):
            nn.init.zeros_(bias)

    def forward(self, instance: torch.Tensor) -> torch.Tensor:
        """Gates for a batch; see the base class."""
        h_BH = instance.to(self.weight_in.dtype)
        h_BH = F.layer_norm(h_BH, h_BH.shape[-1:])
        h_PBH = torch.addcmul(self.norm_bias.unsqueeze(1), h_BH, self.norm_weight.unsqueeze(1))
        k_PBK = F.gelu(torch.baddbmm(self.bias_in.unsqueeze(1), h_PBH, self.weight_in))
        f_PBF = torch.baddbmm(self.bias_out.unsqueeze(1), k_PBK, self.weight_out)
        gates = interaction_gates(self.spec, f_PBF)
        return gates.expand(self.num_layers, -1, -1, -1)


class StaticMatrices(StackedInteraction):
    """One free matrix per layer, G = I + D with D = 0 at the start, the same for every sample.

    Where A and B train as well it adds nothing to plain LoRA, since B M is just another B.

    Attributes:
        offset: D, [T, R, R], M = I + c D with c the spec's scale; weight decay on it pulls M to I.
    """

    def __init__(self, spec: InteractionSpec, num_layers: int) -> None:
        super().__init__(spec, num_layers)
        self.offset = nn.Parameter(torch.empty(num_layers, spec.rank, spec.rank))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start at the identity."""
        nn.init.zeros_(self.offset)

    def forward(self, instance: torch.Tensor) -> torch.Tensor:
        """Gates for a batch; see the base class."""
        return self._gates().unsqueeze(1).expand(-1, instance.shape[0], -1, -1)

    def matrices(self) -> torch.Tensor:
        """M of every layer, [T, R, R]."""
        return self._gates().transpose(1, 2)

    def _gates(self) -> torch.Tensor:
        return self.spec.scale * self.offset + _eye(self.spec.rank, self.offset)


def stacked_interaction(
    spec: InteractionSpec, num_layers: int, instance_dim: int | None
) -> StackedInteraction:
    """The module that computes M(h) for all layers of an adapter.

    Args:
        spec: The kind and its sizes; `identity` needs no module and has none.
        num_layers: T.
        instance_dim: Width of h; a static kind needs none.

    Raises:
        ConfigError: The kind is `identity`, or h is needed and has no width.
    """
    if spec.kind == "identity":
        raise ConfigError("interaction identity has no parameters; leave the gates out")
    if spec.input_independent:
        return StaticMatrices(spec, num_layers)
    if not instance_dim:
        raise ConfigError(
            f"interaction '{spec.kind}' needs instance_dim, the width of the instance embedding h"
        )
    return GateNetworks(spec, num_layers, instance_dim)


def interaction_gates(spec: InteractionSpec, outputs: torch.Tensor) -> torch.Tensor:
    """Dense gates from a head's outputs.

    Args:
        spec: The kind; decides how the outputs fill the matrix.
        outputs: [..., F]: router logits, or the entries of M - I (of M without a residual), in the
            row convention; with the factorised head U, then V.

    Returns:
        G [..., R, R] in the row convention, M = G^T.
    """
    rank, batch = spec.rank, outputs.shape[:-1]
    if spec.routed:
        return expert_gates(spec, torch.softmax(outputs / spec.temperature, dim=-1))
    if spec.scale != 1.0 and spec.head != "factorised":
        outputs = spec.scale * outputs
    if spec.head == "factorised":
        u, v = outputs.reshape(*batch, 2, rank, spec.factor_rank).unbind(-3)
        gates = spec.scale * v @ u.transpose(-2, -1)
    elif spec.kind == "full":
        gates = outputs.view(*batch, rank, rank)
    elif spec.kind == "block_full":
        size = rank // spec.experts
        gates = _block_diagonal(outputs.view(*batch, spec.experts, size, size))
    else:
        gates = torch.diag_embed(outputs.expand(*batch, rank))
    return gates + _eye(rank, gates) if spec.residual else gates


def expert_gates(spec: InteractionSpec, weights: torch.Tensor) -> torch.Tensor:
    """Dense gates from the weights of the experts; symmetric, so G = M.

    `block` (iLoRA) scales each band by N w_k, since its published scale is alpha / (R / N). `moe`
    (MoELoRA) and `rec_sum` (RecLoRA as described: the products B_k A_k are mixed) take w_k itself.
    `rec_prod` (RecLoRA as coded: the factors are mixed, then multiplied) couples all pairs,
    M = (w w^T) (x) I_r, which has rank r, not R.

    Args:
        spec: A kind with a router.
        weights: w, [..., N].

    Returns:
        [..., R, R].
    """
    size = spec.rank // spec.experts
    if spec.kind == "rec_prod":
        wide = weights.repeat_interleave(size, dim=-1)
        same_place = _eye(size, weights).repeat(spec.experts, spec.experts)
        return wide.unsqueeze(-1) * wide.unsqueeze(-2) * same_place
    if spec.kind == "block":
        weights = weights * spec.experts
    return torch.diag_embed(weights.repeat_interleave(size, dim=-1))


def interaction_norms(gates: torch.Tensor) -> torch.Tensor:
    """How far M(h) is from plain LoRA, layer by layer.

    Args:
        gates: G or M, [T, B, R, R]; the norm does not see the transpose.

    Returns:
        Mean over the samples of the Frobenius norm of M - I, float32 or wider, [T], detached.
    """
    wide = gates.detach().to(torch.promote_types(gates.dtype, torch.float32))
    departures: torch.Tensor = torch.linalg.matrix_norm(wide - _eye(wide.shape[-1], wide))
    return departures.mean(dim=1)


def _block_diagonal(blocks: torch.Tensor) -> torch.Tensor:
    """[..., N, r, r] to [..., N r, N r]."""
    count, size = blocks.shape[-3:-1]
    placed = blocks.unsqueeze(-2) * _eye(count, blocks).view(count, 1, count, 1)
    return placed.reshape(*blocks.shape[:-3], count * size, count * size)


def _eye(size: int, like: torch.Tensor) -> torch.Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device)


def _uniform_fan_in(weight: nn.Parameter) -> None:
    bound = 1.0 / math.sqrt(weight.shape[1])
    nn.init.uniform_(weight, -bound, bound)
