"""Metrics against scikit-learn, with ties; and what must stop instead of giving a number."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.metrics import accuracy_score, ndcg_score, roc_auc_score
from sklearn.metrics import log_loss as sklearn_log_loss

from rellax_ds import metrics
from rellax_ds.errors import TableError

LABELS = np.array([0, 1, 1, 0, 1, 0])
SCORES = np.array([-1.0, 2.0, -1.0, 0.5, 0.5, 3.0])

rows = st.lists(
    st.tuples(st.integers(0, 1), st.integers(-4, 4), st.integers(0, 3)), min_size=2, max_size=60
).filter(lambda found: len({label for label, _, _ in found}) == 2)


@settings(max_examples=200, deadline=None)
@given(rows)
def test_auc_with_ties_equals_sklearn(found: list[tuple[int, int, int]]) -> None:
    labels, scores, _ = np.array(found).T
    assert metrics.auc(labels, scores / 3) == pytest.approx(
        roc_auc_score(labels, scores), abs=1e-12
    )


@settings(max_examples=200, deadline=None)
@given(rows)
def test_gauc_equals_the_weighted_mean_of_users_with_both_labels(
    found: list[tuple[int, int, int]],
) -> None:
    labels, scores, users = np.array(found).T
    total, weight = 0.0, 0
    for user in np.unique(users):
        mine = users == user
        if 0 < labels[mine].sum() < mine.sum():
            total += mine.sum() * roc_auc_score(labels[mine], scores[mine])
            weight += int(mine.sum())
    if not weight:
        with pytest.raises(TableError, match="none of"):
            metrics.gauc(users, labels, scores)
        return
    grouped = metrics.gauc(users, labels, scores)
    assert grouped.value == pytest.approx(total / weight, abs=1e-12)
    assert grouped.num_rows == weight
    assert grouped.num_users + grouped.num_dropped == np.unique(users).size


def test_log_loss_equals_sklearn_and_survives_huge_logits() -> None:
    p = metrics.sigmoid(SCORES)
    assert metrics.log_loss(LABELS, SCORES) == pytest.approx(sklearn_log_loss(LABELS, p), abs=1e-12)
    assert metrics.log_loss([1, 0], [800.0, -800.0]) == 0.0
    assert metrics.log_loss([0, 1], [800.0, -800.0]) == 800.0


@settings(max_examples=100, deadline=None)
@given(rows)
def test_log_loss_accuracy_and_reliability_of_any_rows_equal_sklearn(
    found: list[tuple[int, int, int]],
) -> None:
    labels, scores, _ = np.array(found).T
    logits = scores / 3 + 0.01  # off the middle, and off the edges of bins
    p = metrics.sigmoid(logits)
    assert metrics.log_loss(labels, logits) == pytest.approx(sklearn_log_loss(labels, p), abs=1e-12)
    assert metrics.accuracy(labels, logits) == accuracy_score(labels, p > 0.5)
    share, mean = calibration_curve(labels, p, n_bins=10)
    bins = metrics.reliability(labels, logits, 10)
    assert bins.share_positive == pytest.approx(share, abs=1e-12)
    assert bins.mean_probability == pytest.approx(mean, abs=1e-12)


def test_accuracy_counts_probability_one_half_as_no() -> None:
    assert metrics.accuracy([1, 0, 1, 0], [0.0, 0.0, 2.0, 2.0]) == 0.5


def test_ece_is_the_gap_weighted_by_rows() -> None:
    # Three rows at p = .75 with one like, one row at p = .25 with a like.
    logits = [math.log(3)] * 3 + [-math.log(3)]
    expected = (3 * abs(0.75 - 1 / 3) + abs(0.25 - 1)) / 4
    assert metrics.ece([1, 0, 0, 1], logits) == pytest.approx(expected)
    bins = metrics.reliability([1, 0, 0, 1], logits)
    assert bins.rows.tolist() == [1, 3]
    assert bins.share_positive.tolist() == pytest.approx([1.0, 1 / 3])


def test_sigmoid_and_logit_are_inverse_without_overflow() -> None:
    assert metrics.sigmoid([-1000.0, 1000.0]).tolist() == [0.0, 1.0]
    assert metrics.sigmoid(metrics.logit([0.1, 0.5, 0.9])) == pytest.approx([0.1, 0.5, 0.9])


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([0, 1, 1], [0.0, float("nan"), float("inf")], "2 of 3 scores are not finite, .* row 1"),
        ([0, 1], [0.0, 1.0, 2.0], r"labels have shape \(2,\) and scores \(3,\)"),
        ([0, 2], [0.0, 1.0], "label 2.0 in row 1"),
        ([1, 1], [0.0, 1.0], "all 2 labels are 1"),
        ([], [], "no rows"),
    ],
)
def test_auc_of_unusable_rows_is_one_clear_line(
    labels: list[int], scores: list[float], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        metrics.auc(labels, scores)
    assert isinstance(caught.value, TableError)
    assert "\n" not in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12))
def test_ndcg_equals_the_tie_aware_one_of_scikit_learn(seed: int, k: int) -> None:
    random = np.random.default_rng(seed)
    users, labels = random.integers(0, 5, 60), random.integers(0, 2, 60)
    logits = random.integers(0, 6, 60).astype(float)
    each = []
    for user in np.unique(users):
        y, scores = labels[users == user], logits[users == user]
        if not y.any():
            continue
        if len(y) == 1:
            each.append(1.0)  # scikit-learn wants two rows
            continue
        each.append(ndcg_score([y], [scores], k=k))
    if each:
        assert metrics.ndcg(users, labels, logits, k) == pytest.approx(np.mean(each), abs=1e-12)


def test_ndcg_without_a_positive_is_refused() -> None:
    with pytest.raises(TableError, match="none of 2 users has a positive"):
        metrics.ndcg([1, 2, 2], [0, 0, 0], [0.0, 1.0, 2.0])


def test_gauc_with_another_number_of_users_is_refused() -> None:
    with pytest.raises(TableError, match="2 users for 3 labels"):
        metrics.gauc([1, 2], [0, 1, 0], [0.0, 1.0, 2.0])
