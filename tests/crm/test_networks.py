"""Each kind's own computation against a plain one."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from crm_models import random_batch, random_recommender
from torch import nn

from rellax_ds.crm.autoint import AutoInt
from rellax_ds.crm.caser import Caser
from rellax_ds.crm.dcnv2 import DCNv2
from rellax_ds.crm.deepfm import DeepFM
from rellax_ds.crm.dien import AttentionalGRU
from rellax_ds.crm.features import FeatureBatch
from rellax_ds.crm.gru4rec import GRU4Rec
from rellax_ds.crm.network import Recommender, View
from rellax_ds.crm.sasrec import Block, SASRec
from rellax_ds.crm.sim import SIM
from rellax_ds.errors import TableError


def view_of(model: Recommender, batch: FeatureBatch) -> View:
    fields = model.table(batch.fields)
    behaviours = model.behave(batch.items, batch.ratings)
    return View(batch, fields, fields[:, 2], behaviours, batch.mask.to(fields.dtype))


def test_deepfm_logit_is_weights_and_all_pairs_and_tower() -> None:
    model, batch = random_recommender(kind="deepfm").double(), random_batch()
    assert isinstance(model, DeepFM)
    nn.init.normal_(model.first_order.weight)
    with torch.no_grad():
        model.first_order.weight[0] = 0
    view, score = view_of(model, batch), model(batch)
    weight = model.first_order.weight[:, 0]
    for row in range(5):
        count = int(batch.mask[row].sum())
        vectors = [*view.fields[row], view.behaviours[row, :count].sum(0) / max(count, 1)]
        pairs = sum(a @ b for a, b in combinations(vectors, 2))
        first = weight[batch.fields[row]].sum()
        for k in range(count):
            first = first + (weight[batch.items[row, k]] + weight[batch.ratings[row, k]]) / count
        tower = model.logit(score.instance[row])[0]
        torch.testing.assert_close(score.logit[row], first + pairs + tower, rtol=0, atol=1e-10)


def test_dcnv2_crosses_equal_the_published_formula() -> None:
    model, batch = random_recommender(kind="dcnv2", num_blocks=3).double(), random_batch()
    assert isinstance(model, DCNv2)
    view = view_of(model, batch)
    found = model.read(view).inputs
    for row in range(5):
        start = torch.cat([*view.fields[row], view.mean()[row]])
        x = start
        for cross in model.crosses:
            x = start * (cross.weight @ x + cross.bias) + x
        torch.testing.assert_close(found[row], x, rtol=0, atol=1e-10)


def test_autoint_layer_equals_a_loop_over_heads_and_fields() -> None:
    model, batch = random_recommender(kind="autoint", num_blocks=1).double(), random_batch(3)
    assert isinstance(model, AutoInt)
    view, layer = view_of(model, batch), model.interactions[0]
    found = model.read(view).inputs.view(3, 5, 6)
    q_all, k_all, v_all = layer.project.weight.chunk(3)
    for row in range(3):
        fields = torch.stack([*view.fields[row], view.mean()[row]])
        for m in range(5):
            heads = []
            for h in range(2):
                part = slice(3 * h, 3 * h + 3)
                weights = torch.softmax(
                    torch.stack([(q_all[part] @ fields[m]) @ (k_all[part] @ f) for f in fields]), 0
                )
                heads.append(
                    sum(w * (v_all[part] @ f) for w, f in zip(weights, fields, strict=True))
                )
            expected = torch.relu(torch.cat(heads) + layer.own.weight @ fields[m])
            torch.testing.assert_close(found[row, m], expected, rtol=0, atol=1e-10)


def test_augru_of_weights_one_is_a_gru_and_of_weight_zero_keeps_its_state() -> None:
    torch.manual_seed(0)
    ours, theirs = AttentionalGRU(4).double(), nn.GRU(4, 4, batch_first=True).double()
    x, ones = torch.randn(3, 6, 4).double(), torch.ones(3, 6).double()
    # torch's middle gate says how much to keep, AUGRU's how much to take.
    sign = torch.tensor([1.0] * 4 + [-1.0] * 4 + [1.0] * 4).double()
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(ours.from_input.weight * sign[:, None])
        theirs.bias_ih_l0.copy_(ours.from_input.bias * sign)
        theirs.weight_hh_l0.copy_(ours.from_state.weight * sign[:, None])
        theirs.bias_hh_l0.copy_(ours.from_state.bias * sign)
    torch.testing.assert_close(ours(x, ones), theirs(x)[1][0], rtol=0, atol=1e-12)
    skipped = ones.clone()
    skipped[:, 2] = 0
    kept = [0, 1, 3, 4, 5]
    torch.testing.assert_close(ours(x, skipped), ours(x[:, kept], ones[:, kept]), rtol=0, atol=0)


def test_dien_auxiliary_loss_is_small_where_the_next_behaviour_is_told_apart() -> None:
    model, batch = random_recommender(kind="dien").train(), random_batch(16)
    auxiliary = model(batch).auxiliary
    assert auxiliary > 0
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        model(batch).auxiliary.backward()
        optimizer.step()
    assert model(batch).auxiliary < 0.6 * auxiliary
    assert model.eval()(batch).auxiliary is None
    empty = batch._replace(mask=torch.zeros_like(batch.mask))
    assert model.train()(empty).auxiliary is None


def test_sasrec_block_looks_back_only() -> None:
    torch.manual_seed(0)
    block = Block(6, 2, 0.0).double()
    x = torch.randn(1, 5, 6).double()
    later = x.clone()
    later[:, 3:] = torch.randn(1, 2, 6)
    before, after = block(x), block(later)
    torch.testing.assert_close(before[:, :3], after[:, :3], rtol=0, atol=1e-12)
    assert not torch.isclose(before[:, 3:], after[:, 3:]).any()


@pytest.mark.parametrize("kind", ["sasrec", "gru4rec", "caser"])
def test_sequence_state_depends_on_order_and_not_on_the_target(kind: str) -> None:
    model, batch = random_recommender(kind=kind), random_batch()
    assert isinstance(model, SASRec | GRU4Rec | Caser)
    view = view_of(model, batch)
    state = model.state(view)
    assert torch.equal(state, model.state(view._replace(target=view.target.flip(0))))
    assert not state[0].any()
    swapped = batch._replace(items=batch.items.flip(1), ratings=batch.ratings.flip(1))
    assert not torch.allclose(state[1], model.state(view_of(model, swapped))[1])


def test_caser_state_equals_a_loop_over_filters_and_windows() -> None:
    model, batch = random_recommender(kind="caser").double(), random_batch()
    assert isinstance(model, Caser)
    view = view_of(model, batch)
    state = model.state(view)
    for row in range(1, 5):
        count = int(batch.mask[row].sum())
        if count == 0:
            continue
        image = torch.zeros(7, 6).double()
        image[:count] = view.behaviours[row, :count].flip(0)
        outputs = [(model.vertical.weight @ image).T.flatten()]
        for convolution in model.horizontal:
            height = convolution.weight.shape[2]
            best = torch.zeros(16).double()
            for begin in range(min(count, 7 - height + 1)):
                window = image[begin : begin + height].T
                value = (convolution.weight * window).sum((1, 2)) + convolution.bias
                best = torch.maximum(best, value)
            outputs.append(best)
        expected = torch.relu(model.join(torch.cat(outputs)))
        torch.testing.assert_close(state[row], expected, rtol=0, atol=1e-10)


def test_sim_hard_search_reads_the_latest_of_the_targets_category() -> None:
    model = random_recommender(kind="sim_full", search_length=2)
    batch = random_batch(2)
    wanted = int(batch.fields[1, 3])
    other = 21 if wanted != 21 else 22
    categories = torch.tensor([[0] * 7, [wanted, wanted, other, wanted, other, other, other]])
    batch = batch._replace(categories=categories)

    def moved(place: int) -> bool:
        gaps = batch.gaps.clone()  # type: ignore[union-attr]
        gaps[1, place] = 30
        return bool(model(batch._replace(gaps=gaps)).logit[1] != model(batch).logit[1])

    # Ages are read by the exact search alone, so they show what it was given.
    assert [moved(place) for place in range(7)] == [False, True, False, True] + [False] * 3


def test_sim_soft_search_picks_the_largest_products_and_learns_by_its_own_logit() -> None:
    model, batch = (
        random_recommender(kind="sim_full", search="soft", search_length=2),
        random_batch(8),
    )
    assert isinstance(model, SIM)
    assert model.soft_search is not None
    view = view_of(model, batch)
    relevance, _ = model.soft_search(view)
    expected = relevance.masked_fill(~batch.mask, -torch.inf).topk(2, dim=1).indices

    def read(gaps: torch.Tensor) -> torch.Tensor:
        return model(batch._replace(gaps=gaps)).logit

    assert batch.gaps is not None
    for row in range(8):
        for place in range(int(batch.mask[row].sum())):
            gaps = batch.gaps.clone()
            gaps[row, place] = 31
            assert (read(gaps)[row] != read(batch.gaps)[row]) == (place in expected[row])
    score = model.train()(batch)
    score.logit.sum().backward(retain_graph=True)
    assert model.soft_search.of_behaviour.weight.grad is None
    score.search_logit.sum().backward()
    assert model.soft_search.of_behaviour.weight.grad.any()


@pytest.mark.parametrize("missing", ["gaps", "categories"])
def test_sim_without_times_or_categories_is_refused(missing: str) -> None:
    model, batch = random_recommender(kind="sim_full"), random_batch()
    with pytest.raises(TableError, match=r"crm\.kind sim_full: .*rerun"):
        model(batch._replace(**{missing: None}))
