"""DIN: a click model that weighs a user's behaviours by their relation to the target item.

Zhou et al. 2018, in the form ReLLaX trains: attention weights are masked but not softmaxed (their
sum may say how much of the history matters), and the last hidden activation is the instance
embedding h. The kind `sim` is the same network fed with retrieved behaviours.

Shapes: B samples, F fields, K behaviours, E embedding width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from rellax_ds.crm.network import Reading, Recommender

if TYPE_CHECKING:
    from rellax_ds.crm.network import Architecture, View


class Attention(nn.Module):
    """Unnormalised weight of each behaviour: an MLP on [t, b, t - b, t * b] (DIN, section 4.3)."""

    def __init__(self, embedding_dim: int, width: int, num_layers: int) -> None:
        """Build `num_layers` hidden ReLU layers of `width` and a scalar output."""
        super().__init__()
        self.first = nn.Linear(4 * embedding_dim, width)
        self.further = nn.ModuleList(nn.Linear(width, width) for _ in range(num_layers - 1))
        self.output = nn.Linear(width, 1)

    def forward(self, target_BE: torch.Tensor, behaviours_BKE: torch.Tensor) -> torch.Tensor:
        """Weights [B, K], before masking.

        The first layer is linear in its four parts, so W [t, b, t - b, t * b] is computed as
        (W1 + W3) t + [W2 - W3, W4] [b, t * b]: the same number with half the products, and the
        target's part once per sample.
        """
        w1, w2, w3, w4 = self.first.weight.chunk(4, dim=1)
        pairs = torch.cat([behaviours_BKE, target_BE.unsqueeze(1) * behaviours_BKE], dim=2)
        per_sample = F.linear(target_BE, w1 + w3, self.first.bias)
        hidden = F.relu(F.linear(pairs, torch.cat([w2 - w3, w4], dim=1)) + per_sample.unsqueeze(1))
        for layer in self.further:
            hidden = F.relu(layer(hidden))
        weights: torch.Tensor = self.output(hidden).squeeze(2)
        return weights


class DIN(Recommender):
    """Deep Interest Network over ids."""

    def __init__(self, architecture: Architecture) -> None:
        """Build the network."""
        super().__init__(architecture)
        a = architecture
        self.attention = Attention(a.embedding_dim, a.hidden_dim, a.num_attention_layers)
        self.add_tower((a.num_fields + 1) * a.embedding_dim)

    def read(self, view: View) -> Reading:
        """Sum the behaviours by their weights; fields and sum lie side by side."""
        pooled_BE = view.pool(self.attention(view.target, view.behaviours) * view.mask)
        return Reading(pooled_BE, torch.cat([view.fields.flatten(1), pooled_BE], dim=1))
