"""SASRec: causal self-attention over the history (Kang and McAuley 2018).

Blocks as in the paper's section 3: attention, then a two-layer network at every place, each as
x + dropout(g(LayerNorm(x))). Heads are concatenated without a further product, as in the authors'
code. Place embeddings count back from the last behaviour. How the state becomes a click model
stands in `sequence`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from rellax_ds.crm.network import EMBEDDING_STD
from rellax_ds.crm.sequence import SequenceRecommender, last_state, places_from_last

if TYPE_CHECKING:
    from rellax_ds.crm.network import Architecture, View


class Block(nn.Module):
    """One block: what a place takes from itself and earlier places, then what it makes of it."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        """Build a block of width `dim`, which `num_heads` divides."""
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.before_attention = nn.LayerNorm(dim)
        # No bias: one on the keys shifts all scores of a place alike and softmax drops it.
        self.project = nn.Linear(dim, 3 * dim, bias=False)
        self.before_network = nn.LayerNorm(dim)
        self.first = nn.Linear(dim, dim)
        self.second = nn.Linear(dim, dim)

    def forward(self, x_BKE: torch.Tensor) -> torch.Tensor:
        """[B, K, E] to [B, K, E]; place k depends on places up to k."""
        batch, length, dim = x_BKE.shape
        parts = self.project(self.before_attention(x_BKE))
        q, k, v = parts.view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        # Padding lies right of every behaviour, so the causal mask hides it too.
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        mixed = mixed.transpose(1, 2).reshape(batch, length, dim)
        x_BKE = x_BKE + F.dropout(mixed, self.dropout, self.training)
        made = self.second(F.relu(self.first(self.before_network(x_BKE))))
        return x_BKE + F.dropout(made, self.dropout, self.training)


class SASRec(SequenceRecommender):
    """Self-attentive sequence model, scored against the target."""

    def __init__(self, architecture: Architecture) -> None:
        """Build `num_blocks` blocks and an embedding for each place."""
        super().__init__(architecture)
        a = architecture
        self.places = nn.Embedding(a.history_length, a.embedding_dim)
        nn.init.normal_(self.places.weight, std=EMBEDDING_STD)
        self.blocks = nn.ModuleList(
            Block(a.embedding_dim, a.num_heads, a.dropout) for _ in range(a.num_blocks)
        )
        self.after = nn.LayerNorm(a.embedding_dim)
        self.add_tower(self.width)

    def state(self, view: View) -> torch.Tensor:
        """The last behaviour's place after all blocks."""
        a = self.architecture
        places_BK = places_from_last(view.mask).clamp(0, a.history_length - 1)
        x_BKE = view.behaviours + self.places(places_BK)
        x_BKE = F.dropout(x_BKE, a.dropout, self.training)
        for block in self.blocks:
            x_BKE = block(x_BKE)
        return last_state(self.after(x_BKE), view.mask)
