from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from rellax_ds import metrics
from rellax_ds.crm.features import build_history
from rellax_ds.crm.fit import Fitted, fit, score
from rellax_ds.errors import ConfigError, TableError

if TYPE_CHECKING:
    from rellax_ds.config import CRMConfig
    from rellax_ds.crm.features import Interactions


def run(log: Interactions, config: CRMConfig, seed: int = 1, **changes: object) -> Fitted:
    config = config.model_copy(update=changes)
    return fit(log, build_history(log, config, None), config, seed)


def same_weights(a: Fitted, b: Fitted) -> bool:
    pairs = zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_fit_planted_interests_ranks_unseen_test_rows(log: Interactions, config: CRMConfig) -> None:
    fitted = run(log, config)
    rows = log.split_rows("test")
    logits = np.concatenate([logit for _, logit, _ in score(fitted.model, fitted.features, rows)])
    assert metrics.auc(log.label[rows], logits) > 0.75


def test_fit_same_seed_repeats_bitwise_and_leaves_random_state_alone(
    log: Interactions, config: CRMConfig
) -> None:
    torch.manual_seed(5)
    first = run(log, config, max_epochs=2)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    assert same_weights(first, run(log, config, max_epochs=2))
    assert not same_weights(first, run(log, config, seed=2, max_epochs=2))


def test_fit_held_out_labels_flipped_weights_unchanged(
    log: Interactions, config: CRMConfig
) -> None:
    fitted = run(log, config, holdout=0.3, max_epochs=2)
    train = log.split_rows("train")
    start = fitted.holdout_start
    assert start == train[len(train) - int(0.3 * len(train))]
    assert fitted.train_rows.tolist() == train[train < start].tolist()

    def with_flipped(rows: np.ndarray) -> Interactions:
        label = log.label.copy()
        label[rows] ^= 1
        return replace(log, label=label)

    held_out = run(with_flipped(train[train >= start]), config, holdout=0.3, max_epochs=2)
    assert same_weights(fitted, held_out)
    trained = run(with_flipped(train[train < start][-1:]), config, holdout=0.3, max_epochs=2)
    assert not same_weights(fitted, trained)


def test_fit_patience_spent_stops_and_keeps_the_best_epoch(
    log: Interactions, config: CRMConfig
) -> None:
    fitted = run(log, config, max_epochs=30, patience=2)
    aucs = [record["valid_auc"] for record in fitted.epochs]
    assert len(aucs) == int(np.argmax(aucs)) + 1 + 2
    rows = log.split_rows("valid")
    logits = np.concatenate([logit for _, logit, _ in score(fitted.model, fitted.features, rows)])
    assert metrics.auc(log.label[rows], logits) == max(aucs)


@pytest.mark.parametrize("label", [0, 1])
def test_fit_valid_of_one_class_raises(log: Interactions, config: CRMConfig, label: int) -> None:
    labels = log.label.copy()
    labels[log.split_rows("valid")] = label
    with pytest.raises(TableError, match=r"valid holds \d+ likes in \d+ samples.*data\.split"):
        run(replace(log, label=labels), config)


def test_fit_diverging_loss_raises(log: Interactions, config: CRMConfig) -> None:
    with pytest.raises(ConfigError, match=r"crm\.learning_rate 1e\+30.*lower it"):
        run(log, config, learning_rate=1e30)
