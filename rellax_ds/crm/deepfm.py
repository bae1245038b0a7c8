"""DeepFM: a factorisation machine and a tower over the same embeddings (Guo et al. 2017).

The logit is the sum of first-order weights, of the inner products of all pairs of fields, and of
the tower's logit. The mean behaviour is one more field; its first-order weight is the mean of those
of its items and ratings, as for any field with many values. The instance embedding `final` is the
tower's, the deep half.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from rellax_ds.crm.network import Reading, Recommender

if TYPE_CHECKING:
    from rellax_ds.crm.features import FeatureBatch
    from rellax_ds.crm.network import Architecture, View


class DeepFM(Recommender):
    """Factorisation machine beside a tower, over the fields and the mean behaviour."""

    def __init__(self, architecture: Architecture) -> None:
        """Build the network; first-order weights start at zero, where an unseen value's stay."""
        super().__init__(architecture)
        a = architecture
        self.first_order = nn.Embedding(a.num_features, 1, padding_idx=0)
        nn.init.zeros_(self.first_order.weight)
        self.add_tower((a.num_fields + 1) * a.embedding_dim)

    def read(self, view: View) -> Reading:
        """Both halves."""
        mean_BE = view.mean()
        fields_BFE = torch.cat([view.fields, mean_BE.unsqueeze(1)], dim=1)
        # Sum of v_i . v_j over pairs: half of what the square of the sum has beyond the squares.
        pairs_B = 0.5 * (fields_BFE.sum(1).square() - fields_BFE.square().sum(1)).sum(1)
        logit_B = self._first_order(view.batch, view.mask) + pairs_B
        return Reading(mean_BE, fields_BFE.flatten(1), logit=logit_B)

    def _first_order(self, batch: FeatureBatch, mask_BK: torch.Tensor) -> torch.Tensor:
        fields_B: torch.Tensor = self.first_order(batch.fields).sum((1, 2))
        behaviours_BK = (self.first_order(batch.items) + self.first_order(batch.ratings)).squeeze(2)
        history_B: torch.Tensor = (behaviours_BK * mask_BK).sum(1) / mask_BK.sum(1).clamp_min(1)
        return fields_B + history_B
