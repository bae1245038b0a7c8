from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import numpy as np
import pytest

from rellax_ds import metrics
from rellax_ds.config import CRMConfig
from rellax_ds.crm.export import FOLD_TABLES, FOLDS, INSTANCES, LOGITS, export
from rellax_ds.crm.features import build_history
from rellax_ds.crm.fit import fit
from rellax_ds.crm.folds import FULL, OutOfFold, assign_folds, out_of_fold
from rellax_ds.errors import TableError

if TYPE_CHECKING:
    from pathlib import Path

    from rellax_ds.crm.features import Interactions
    from rellax_ds.crm.fit import Fitted


def folded(log: Interactions, config: CRMConfig) -> tuple[Fitted, OutOfFold]:
    history = build_history(log, config, None)
    full = fit(log, history, config, 1)
    return full, out_of_fold(log, history, config, 1, full)


@pytest.fixture(scope="module")
def by_user(config: CRMConfig) -> CRMConfig:
    return config.model_copy(update={"folds": 3, "max_epochs": 2})


@pytest.fixture(scope="module")
def found(log: Interactions, by_user: CRMConfig) -> tuple[Fitted, OutOfFold]:
    return folded(log, by_user)


def test_user_folds_hold_whole_users_and_about_equally_many_rows(
    log: Interactions, by_user: CRMConfig
) -> None:
    train = log.split_rows("train")
    fold = assign_folds(log, train, by_user, 1)
    users = log.sample_user[train]
    homes = [set(fold[users == user].tolist()) for user in np.unique(users)]
    assert all(len(home) == 1 for home in homes)
    counts = np.bincount(fold, minlength=3)
    assert counts.sum() == len(train)
    assert counts.min() > 0.25 * len(train)


def test_time_folds_are_blocks_in_order_and_the_first_has_none(
    log: Interactions, config: CRMConfig
) -> None:
    train = log.split_rows("train")
    config = config.model_copy(update={"folds": 3, "fold_by": "time"})
    fold = assign_folds(log, train, config, 1)
    assert (np.diff(fold) >= 0).all()
    assert np.unique(fold).tolist() == [FULL, 0, 1, 2]


def test_more_folds_than_users_is_refused(log: Interactions, by_user: CRMConfig) -> None:
    many = by_user.model_copy(update={"folds": 100})
    few = log.split_rows("train")[:5]
    with pytest.raises(TableError, match=r"crm\.folds 100: train holds \d users only"):
        assign_folds(log, few, many, 1)


@pytest.mark.parametrize(("kind", "by"), [("din", "user"), ("din", "time"), ("dien", "user")])
def test_fold_recommender_never_sees_the_labels_of_its_fold(
    log: Interactions, by_user: CRMConfig, kind: str, by: str
) -> None:
    config = by_user.model_copy(update={"kind": kind, "fold_by": by, "max_epochs": 1})
    train = log.split_rows("train")
    last = train[assign_folds(log, train, config, 1) == 2]
    label = log.label.copy()
    label[last] = 1 - label[last]
    (_, before), (_, after) = (
        folded(one, config) for one in (log, dataclasses.replace(log, label=label))
    )
    np.testing.assert_array_equal(before.fold, after.fold)
    of_last = before.fold[before.rows] == 2
    np.testing.assert_array_equal(before.logits[of_last], after.logits[of_last])
    if by == "user":
        assert not np.array_equal(before.logits[~of_last], after.logits[~of_last])


def test_out_of_fold_scores_are_no_better_than_those_of_new_rows(
    found: tuple[Fitted, OutOfFold], log: Interactions
) -> None:
    _, unseen = found
    assert unseen.facts["rows"] == len(log.split_rows("train"))
    assert unseen.facts["auc"] == metrics.auc(log.label[unseen.rows], unseen.logits)
    assert unseen.facts["auc"] > 0.55
    assert all(fold["instance_fit"] > 0.5 for fold in unseen.facts["folds"])


def test_fold_vectors_lie_in_the_axes_of_the_full_recommender(
    found: tuple[Fitted, OutOfFold], log: Interactions
) -> None:
    full, unseen = found
    table = full.model.item_table().numpy()
    assert unseen.item_tables.shape == (3, *table.shape)
    assert not unseen.item_tables[:, 0].any()
    for mapped in unseen.item_tables:
        seen = np.flatnonzero(mapped.any(axis=1))
        gap = ((mapped[seen] - table[seen]) ** 2).sum()
        assert gap < 0.6 * ((table[seen] - table[seen].mean(axis=0)) ** 2).sum()


def test_export_gives_training_rows_their_fold_and_others_the_full_recommender(
    found: tuple[Fitted, OutOfFold], log: Interactions, tmp_path: Path
) -> None:
    full, unseen = found
    (tmp_path / "plain").mkdir()
    (tmp_path / "folded").mkdir()
    plain = export(full, log, tmp_path / "plain")
    document = export(full, log, tmp_path / "folded", unseen)
    assert document["train"] == plain["train"], "metrics of the full recommender stay its own"
    assert document["out_of_fold"] == json.loads(json.dumps(unseen.facts))
    fold = np.load(tmp_path / "folded" / FOLDS)
    assert fold.shape == (log.num_samples,)
    assert np.load(tmp_path / "folded" / FOLD_TABLES).shape[0] == 3
    for name, values in ((LOGITS, unseen.logits), (INSTANCES, unseen.instances)):
        ours, theirs = np.load(tmp_path / "folded" / name), np.load(tmp_path / "plain" / name)
        np.testing.assert_array_equal(ours[unseen.rows], values)
        np.testing.assert_array_equal(ours[fold == FULL], theirs[fold == FULL])
    assert not (tmp_path / "plain" / FOLDS).exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"folds": 1}, "nothing to train on"), ({"folds": 3, "holdout": 0.1}, "use one of them")],
)
def test_config_impossible_folds_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CRMConfig(**changes)
