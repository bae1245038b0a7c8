"""What every kind of recommender must hold to, whatever it computes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pytest
import torch
from crm_models import random_batch, random_recommender

from rellax_ds import metrics
from rellax_ds.config import CRMConfig, CRMKind
from rellax_ds.crm.export import export, load
from rellax_ds.crm.features import FeatureBatch, Features, RecentHistory, build_vocabulary
from rellax_ds.crm.fit import fit, score
from rellax_ds.crm.kinds import KINDS, build
from rellax_ds.crm.network import Architecture, training_loss
from rellax_ds.errors import ArtifactError

if TYPE_CHECKING:
    from pathlib import Path

    from rellax_ds.crm.features import Interactions
    from rellax_ds.crm.fit import Fitted

# `sim` is DIN's network on another history, so the histories here make it DIN.
VARIANTS: dict[str, dict[str, Any]] = {
    **{kind: {"kind": kind} for kind in KINDS if kind != "sim"},
    "sim_full_soft": {"kind": "sim_full", "search": "soft"},
}
variants = pytest.mark.parametrize("name", list(VARIANTS))


def trained(log: Interactions, config: CRMConfig, name: str, **changes: object) -> Fitted:
    config = config.model_copy(update={**VARIANTS[name], **changes})
    return fit(log, RecentHistory(log, config.history_length), config, 1)


def logits_of(fitted: Fitted, rows: np.ndarray) -> np.ndarray:
    return np.concatenate([logit for _, logit, _ in score(fitted.model, fitted.features, rows)])


def test_every_kind_a_recipe_can_name_has_a_network() -> None:
    assert tuple(KINDS) == get_args(CRMKind)


@variants
def test_gradient_of_the_loss_reaches_every_parameter(name: str) -> None:
    model, batch = random_recommender(**VARIANTS[name], dropout=0.0).train(), random_batch(64)
    training_loss(model(batch), torch.randint(0, 2, (64,)).float(), 1.0).backward()
    without = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    assert without == []
    assert not model.table.weight.grad[0].any()


@variants
@pytest.mark.parametrize("instance", ["final", "hidden", "user"])
def test_padding_altered_or_longer_scores_unchanged(
    name: str, instance: Literal["final", "hidden", "user"]
) -> None:
    model, batch = random_recommender(**VARIANTS[name], instance=instance), random_batch(12)
    assert batch.gaps is not None
    assert batch.categories is not None
    altered = batch._replace(
        items=torch.where(batch.mask, batch.items, torch.randint(1, 20, batch.items.shape)),
        ratings=torch.where(batch.mask, batch.ratings, 37),
        gaps=torch.where(batch.mask, batch.gaps, 9),
        categories=torch.where(batch.mask, batch.categories, batch.fields[:, 3:]),
    )
    longer = FeatureBatch(
        batch.fields, *(torch.cat([x, torch.zeros_like(x)], dim=1) for x in batch[1:])
    )
    found = model(batch)
    for other in map(model, (altered, longer)):
        torch.testing.assert_close(found.logit, other.logit, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.instance, other.instance, rtol=0, atol=1e-5)
    assert found.logit.isfinite().all()


@variants
def test_every_behaviour_of_a_full_history_can_matter(name: str) -> None:
    model = random_recommender(**VARIANTS[name], search_length=7, dropout=0.0)
    batch = random_batch(2)
    batch = batch._replace(categories=batch.fields[:, 3:].expand_as(batch.mask) * batch.mask)
    before = model(batch).logit[1]
    for place in range(7):
        items, ratings = batch.items.clone(), batch.ratings.clone()
        items[1, place], ratings[1, place] = items[1, place] % 20 + 1, 36
        assert model(batch._replace(items=items, ratings=ratings)).logit[1] != before


@variants
@pytest.mark.parametrize("instance", ["final", "hidden", "user"])
def test_instance_has_promised_width_and_only_user_ignores_the_target(
    name: str, instance: Literal["final", "hidden", "user"]
) -> None:
    model, batch = random_recommender(**VARIANTS[name], instance=instance), random_batch()
    h = model(batch).instance
    fields = batch.fields.clone()
    fields[:, 2:] = fields[:, 2:].roll(1, 0)
    moved = model(batch._replace(fields=fields)).instance
    assert h.shape == (5, model.architecture.instance_dim)
    assert torch.equal(h, moved) == (instance == "user")


@variants
def test_events_from_the_target_on_and_labels_do_not_reach_the_score(
    name: str, log: Interactions, config: CRMConfig
) -> None:
    config = config.model_copy(update=VARIANTS[name])
    history = RecentHistory(log, config.history_length)
    vocabulary = build_vocabulary(log, history, log.split_rows("train"), config)
    sample = int(np.flatnonzero(log.history_end - log.history_start > 5)[100])
    outside = np.ones(len(log.event_item), bool)
    outside[log.history_start[sample] : log.history_end[sample]] = False
    altered = replace(
        log,
        event_item=np.where(outside, 3, log.event_item),
        event_rating=np.where(outside, 2, log.event_rating),
        label=1 - log.label,
    )
    torch.manual_seed(0)
    model = build(Architecture.of(config, vocabulary)).eval()
    before, after = (
        model(Features(each, history, vocabulary).gather(np.array([sample])))
        for each in (log, altered)
    )
    assert torch.equal(before.logit, after.logit)
    assert torch.equal(before.instance, after.instance)


@variants
def test_fit_planted_interests_are_found(name: str, log: Interactions, config: CRMConfig) -> None:
    fitted = trained(log, config, name, batch_size=128, learning_rate=1e-2)
    rows = log.split_rows("test")
    assert metrics.auc(log.label[rows], logits_of(fitted, rows)) > 0.7


@variants
def test_fit_twice_repeats_bitwise_whatever_the_test_labels(
    name: str, sparse_log: Interactions, config: CRMConfig
) -> None:
    flipped = sparse_log.label.copy()
    flipped[sparse_log.split_rows("test")] ^= 1
    first = trained(sparse_log, config, name, max_epochs=1)
    again = trained(replace(sparse_log, label=flipped), config, name, max_epochs=1)
    for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


@variants
def test_exported_model_loads_with_its_logits_and_zero_rows(
    name: str, sparse_log: Interactions, config: CRMConfig, tmp_path: Path
) -> None:
    log = sparse_log
    fitted = trained(log, config, name, max_epochs=1, weight_decay=0.1)
    export(fitted, log, tmp_path)
    model, vocabulary = load(tmp_path)
    assert type(model) is KINDS[fitted.model.architecture.kind]
    assert model.architecture == fitted.model.architecture
    rows = log.split_rows("test")
    features = Features(log, RecentHistory(log, config.history_length), vocabulary)
    logits = np.concatenate([logit for _, logit, _ in score(model, features, rows)])
    np.testing.assert_array_equal(logits, logits_of(fitted, rows))
    table = model.item_table()
    assert table.shape == (log.items.num_rows + 1, config.embedding_dim)
    zero = [0, *(item + 1 for item in vocabulary.unseen_items)]
    assert torch.nonzero(~table.any(1)).flatten().tolist() == zero
    assert len(zero) > 1


def test_architecture_of_an_older_version_is_din_and_of_a_newer_one_is_refused() -> None:
    model = random_recommender()
    assert type(model) is KINDS["din"]
    with pytest.raises(ArtifactError, match=r"crm\.kind 'later' is none of din, .*rerun"):
        build(replace(model.architecture, kind="later"))  # type: ignore[arg-type]
