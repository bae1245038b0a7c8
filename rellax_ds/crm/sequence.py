"""Sequence models as click models: the state a sequence ends in, beside the target and the fields.

SASRec, GRU4Rec and Caser were published as next-item models: state times item embedding, one score
an item, trained on likes only. Here they answer the question of every other kind, whether this user
will like this item, from the same inputs: a behaviour is item and rating, and the tower reads all
fields, the state, and the products of state and target, whose sum is the published score. Side
fields are read because a new user has little else to go by, and because a comparison with DIN would
otherwise measure the fields and not the reading of the sequence. The state itself never sees the
target, so it can be kept by user.

Behaviours lie at the left, oldest first, and padding right of them; every model here looks back
only, so the state of the last behaviour is the same however long the padding is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from rellax_ds.crm.network import Reading, Recommender

if TYPE_CHECKING:
    from rellax_ds.crm.network import View


class SequenceRecommender(Recommender):
    """Base of the sequence models, which define `state` and call `add_tower(self.width)`."""

    @property
    def width(self) -> int:
        """Width of the tower's input: fields, state, and state times target."""
        return (self.architecture.num_fields + 2) * self.architecture.embedding_dim

    def state(self, view: View) -> torch.Tensor:
        """State of the sequence [B, E], zero where there is no behaviour."""
        raise NotImplementedError

    def read(self, view: View) -> Reading:
        """Set the state beside the fields and let it meet the target."""
        state_BE = self.state(view)
        inputs = torch.cat([view.fields.flatten(1), state_BE, state_BE * view.target], dim=1)
        return Reading(state_BE, inputs)


def places_from_last(mask_BK: torch.Tensor) -> torch.Tensor:
    """Place of each behaviour counted back from the last one, [B, K]; 0 is the last.

    Negative in the padding. Counted this way, a place says how old a behaviour is in histories of
    any length.
    """
    count = mask_BK.sum(1, keepdim=True).long()
    return count - 1 - torch.arange(mask_BK.shape[1])


def last_state(states_BKE: torch.Tensor, mask_BK: torch.Tensor) -> torch.Tensor:
    """State of the last behaviour [B, E], zero where there is none."""
    count = mask_BK.sum(1).long()
    last_BE = states_BKE[torch.arange(len(count)), (count - 1).clamp_min(0)]
    return last_BE * (count > 0).unsqueeze(1)
