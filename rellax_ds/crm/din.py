"""DIN: a click model that weighs a user's behaviours by their relation to the target item.

Zhou et al. 2018, in the form ReLLaX trains: one embedding table for all features, a behaviour is
its item and rating together, attention weights are masked but not softmaxed (their sum may say how
much of the history matters), and the last hidden activation is the instance embedding h. SIM is the
same network fed with retrieved behaviours.

Shapes: B samples, F fields, K behaviours, E embedding width, A attention width, H hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from rellax_ds.config import CRMConfig
    from rellax_ds.crm.features import FeatureBatch, Vocabulary

_EMBEDDING_STD = 0.01
"""Small, so that a rarely seen item starts, and stays, close to the unseen item's zero row."""


@dataclass(frozen=True)
class Architecture:
    """Everything that fixes the network's parameters.

    Attributes:
        num_features: Rows of the embedding table; row 0 is padding and stays zero.
        num_items: Rows 1 to `num_items` are the items.
        num_fields: F.
        item_field: Position of the target item in the fields; the user's fields come before it.
        embedding_dim: E.
        hidden_dim: H, and A.
        num_hidden_layers: Layers between the concatenated input and the logit.
        num_attention_layers: Hidden layers of the attention.
        dropout: Probability, in the hidden layers and during training only.
        instance: Which activation is h.
    """

    num_features: int
    num_items: int
    num_fields: int
    item_field: int
    embedding_dim: int
    hidden_dim: int
    num_hidden_layers: int
    num_attention_layers: int
    dropout: float
    instance: Literal["final", "hidden", "user"]

    @classmethod
    def of(cls, config: CRMConfig, vocabulary: Vocabulary) -> Architecture:
        """The network a recipe asks for over a vocabulary."""
        return cls(
            num_features=vocabulary.num_features,
            num_items=vocabulary.num_items,
            num_fields=vocabulary.num_fields,
            item_field=vocabulary.item_field,
            embedding_dim=config.embedding_dim,
            hidden_dim=config.hidden_dim,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_layers=config.num_attention_layers,
            dropout=config.dropout,
            instance=config.instance_embedding,
        )

    @property
    def instance_dim(self) -> int:
        """Width of h."""
        if self.instance == "final":
            return self.hidden_dim
        fields = self.num_fields if self.instance == "hidden" else self.item_field
        return (fields + 1) * self.embedding_dim


class Score(NamedTuple):
    """What DIN says about B samples.

    Attributes:
        logit: float32 [B], log-odds of a like.
        instance: float32 [B, width of h].
    """

    logit: torch.Tensor
    instance: torch.Tensor


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


class DIN(nn.Module):
    """Deep Interest Network over ids."""

    def __init__(self, architecture: Architecture) -> None:
        """Build the network with small random embeddings; row 0 of the table is zero and fixed."""
        super().__init__()
        self.architecture = a = architecture
        self.table = nn.Embedding(a.num_features, a.embedding_dim, padding_idx=0)
        self.behaviour = nn.Linear(2 * a.embedding_dim, a.embedding_dim)
        self.attention = Attention(a.embedding_dim, a.hidden_dim, a.num_attention_layers)
        widths = [(a.num_fields + 1) * a.embedding_dim, *[a.hidden_dim] * a.num_hidden_layers]
        self.hidden = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(widths))
        self.logit = nn.Linear(a.hidden_dim, 1)
        with torch.no_grad():
            self.table.weight.normal_(std=_EMBEDDING_STD)[0].zero_()

    def forward(self, batch: FeatureBatch) -> Score:
        """Score B samples; a padded behaviour has no influence, whatever its ids."""
        a = self.architecture
        fields_BFE = self.table(batch.fields)
        mask_BK = batch.mask.to(fields_BFE.dtype)
        pairs = torch.cat([self.table(batch.items), self.table(batch.ratings)], dim=2)
        behaviours_BKE = F.relu(self.behaviour(pairs))
        weights_BK = self.attention(fields_BFE[:, a.item_field], behaviours_BKE) * mask_BK
        pooled_BE = torch.bmm(weights_BK.unsqueeze(1), behaviours_BKE).squeeze(1)
        inputs = torch.cat([fields_BFE.flatten(1), pooled_BE], dim=1)
        hidden = inputs
        for layer in self.hidden:
            hidden = F.dropout(F.relu(layer(hidden)), a.dropout, self.training)
        logit = self.logit(hidden).squeeze(1)
        if a.instance == "final":
            return Score(logit, hidden)
        if a.instance == "hidden":
            return Score(logit, inputs)
        count = mask_BK.sum(1, keepdim=True).clamp_min(1)
        mean_BE = torch.bmm(mask_BK.unsqueeze(1), behaviours_BKE).squeeze(1) / count
        user = fields_BFE[:, : a.item_field].flatten(1)
        return Score(logit, torch.cat([user, mean_BE], dim=1))

    def item_table(self) -> torch.Tensor:
        """Item embeddings [num_items + 1, E]; row 0 is zero, item i is row i + 1."""
        return self.table.weight.detach()[: self.architecture.num_items + 1]
