"""Recommenders with random weights, and batches of random ids for them."""

from __future__ import annotations

from typing import Any

import torch

from rellax_ds.crm.features import FeatureBatch
from rellax_ds.crm.kinds import build
from rellax_ds.crm.network import Architecture, Recommender

NUM_ITEMS, NUM_FEATURES = 20, 40
NUM_CATEGORIES = 3
_FIRST_CATEGORY = NUM_ITEMS + 1


def random_recommender(**changes: Any) -> Recommender:
    """A recommender in eval mode: four fields, the target the third, its category the fourth."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "num_features": NUM_FEATURES,
        "num_items": NUM_ITEMS,
        "num_fields": 4,
        "item_field": 2,
        "embedding_dim": 6,
        "hidden_dim": 10,
        "num_hidden_layers": 2,
        "num_attention_layers": 2,
        "dropout": 0.5,
        "instance": "final",
        "history_length": 7,
        "search_length": 3,
        "category_field": 3,
    }
    model = build(Architecture(**{**sizes, **changes})).eval()
    with torch.no_grad():
        model.table.weight[1:].normal_()  # as large as trained rows, so that a leak shows
    return model


def random_batch(size: int = 5, length: int = 7) -> FeatureBatch:
    """Histories of 0 to `length` behaviours; the first is empty, the second full."""
    torch.manual_seed(1)
    counts = torch.randint(0, length + 1, (size, 1))
    counts[0], counts[1] = 0, length
    mask = torch.arange(length) < counts
    categories = torch.arange(_FIRST_CATEGORY, _FIRST_CATEGORY + NUM_CATEGORIES)
    fields = torch.randint(_FIRST_CATEGORY + NUM_CATEGORIES, NUM_FEATURES, (size, 4))
    fields[:, 2] = torch.randint(0, NUM_ITEMS + 1, (size,))
    fields[:, 3] = categories[torch.randint(0, NUM_CATEGORIES, (size,))]
    return FeatureBatch(
        fields,
        items=torch.randint(0, NUM_ITEMS + 1, (size, length)) * mask,
        ratings=torch.randint(NUM_FEATURES - 5, NUM_FEATURES, (size, length)) * mask,
        mask=mask,
        gaps=torch.randint(1, 30, (size, length)) * mask,
        categories=categories[torch.randint(0, NUM_CATEGORIES, (size, length))] * mask,
    )
