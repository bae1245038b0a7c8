from __future__ import annotations

import pytest
import torch
from crm_models import random_batch, random_recommender

from rellax_ds.crm.din import DIN, Attention


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
    model, batch = random_recommender().double(), random_batch()
    assert isinstance(model, DIN)
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
