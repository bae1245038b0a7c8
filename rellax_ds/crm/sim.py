"""SIM with a search of its own: find the behaviours that concern the target, then attend to them.

Pi et al. 2020. The general search unit picks `crm.search_length` of a long history: by the hard
search the latest that share the target's category, by the soft search those with the largest inner
product of projected behaviour and projected target, learned by a click loss of its own over the
whole history. The exact search unit is multi-head attention of the target over the picked
behaviours, each with an embedding of its age. The short-term half of the paper's model, a DIEN over
the latest behaviours, is DIN's attention over the latest `crm.search_length` here.

The kind `sim` is the other reading of the name: DIN on the histories that SUBR retrieved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from rellax_ds.crm.din import Attention
from rellax_ds.crm.features import NUM_GAPS
from rellax_ds.crm.network import EMBEDDING_STD, Reading, Recommender, masked_softmax
from rellax_ds.crm.sequence import places_from_last
from rellax_ds.errors import TableError

if TYPE_CHECKING:
    from rellax_ds.crm.network import Architecture, View


class SoftSearch(nn.Module):
    """Relevance of behaviours by an inner product, and the click model that teaches it."""

    def __init__(self, architecture: Architecture) -> None:
        """Build the two projections and the click model's layers."""
        super().__init__()
        a = architecture
        self.of_behaviour = nn.Linear(a.embedding_dim, a.embedding_dim, bias=False)
        self.of_target = nn.Linear(a.embedding_dim, a.embedding_dim, bias=False)
        self.hidden = nn.Linear((a.num_fields + 1) * a.embedding_dim, a.hidden_dim)
        self.logit = nn.Linear(a.hidden_dim, 1)

    def forward(self, view: View) -> tuple[torch.Tensor, torch.Tensor]:
        """Relevance [B, K] and the click model's logit [B]."""
        target_BE1 = self.of_target(view.target).unsqueeze(2)
        relevance_BK = torch.bmm(self.of_behaviour(view.behaviours), target_BE1).squeeze(2)
        pooled_BE = view.pool(relevance_BK * view.mask)
        inputs = torch.cat([view.fields.flatten(1), pooled_BE], dim=1)
        logit: torch.Tensor = self.logit(F.relu(self.hidden(inputs))).squeeze(1)
        return relevance_BK, logit


class ExactSearch(nn.Module):
    """Multi-head attention of the target over behaviours that know their age."""

    def __init__(self, dim: int, num_heads: int) -> None:
        """Build heads of width `dim / num_heads` and the layer that joins them."""
        super().__init__()
        self.num_heads = num_heads
        self.gaps = nn.Embedding(NUM_GAPS, dim)
        nn.init.normal_(self.gaps.weight, std=EMBEDDING_STD)
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(2 * dim, dim, bias=False)
        self.value = nn.Linear(2 * dim, dim, bias=False)
        self.join = nn.Linear(dim, dim, bias=False)

    def forward(
        self,
        target_BE: torch.Tensor,
        behaviours_BSE: torch.Tensor,
        gaps_BS: torch.Tensor,
        mask_BS: torch.Tensor,
    ) -> torch.Tensor:
        """The picked behaviours in one vector [B, E], zero where none was picked."""
        aged = torch.cat([behaviours_BSE, self.gaps(gaps_BS)], dim=2)
        heads = (self.num_heads, -1)
        query_BHDx1 = self.query(target_BE).unflatten(1, heads).unsqueeze(3)
        key_BHSD = self.key(aged).unflatten(2, heads).transpose(1, 2)
        value_BHSD = self.value(aged).unflatten(2, heads).transpose(1, 2)
        scores_BHS = (key_BHSD @ query_BHDx1).squeeze(3) * key_BHSD.shape[3] ** -0.5
        weights_BHS = masked_softmax(scores_BHS, mask_BS.unsqueeze(1))
        mixed_BHD = (weights_BHS.unsqueeze(2) @ value_BHSD).squeeze(2)
        joined: torch.Tensor = self.join(mixed_BHD.flatten(1))
        return joined


class SIM(Recommender):
    """Search-based Interest Model with both of its stages."""

    def __init__(self, architecture: Architecture) -> None:
        """Build the searches, DIN's attention for the latest behaviours, and the tower."""
        super().__init__(architecture)
        a = architecture
        self.soft_search = SoftSearch(a) if a.search == "soft" else None
        self.exact_search = ExactSearch(a.embedding_dim, a.num_heads)
        self.attention = Attention(a.embedding_dim, a.hidden_dim, a.num_attention_layers)
        self.add_tower((a.num_fields + 2) * a.embedding_dim)

    def read(self, view: View) -> Reading:
        """Search, attend to what was found, and set it beside the fields and the latest."""
        a = self.architecture
        if view.batch.gaps is None:
            raise TableError("crm.kind sim_full: the events have no times; rerun `rellax tables`")
        # A choice of places has no gradient: the soft search learns by its own logit alone.
        if self.soft_search is not None:
            relevance_BK, search_logit = self.soft_search(view)
            found_BK = view.mask > 0
        else:
            relevance_BK, search_logit = -places_from_last(view.mask).float(), None
            found_BK = self._same_category(view)
        relevance_BK = relevance_BK.masked_fill(~found_BK, -torch.inf)
        size = min(a.search_length, relevance_BK.shape[1])
        picked_BS = relevance_BK.topk(size, dim=1).indices
        long_BE = self.exact_search(
            view.target,
            _at(view.behaviours, picked_BS),
            view.batch.gaps.gather(1, picked_BS),
            found_BK.gather(1, picked_BS).to(view.mask.dtype),
        )
        latest_BS = (places_from_last(view.mask)[:, :1] - torch.arange(size)).clamp_min(0)
        behaviours_BSE = _at(view.behaviours, latest_BS)
        mask_BS = view.mask.sum(1, keepdim=True) > torch.arange(size)
        weights_BS = self.attention(view.target, behaviours_BSE) * mask_BS
        short_BE = torch.bmm(weights_BS.unsqueeze(1), behaviours_BSE).squeeze(1)
        return Reading(
            long_BE,
            torch.cat([view.fields.flatten(1), long_BE, short_BE], dim=1),
            search_logit=search_logit if self.training else None,
        )

    def _same_category(self, view: View) -> torch.Tensor:
        """Where a behaviour's category is known and the target's, bool [B, K]."""
        field, categories_BK = self.architecture.category_field, view.batch.categories
        if field is None or categories_BK is None:
            raise TableError(
                "crm.kind sim_full: the hard search reads categories, which the vocabulary does "
                "not name; rerun `rellax crm`"
            )
        wanted_B1 = view.batch.fields[:, field].unsqueeze(1)
        return (categories_BK == wanted_B1) & (wanted_B1 > 0) & view.batch.mask


def _at(behaviours_BKE: torch.Tensor, places_BS: torch.Tensor) -> torch.Tensor:
    """Behaviours at these places, [B, S, E]."""
    return behaviours_BKE[torch.arange(len(places_BS)).unsqueeze(1), places_BS]
