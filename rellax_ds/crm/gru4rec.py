"""GRU4Rec: a recurrent network over the history (Hidasi et al. 2016).

Gated recurrent units read the behaviours oldest first; the hidden state after the last one is the
sequence's. The published losses rank sampled items of other sessions; how the state becomes a click
model instead stands in `sequence`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from rellax_ds.crm.sequence import SequenceRecommender, last_state

if TYPE_CHECKING:
    import torch

    from rellax_ds.crm.network import Architecture, View


class GRU4Rec(SequenceRecommender):
    """Recurrent sequence model, scored against the target."""

    def __init__(self, architecture: Architecture) -> None:
        """Build `num_blocks` recurrent layers as wide as the target, so that the two can meet."""
        super().__init__(architecture)
        a = architecture
        self.recurrent = nn.GRU(
            a.embedding_dim,
            a.embedding_dim,
            a.num_blocks,
            batch_first=True,
            dropout=a.dropout if a.num_blocks > 1 else 0.0,
        )
        self.add_tower(self.width)

    def state(self, view: View) -> torch.Tensor:
        """Hidden state after the last behaviour."""
        states_BKE, _ = self.recurrent(view.behaviours)
        return last_state(states_BKE, view.mask)
