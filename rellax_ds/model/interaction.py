"""M(h): the interaction matrices of all adapted layers, computed together once per step.

Every adapted layer t has its own gate network LayerNorm(h) -> Linear -> GELU -> Linear, read as an
r x r matrix. Their parameters are stacked over the T layers, so one step costs two batched products
in place of 2 T tiny ones inside the layer loop, one ZeRO-3 gather in place of T, and nothing is
recomputed under gradient checkpointing.

Legend: T adapted layers, B samples, H width of the instance embedding h, K hidden width, r rank.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Sequence


class StackedInteraction(nn.Module):
    """Gates of T layers as one module (ReLLaX, CFLoRA: G = W2 GELU(W1 LN(h) + c1) + c2).

    A residual gate is G = I + f(h) with W2 = c2 = 0 at the start, so it changes nothing until it is
    trained. Without the residual G = f(h) from torch's usual start, as in the published code; that
    scrambles a trained adapter.

    Attributes:
        norm_weight, norm_bias: [T, H].
        weight_in, bias_in: [T, H, K], [T, K].
        weight_out, bias_out: [T, K, r * r], [T, r * r].
    """

    def __init__(
        self,
        num_layers: int,
        instance_dim: int,
        rank: int,
        hidden_dim: int | None = None,
        residual: bool = True,
    ) -> None:
        super().__init__()
        self.rank = rank
        self.residual = residual
        width = hidden_dim or 2 * rank * rank
        self.norm_weight = nn.Parameter(torch.empty(num_layers, instance_dim))
        self.norm_bias = nn.Parameter(torch.empty(num_layers, instance_dim))
        self.weight_in = nn.Parameter(torch.empty(num_layers, instance_dim, width))
        self.bias_in = nn.Parameter(torch.empty(num_layers, width))
        self.weight_out = nn.Parameter(torch.empty(num_layers, width, rank * rank))
        self.bias_out = nn.Parameter(torch.empty(num_layers, rank * rank))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the starting point; the weights follow torch's own Linear initialisation, biases are
        zero.
        """
        nn.init.ones_(self.norm_weight)
        _uniform_fan_in(self.weight_in)
        if self.residual:
            nn.init.zeros_(self.weight_out)
        else:
            _uniform_fan_in(self.weight_out)
        for bias in (self.norm_bias, self.bias_in, self.bias_out):
            nn.init.zeros_(bias)

    def forward(self, instance: torch.Tensor) -> torch.Tensor:
        """Gates for a batch.

        Args:
            instance: h, [B, H], any float type.

        Returns:
            G [T, B, r, r] in the row convention S = H G, that is M = G^T.
        """
        h_BH = instance.to(self.weight_in.dtype)
        h_BH = F.layer_norm(h_BH, h_BH.shape[-1:])
        h_TBH = torch.addcmul(self.norm_bias.unsqueeze(1), h_BH, self.norm_weight.unsqueeze(1))
        k_TBK = F.gelu(torch.baddbmm(self.bias_in.unsqueeze(1), h_TBH, self.weight_in))
        g_TBR = torch.baddbmm(self.bias_out.unsqueeze(1), k_TBK, self.weight_out)
        gates = g_TBR.view(*g_TBR.shape[:2], self.rank, self.rank)
        if self.residual:
            gates = gates + torch.eye(self.rank, dtype=gates.dtype, device=gates.device)
        return gates

    def per_layer(self, instance: torch.Tensor) -> Sequence[torch.Tensor]:
        """Gates as one [B, r, r] tensor per layer; unbinding once makes the backward one stack."""
        gates: torch.Tensor = self(instance)
        return gates.unbind(0)


def _uniform_fan_in(weight: nn.Parameter) -> None:
    bound = 1.0 / math.sqrt(weight.shape[1])
    nn.init.uniform_(weight, -bound, bound)
