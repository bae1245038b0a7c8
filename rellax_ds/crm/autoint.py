"""AutoInt: self-attention between fields (Song et al. 2019).

In every layer each field takes from every field by multi-head attention on plain inner products,
adds a projection of its own and is rectified (the paper's interacting layer). The mean behaviour is
one more field. The paper reads the logit off the last layer; here the tower stands between, so that
the instance embedding `final` has seen the interactions and is as wide as in every kind.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from rellax_ds.crm.network import Reading, Recommender

if TYPE_CHECKING:
    from rellax_ds.crm.network import Architecture, View


class Interaction(nn.Module):
    """One interacting layer over M fields."""

    def __init__(self, dim: int, num_heads: int) -> None:
        """Build a layer of width `dim`, which `num_heads` divides."""
        super().__init__()
        self.num_heads = num_heads
        self.project = nn.Linear(dim, 3 * dim, bias=False)
        self.own = nn.Linear(dim, dim, bias=False)

    def forward(self, fields_BME: torch.Tensor) -> torch.Tensor:
        """[B, M, E] to [B, M, E]."""
        batch, number, dim = fields_BME.shape
        parts = self.project(fields_BME).view(batch, number, 3, self.num_heads, -1)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        return F.relu(mixed.transpose(1, 2).reshape(batch, number, dim) + self.own(fields_BME))


class AutoInt(Recommender):
    """Interacting layers under a tower, over the fields and the mean behaviour."""

    def __init__(self, architecture: Architecture) -> None:
        """Build `num_blocks` interacting layers."""
        super().__init__(architecture)
        a = architecture
        self.interactions = nn.ModuleList(
            Interaction(a.embedding_dim, a.num_heads) for _ in range(a.num_blocks)
        )
        self.add_tower((a.num_fields + 1) * a.embedding_dim)

    def read(self, view: View) -> Reading:
        """Let the fields meet, some times over."""
        mean_BE = view.mean()
        fields_BME = torch.cat([view.fields, mean_BE.unsqueeze(1)], dim=1)
        for interaction in self.interactions:
            fields_BME = interaction(fields_BME)
        return Reading(mean_BE, fields_BME.flatten(1))
