"""The bootstrap by user: what a resample is, how wide it is, and that pairs are compared."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from rellax_ds import metrics
from rellax_ds.errors import TableError
from rellax_ds.evaluation.significance import METRICS, UserBootstrap


def made(seed: int, users: int = 60, rows: int = 20, ties: bool = True) -> tuple[np.ndarray, ...]:
    """Rows in which users differ in how often they like, and scores follow the labels."""
    rng = np.random.default_rng(seed)
    user = np.repeat(np.arange(users), rows)
    label = (rng.random(user.size) < rng.beta(2, 2, users)[user]).astype(int)
    score = label + rng.normal(size=user.size) + rng.normal(size=users)[user]
    return user, label, np.round(score, 1) if ties else score


@pytest.mark.parametrize("ties", [True, False])
def test_resample_equals_metrics_on_rows_repeated_by_user(ties: bool) -> None:
    user, label, score = made(1, ties=ties)
    bootstrap = UserBootstrap(user, 4, seed=5)
    found = bootstrap.resample(label, score).replicates
    for number in range(4):
        times = bootstrap.weights[number].astype(int)
        assert times.sum() == 60
        again = np.concatenate([np.tile(np.flatnonzero(user == u), times[u]) for u in range(60)])
        copies = np.concatenate([np.repeat(np.arange(times[u]) + 100 * u, 20) for u in range(60)])
        y, s = label[again], score[again]
        expected = {
            "auc": roc_auc_score(y, s),
            "log_loss": log_loss(y, metrics.sigmoid(s)),
            "accuracy": np.mean((s > 0) == y),
            "gauc": metrics.gauc(copies, y, s).value,
            "ndcg_10": metrics.ndcg(copies, y, s),
        }
        assert set(expected) == set(METRICS)
        for name, value in expected.items():
            assert found[name][number] == pytest.approx(value, abs=1e-10), name


def test_estimates_are_the_same_for_a_seed_and_others_for_another() -> None:
    user, label, score = made(2)
    first, again, other = (
        UserBootstrap(user, 200, seed).resample(label, score).estimates() for seed in (7, 7, 8)
    )
    assert first == again
    assert first != other


def test_interval_holds_the_true_auc_about_as_often_as_it_says() -> None:
    everyone = made(0, users=20_000, rows=20, ties=False)
    truth = metrics.auc(everyone[1], everyone[2])
    held = 0
    for seed in range(1, 101):
        user, label, score = made(seed, users=80, ties=False)
        auc = UserBootstrap(user, 200, seed).resample(label, score).estimates()["auc"]
        held += auc.low <= truth <= auc.high
    assert 86 <= held <= 100


def test_interval_by_user_is_wider_than_by_row_when_users_differ() -> None:
    user, label, score = made(3, users=40, rows=50, ties=False)
    by_user = UserBootstrap(user, 400, 1).resample(label, score).estimates()["log_loss"]
    by_row = UserBootstrap(np.arange(user.size), 400, 1).resample(label, score)
    row_interval = by_row.estimates()["log_loss"]
    assert by_user.high - by_user.low > 1.3 * (row_interval.high - row_interval.low)


def test_difference_is_paired_and_narrower_than_either_model() -> None:
    user, label, score = made(4)
    slightly_worse = score + np.random.default_rng(0).normal(scale=0.4, size=score.size)
    bootstrap = UserBootstrap(user, 400, 3)
    ours, theirs = bootstrap.resample(label, score), bootstrap.resample(label, slightly_worse)
    gap, own = ours.minus(theirs).estimates()["auc"], ours.estimates()["auc"]
    assert gap.value == pytest.approx(
        metrics.auc(label, score) - metrics.auc(label, slightly_worse)
    )
    assert gap.high - gap.low < 0.6 * (own.high - own.low)
    zero = ours.minus(ours).estimates()["auc"]
    assert (zero.value, zero.low, zero.high) == (0, 0, 0)


def test_gauc_without_a_user_of_both_labels_is_none_and_the_rest_stays() -> None:
    estimates = UserBootstrap([0, 1, 2, 3], 50, 0).resample([0, 1, 0, 1], [0, 2, 1, 3]).estimates()
    assert estimates["gauc"] is None
    assert estimates["auc"] is not None
    assert estimates["auc"].num_resamples < 50  # some draws hold one label only


def test_bootstrap_of_one_user_is_refused() -> None:
    with pytest.raises(TableError, match="needs two"):
        UserBootstrap([7, 7, 7], 10, 0)
