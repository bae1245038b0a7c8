from __future__ import annotations

from typing import Literal

import pytest
import torch

from rellax_ds.crm.din import DIN, Architecture, Attention
from rellax_ds.crm.features import FeatureBatch

NUM_ITEMS, NUM_FEATURES = 20, 40


def make_model(instance: Literal["final", "hidden", "user"] = "final", layers: int = 2) -> DIN:
    torch.manual_seed(0)
    architecture = Architecture(
        num_features=NUM_FEATURES,
        num_items=NUM_ITEMS,
        num_fields=4,
        item_field=2,
        embedding_dim=6,
        hidden_dim=10,
        num_hidden_layers=2,
        num_attention_layers=layers,
        dropout=0.5,
        instance=instance,
    )
    model = DIN(architecture).eval()
    with torch.no_grad():
        model.table.weight[1:].normal_()  # as large as trained rows, so that a leak shows
    return model


def make_batch(size: int = 5, length: int = 7) -> FeatureBatch:
    torch.manual_seed(1)
    counts = torch.randint(0, length + 1, (size, 1))
    mask = torch.arange(length) < counts
    fields = torch.randint(NUM_ITEMS + 1, NUM_FEATURES, (size, 4))
    fields[:, 2] = torch.randint(0, NUM_ITEMS + 1, (size,))
    items = torch.randint(0, NUM_ITEMS + 1, (size, length)) * mask
    ratings = torch.randint(NUM_FEATURES - 5, NUM_FEATURES, (size, length)) * mask
    return FeatureBatch(fields, items, ratings, mask)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_attention_factored_equals_plain_loop(num_layers: int) -> None:
    torch.manual_seed(2)
    attention = Attention(6, 10, num_layers).double()
    target, behaviours = torch.randn(3, 6).double(), torch.randn(3, 4, 6).double()
    expected = torch.empty(3, 4, dtype=torch.float64)
    for row in range(3):
        for k in range(4):
            t, b = target[row], behaviours[row, k]
            x = torch.cat([t, b, t - b, t * b])
            for layer in (attention.first, *attention.further):
                x = torch.relu(layer.weight @ x + layer.bias)
            expected[row, k] = attention.output.weight[0] @ x + attention.output.bias[0]
    torch.testing.assert_close(attention(target, behaviours), expected, rtol=0, atol=1e-12)


def test_din_forward_equals_plain_loop() -> None:
    model, batch = make_model().double(), make_batch()
    table = model.table.weight
    for row in range(5):
        target = table[batch.fields[row, 2]]
        pooled = torch.zeros(6, dtype=torch.float64)
        for k in range(int(batch.mask[row].sum())):
            pair = torch.cat([table[batch.items[row, k]], table[batch.ratings[row, k]]])
            behaviour = torch.relu(model.behaviour(pair))
            pooled += model.attention(target[None], behaviour[None, None])[0, 0] * behaviour
        hidden = torch.cat([*table[batch.fields[row]], pooled])
        for layer in model.hidden:
            hidden = torch.relu(layer(hidden))
        score = model(batch)
        torch.testing.assert_close(score.instance[row], hidden, rtol=0, atol=1e-12)
        torch.testing.assert_close(score.logit[row], model.logit(hidden)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("instance", ["final", "user"])
def test_din_padding_altered_or_longer_scores_unchanged(
    instance: Literal["final", "user"],
) -> None:
    model, batch = make_model(instance), make_batch()
    noise = torch.randint(1, NUM_ITEMS, batch.items.shape)
    altered = batch._replace(
        items=torch.where(batch.mask, batch.items, noise),
        ratings=torch.where(batch.mask, batch.ratings, noise),
    )
    extended = FeatureBatch(batch.fields, *(torch.cat([x, x * 0], dim=1) for x in batch[1:]))
    for other in (altered, extended):
        for a, b in zip(model(batch), model(other), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("instance", ["final", "hidden", "user"])
def test_din_instance_has_promised_width_and_only_user_ignores_the_target(
    instance: Literal["final", "hidden", "user"],
) -> None:
    model, batch = make_model(instance), make_batch()
    h = model(batch).instance
    fields = batch.fields.clone()
    fields[:, 2:] = fields[:, 2:].roll(1, 0)
    moved = model(batch._replace(fields=fields)).instance
    assert h.shape == (5, model.architecture.instance_dim)
    assert torch.equal(h, moved) == (instance == "user")
