"""What every recommender is built from: embeddings, behaviours, the tower and the choice of h.

The kinds differ in how they read a history and let fields meet; all else stands here once. One
embedding table serves all features, and a behaviour is its item and rating together, so that a
user's mean behaviour means the same in every kind. A kind turns a `View` into a `Reading`; the
tower turns that into a logit, and an activation on the way is the instance embedding h.

Shapes: B samples, F fields, K behaviours, E embedding width, H hidden width, W tower's input width.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from rellax_ds.config import CRMConfig, CRMKind
    from rellax_ds.crm.features import FeatureBatch, Vocabulary

EMBEDDING_STD = 0.01
"""Small, so that a rarely seen item starts, and stays, close to the unseen item's zero row."""

_EXCLUDED = -1e9
"""Score of a padded place: its weight is exactly 0 beside any other, and never NaN when alone."""


@dataclass(frozen=True)
class Architecture:
    """Everything that fixes the network's parameters and what it computes.

    The fields from `kind` on have defaults because DIN was once the only kind, and its saved models
    lack them.

    Attributes:
        num_features: Rows of the embedding table; row 0 is padding and stays zero.
        num_items: Rows 1 to `num_items` are the items.
        num_fields: F.
        item_field: Position of the target item in the fields; the user's fields come before it.
        embedding_dim: E.
        hidden_dim: H, and the hidden width of DIN's attention.
        num_hidden_layers: Layers between the tower's input and the logit.
        num_attention_layers: Hidden layers of DIN's attention.
        dropout: Probability, in the hidden layers and during training only.
        instance: Which activation is h.
        kind: Which network, one of `kinds.KINDS`.
        history_length: K at most.
        num_heads: Heads of attention.
        num_blocks: How often a repeated layer is repeated.
        search: How SIM's first stage finds behaviours.
        search_length: Behaviours that SIM's first stage leaves.
        category_field: Position of the target's category in the fields, for the hard search.
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
    kind: CRMKind = "din"
    history_length: int = 30
    num_heads: int = 2
    num_blocks: int = 2
    search: Literal["hard", "soft"] = "hard"
    search_length: int = 10
    category_field: int | None = None

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
            kind=config.kind,
            history_length=config.history_length,
            num_heads=config.num_heads,
            num_blocks=config.num_blocks,
            search=config.search,
            search_length=config.search_length,
            category_field=vocabulary.category_field,
        )

    @property
    def instance_dim(self) -> int:
        """Width of h."""
        if self.instance == "final":
            return self.hidden_dim
        fields = self.num_fields if self.instance == "hidden" else self.item_field
        return (fields + 1) * self.embedding_dim


class Score(NamedTuple):
    """What a recommender says about B samples; the last two only in training, and of some kinds.

    Attributes:
        logit: float32 [B], log-odds of a like.
        instance: float32 [B, width of h].
        auxiliary: float32 scalar, a loss on the history alone.
        search_logit: float32 [B], log-odds of a like by a first stage with a loss of its own.
    """

    logit: torch.Tensor
    instance: torch.Tensor
    auxiliary: torch.Tensor | None = None
    search_logit: torch.Tensor | None = None


class View(NamedTuple):
    """A batch as vectors.

    Attributes:
        batch: The ids.
        fields: float32 [B, F, E].
        target: float32 [B, E], the target item.
        behaviours: float32 [B, K, E], of which padded ones are not zero.
        mask: float32 [B, K], 1 for a behaviour, 0 for padding.
    """

    batch: FeatureBatch
    fields: torch.Tensor
    target: torch.Tensor
    behaviours: torch.Tensor
    mask: torch.Tensor

    def pool(self, weights_BK: torch.Tensor) -> torch.Tensor:
        """Weighted sum of behaviours, [B, E]; the weights of padding must be 0."""
        return torch.bmm(weights_BK.unsqueeze(1), self.behaviours).squeeze(1)

    def mean(self) -> torch.Tensor:
        """Mean behaviour [B, E], zero where there is none."""
        return self.pool(self.mask) / self.mask.sum(1, keepdim=True).clamp_min(1)


class Reading(NamedTuple):
    """What a kind makes of a view.

    Attributes:
        pooled: float32 [B, E], the history in one vector.
        inputs: float32 [B, W] of the tower.
        logit: float32 [B], added to the tower's logit.
        auxiliary: See `Score`.
        search_logit: See `Score`.
    """

    pooled: torch.Tensor
    inputs: torch.Tensor
    logit: torch.Tensor | None = None
    auxiliary: torch.Tensor | None = None
    search_logit: torch.Tensor | None = None


class Recommender(nn.Module):
    """Base of every kind, which adds its own layers, then the tower, and defines `read`.

    Layers are created in that order because initial weights are drawn in the order of creation.
    """

    def __init__(self, architecture: Architecture) -> None:
        """Build the embedding table and the layer that makes an item and its rating one vector."""
        super().__init__()
        self.architecture = a = architecture
        self.table = nn.Embedding(a.num_features, a.embedding_dim, padding_idx=0)
        self.behaviour = nn.Linear(2 * a.embedding_dim, a.embedding_dim)

    def add_tower(self, width: int) -> None:
        """Add the layers from `width` to the logit; small embeddings, row 0 zero and fixed."""
        a = self.architecture
        widths = [width, *[a.hidden_dim] * a.num_hidden_layers]
        self.hidden = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(widths))
        self.logit = nn.Linear(a.hidden_dim, 1)
        with torch.no_grad():
            self.table.weight.normal_(std=EMBEDDING_STD)[0].zero_()

    def read(self, view: View) -> Reading:
        """Read the history and let the fields meet; each kind has its own."""
        raise NotImplementedError

    def behave(self, items: torch.Tensor, ratings: torch.Tensor) -> torch.Tensor:
        """Vectors of behaviours [B, K, E] from ids of items and ratings, [B, K]."""
        pairs = torch.cat([self.table(items), self.table(ratings)], dim=2)
        return F.relu(self.behaviour(pairs))

    def forward(self, batch: FeatureBatch) -> Score:
        """Score B samples; a padded behaviour has no influence, whatever its ids."""
        a = self.architecture
        fields_BFE = self.table(batch.fields)
        view = View(
            batch,
            fields_BFE,
            fields_BFE[:, a.item_field],
            self.behave(batch.items, batch.ratings),
            batch.mask.to(fields_BFE.dtype),
        )
        reading = self.read(view)
        hidden = reading.inputs
        for layer in self.hidden:
            hidden = F.dropout(F.relu(layer(hidden)), a.dropout, self.training)
        logit = self.logit(hidden).squeeze(1)
        if reading.logit is not None:
            logit = logit + reading.logit
        if a.instance == "final":
            instance = hidden
        elif a.instance == "hidden":
            instance = torch.cat([fields_BFE.flatten(1), reading.pooled], dim=1)
        else:
            instance = torch.cat([fields_BFE[:, : a.item_field].flatten(1), view.mean()], dim=1)
        return Score(logit, instance, reading.auxiliary, reading.search_logit)

    def item_table(self) -> torch.Tensor:
        """Item embeddings [num_items + 1, E]; row 0 is zero, item i is row i + 1."""
        return self.table.weight.detach()[: self.architecture.num_items + 1]


def masked_softmax(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Softmax over the last dimension where `mask` is 1; all zero where it is 1 nowhere."""
    return torch.softmax(scores.masked_fill(mask == 0, _EXCLUDED), dim=-1) * mask


def training_loss(score: Score, labels: torch.Tensor, auxiliary_weight: float) -> torch.Tensor:
    """Binary cross entropy, with the losses a kind has of its own at `auxiliary_weight`.

    Args:
        score: What the recommender said, in training mode.
        labels: float32 [B], 1 for a like.
        auxiliary_weight: Weight of the kind's own losses beside the click's.
    """
    loss = F.binary_cross_entropy_with_logits(score.logit, labels)
    if score.search_logit is not None:
        search = F.binary_cross_entropy_with_logits(score.search_logit, labels)
        loss = loss + auxiliary_weight * search
    if score.auxiliary is not None:
        loss = loss + auxiliary_weight * score.auxiliary
    return loss
