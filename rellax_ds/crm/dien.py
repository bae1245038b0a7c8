"""DIEN: interests drawn from the behaviours by one recurrence, followed to the target by another.

Zhou et al. 2019. The states of the first GRU are the interests; its auxiliary loss asks each state
to tell the behaviour that followed from one that did not. The second, AUGRU, scales its update gate
by each interest's attention to the target, so an interest that has little to do with the target
leaves the state almost as it was; padding, with attention 0, leaves it exactly.

A behaviour that did not follow is the item of another behaviour of the batch under the rating that
was really given: drawn from the catalogue it could be an item without training, whose row must stay
zero, and under another rating the rating would give it away.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from rellax_ds.crm.network import Reading, Recommender, masked_softmax

if TYPE_CHECKING:
    from rellax_ds.crm.network import Architecture, View


class AttentionalGRU(nn.Module):
    """AUGRU: a GRU whose update gate is scaled by a weight from outside."""

    def __init__(self, dim: int) -> None:
        """Build a cell of width `dim`."""
        super().__init__()
        self.from_input = nn.Linear(dim, 3 * dim)
        self.from_state = nn.Linear(dim, 3 * dim)

    def forward(self, inputs_BKE: torch.Tensor, weights_BK: torch.Tensor) -> torch.Tensor:
        """State [B, E] after the last input; an input of weight 0 changes nothing."""
        gates_BKG = self.from_input(inputs_BKE)
        state_BE = torch.zeros_like(inputs_BKE[:, 0])
        for gates, weight in zip(gates_BKG.unbind(1), weights_BK.unbind(1), strict=True):
            reset_in, update_in, new_in = gates.chunk(3, dim=1)
            reset_of, update_of, new_of = self.from_state(state_BE).chunk(3, dim=1)
            new = torch.tanh(new_in + torch.sigmoid(reset_in + reset_of) * new_of)
            update = weight.unsqueeze(1) * torch.sigmoid(update_in + update_of)
            state_BE = torch.lerp(state_BE, new, update)
        return state_BE


class DIEN(Recommender):
    """Deep Interest Evolution Network over ids."""

    def __init__(self, architecture: Architecture) -> None:
        """Build both recurrences and the attention between them."""
        super().__init__(architecture)
        a = architecture
        self.extraction = nn.GRU(a.embedding_dim, a.embedding_dim, batch_first=True)
        self.attention = nn.Linear(a.embedding_dim, a.embedding_dim, bias=False)
        self.evolution = AttentionalGRU(a.embedding_dim)
        self.add_tower((a.num_fields + 1) * a.embedding_dim)

    def read(self, view: View) -> Reading:
        """The evolved interest beside the fields."""
        interests_BKE, _ = self.extraction(view.behaviours)
        scores_BK = torch.bmm(interests_BKE, self.attention(view.target).unsqueeze(2)).squeeze(2)
        state_BE = self.evolution(interests_BKE, masked_softmax(scores_BK, view.mask))
        return Reading(
            state_BE,
            torch.cat([view.fields.flatten(1), state_BE], dim=1),
            auxiliary=self._auxiliary(view, interests_BKE) if self.training else None,
        )

    def _auxiliary(self, view: View, interests_BKE: torch.Tensor) -> torch.Tensor | None:
        """Mean over places of -log s(i . next) - log(1 - s(i . other)), s the sigmoid."""
        items = view.batch.items[view.batch.mask]
        if not len(items):
            return None
        following = view.batch.items[:, 1:]
        other = items[torch.randint(len(items), following.shape)]
        told = view.mask[:, 1:] * (other != following)
        interests = interests_BKE[:, :-1]
        likely = (interests * view.behaviours[:, 1:]).sum(2)
        unlikely = (interests * self.behave(other, view.batch.ratings[:, 1:])).sum(2)
        losses = F.softplus(-likely) + F.softplus(unlikely)
        return (losses * told).sum() / told.sum().clamp_min(1)
