"""DCN-V2: explicit crosses of all features, then a tower (Wang et al. 2021).

Each cross layer is x0 * (W x + b) + x with a full W, so l layers hold products of up to l + 1
features. Cross layers and tower are stacked, one of the paper's two structures: the last hidden
activation, the instance embedding `final`, then has seen the crosses. The mean behaviour is one
more field.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from rellax_ds.crm.network import Reading, Recommender

if TYPE_CHECKING:
    from rellax_ds.crm.network import Architecture, View


class DCNv2(Recommender):
    """Cross network under a tower, over the fields and the mean behaviour."""

    def __init__(self, architecture: Architecture) -> None:
        """Build `num_blocks` cross layers."""
        super().__init__(architecture)
        a = architecture
        width = (a.num_fields + 1) * a.embedding_dim
        self.crosses = nn.ModuleList(nn.Linear(width, width) for _ in range(a.num_blocks))
        self.add_tower(width)

    def read(self, view: View) -> Reading:
        """Cross everything with everything, some times over."""
        mean_BE = view.mean()
        start_BW = torch.cat([view.fields.flatten(1), mean_BE], dim=1)
        crossed_BW = start_BW
        for cross in self.crosses:
            crossed_BW = start_BW * cross(crossed_BW) + crossed_BW
        return Reading(mean_BE, crossed_BW)
