"""AUC, GAUC, NDCG, LogLoss, accuracy and calibration error of scores given as logits.

Everything is exact and in float64: ranks with ties shared, LogLoss from logits without a clipped
probability, no dependency beyond numpy. A NaN, a missing row or a split with one class is an error,
never a skipped row: a metric over the rows that happened to work is not the metric of the split.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from rellax_ds.errors import TableError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    FloatArray = NDArray[np.float64]
    IntArray = NDArray[np.int64]


class GroupedAUC(NamedTuple):
    """AUC within each user, averaged with the user's number of rows as weight.

    Attributes:
        value: The weighted mean.
        num_users: Users with both classes, the ones that count.
        num_rows: Rows of those users.
        num_dropped: Users with one class only, who have no AUC.
    """

    value: float
    num_users: int
    num_rows: int
    num_dropped: int


def auc(labels: ArrayLike, logits: ArrayLike) -> float:
    """Probability that a random positive scores above a random negative; a tie counts one half.

    Args:
        labels: 0 or 1, [N].
        logits: Scores, [N]; any strictly increasing function of them gives the same AUC.

    Raises:
        TableError: Lengths differ, a score is not finite, a label is not 0 or 1, or there is one
            class only.
    """
    y, scores = _checked(labels, logits, both_classes=True)
    positives = float(y.sum())
    negatives = y.size - positives
    rank_sum = float(_ranks(scores)[y == 1].sum())
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


def gauc(users: ArrayLike, labels: ArrayLike, logits: ArrayLike) -> GroupedAUC:
    """Impression-weighted mean of the per-user AUC (Zhu et al. 2017); one-class users are dropped.

    Args:
        users: User of each row, [N] integers.
        labels: 0 or 1, [N].
        logits: Scores, [N].

    Raises:
        TableError: As `auc`; also when no user has both classes.
    """
    per_user, rows = user_auc(users, labels, logits)
    mixed = ~np.isnan(per_user)
    if not mixed.any():
        raise TableError(
            f"gauc: none of {rows.size} users has both labels; score more rows per user"
        )
    return GroupedAUC(
        value=float(np.average(per_user[mixed], weights=rows[mixed])),
        num_users=int(mixed.sum()),
        num_rows=int(rows[mixed].sum()),
        num_dropped=int((~mixed).sum()),
    )


def user_auc(
    users: ArrayLike, labels: ArrayLike, logits: ArrayLike
) -> tuple[FloatArray, FloatArray]:
    """AUC within each user, NaN for a user with one class, and the user's number of rows.

    Args:
        users: User of each row, [N] integers.
        labels: 0 or 1, [N].
        logits: Scores, [N].

    Returns:
        Two arrays over the distinct users in increasing order.
    """
    group, y, scores = _grouped(users, labels, logits)
    rows = np.bincount(group).astype(np.float64)
    positives = np.bincount(group, weights=y)
    rank_sums = np.bincount(group, weights=_ranks_within(group, scores) * y)
    pairs = positives * (rows - positives)
    wins = rank_sums - positives * (positives + 1) / 2
    return np.divide(wins, pairs, out=np.full_like(pairs, np.nan), where=pairs > 0), rows


def ndcg(users: ArrayLike, labels: ArrayLike, logits: ArrayLike, k: int = 10) -> float:
    """Mean over the users of `user_ndcg`; users without a positive are left out.

    Raises:
        TableError: As `auc`; also when no user has a positive.
    """
    per_user = user_ndcg(users, labels, logits, k)
    defined = per_user[~np.isnan(per_user)]
    if not defined.size:
        raise TableError(f"ndcg: none of {per_user.size} users has a positive; score more rows")
    return float(np.mean(defined))


def user_ndcg(users: ArrayLike, labels: ArrayLike, logits: ArrayLike, k: int = 10) -> FloatArray:
    """NDCG@k of each user's own scored rows, with binary gains and discount 1 / log2(1 + rank).

    Rows with equal scores share the mean gain of their places (McSherry and Najork 2008), so their
    order does not matter.

    Args:
        users: User of each row, [N] integers.
        labels: 0 or 1, [N].
        logits: Scores, [N].
        k: Places that count.

    Returns:
        An array over the distinct users in increasing order; NaN for a user without a positive.

    Raises:
        TableError: As `log_loss`; also for another number of users than rows.
    """
    group, y, scores = _grouped(users, labels, logits)
    order = np.lexsort((-scores, group))
    group, y, scores = group[order], y[order], scores[order]
    new_group = np.r_[True, group[1:] != group[:-1]]
    place = np.arange(y.size) - np.flatnonzero(new_group)[group]
    discount = np.where(place < k, 1.0 / np.log2(place + 2.0), 0.0)
    tie = np.cumsum(new_group | np.r_[True, scores[1:] != scores[:-1]]) - 1
    gain = (np.bincount(tie, weights=y) / np.bincount(tie))[tie]
    found = np.bincount(group, weights=discount * gain)
    positives = np.bincount(group, weights=y).astype(np.int64)
    best = np.r_[0.0, np.cumsum(1.0 / np.log2(np.arange(k) + 2.0))][np.minimum(positives, k)]
    undefined = np.full_like(found, np.nan)
    return np.asarray(np.divide(found, best, out=undefined, where=positives > 0), dtype=np.float64)


def log_loss(labels: ArrayLike, logits: ArrayLike) -> float:
    """Mean binary cross entropy of sigmoid(logits) in nats; no probability is formed or clipped."""
    y, scores = _checked(labels, logits)
    return float(np.mean(row_log_loss(y, scores)))


def accuracy(labels: ArrayLike, logits: ArrayLike) -> float:
    """Share of rows on the right side of probability one half; exactly one half counts as a no."""
    y, scores = _checked(labels, logits)
    return float(np.mean((scores > 0) == (y == 1)))


def ece(labels: ArrayLike, logits: ArrayLike, num_bins: int = 10) -> float:
    """Expected calibration error over equal-width probability bins (Guo et al. 2017, eq. 3)."""
    bins = reliability(labels, logits, num_bins)
    gaps = np.abs(bins.mean_probability - bins.share_positive)
    return float(np.average(gaps, weights=bins.rows))


class Reliability(NamedTuple):
    """Calibration by probability bin; empty bins are left out.

    Attributes:
        mean_probability: Mean predicted probability in the bin, [bins].
        share_positive: Share of positives in the bin, [bins].
        rows: Rows in the bin, [bins].
    """

    mean_probability: FloatArray
    share_positive: FloatArray
    rows: IntArray


def reliability(labels: ArrayLike, logits: ArrayLike, num_bins: int = 10) -> Reliability:
    """Mean prediction and share of positives in equal-width probability bins."""
    y, scores = _checked(labels, logits)
    probabilities = sigmoid(scores)
    index = np.minimum((probabilities * num_bins).astype(np.int64), num_bins - 1)
    rows = np.bincount(index, minlength=num_bins)
    kept = rows > 0
    mean = np.bincount(index, weights=probabilities, minlength=num_bins)[kept] / rows[kept]
    share = np.bincount(index, weights=y, minlength=num_bins)[kept] / rows[kept]
    return Reliability(mean, share, rows[kept].astype(np.int64))


def score_all(users: ArrayLike, labels: ArrayLike, logits: ArrayLike) -> dict[str, float]:
    """Every metric of one model on one set of rows: auc, log_loss, accuracy, gauc and ece."""
    return {
        "auc": auc(labels, logits),
        "log_loss": log_loss(labels, logits),
        "accuracy": accuracy(labels, logits),
        "gauc": gauc(users, labels, logits).value,
        "ece": ece(labels, logits),
    }


def sigmoid(logits: ArrayLike) -> FloatArray:
    """1 / (1 + exp(-x)) in float64, without overflow for any finite x."""
    scores = np.asarray(logits, dtype=np.float64)
    small = np.exp(-np.abs(scores))
    return np.where(scores >= 0, 1.0, small) / (1.0 + small)


def logit(probabilities: ArrayLike) -> FloatArray:
    """Inverse of `sigmoid`; the caller keeps the probabilities strictly inside (0, 1)."""
    p = np.asarray(probabilities, dtype=np.float64)
    return np.asarray(np.log(p) - np.log1p(-p), dtype=np.float64)


def row_log_loss(labels: FloatArray, logits: FloatArray) -> FloatArray:
    """Binary cross entropy of each row in nats: log(1 + exp(x)) - y x."""
    return np.asarray(np.logaddexp(0.0, logits) - labels * logits, dtype=np.float64)


def _checked(
    labels: ArrayLike, logits: ArrayLike, both_classes: bool = False
) -> tuple[FloatArray, FloatArray]:
    y = np.asarray(labels, dtype=np.float64)
    scores = np.asarray(logits, dtype=np.float64)
    if y.ndim != 1 or y.shape != scores.shape:
        raise TableError(
            f"metrics: labels have shape {y.shape} and scores {scores.shape}; "
            "pass one of each for every row"
        )
    if not y.size:
        raise TableError("metrics: no rows to score; check the split's size")
    bad = ~np.isfinite(scores)
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise TableError(
            f"metrics: {int(bad.sum())} of {y.size} scores are not finite, the first in row {row}; "
            "mend the model that made them"
        )
    if not np.isin(y, (0.0, 1.0)).all():
        row = int(np.flatnonzero(~np.isin(y, (0.0, 1.0)))[0])
        raise TableError(f"metrics: label {y[row]} in row {row} is neither 0 nor 1; threshold it")
    if both_classes and y.min() == y.max():
        raise TableError(
            f"metrics: all {y.size} labels are {int(y[0])}, so AUC is undefined; "
            "score rows of both classes"
        )
    return y, scores


def _grouped(
    users: ArrayLike, labels: ArrayLike, logits: ArrayLike
) -> tuple[IntArray, FloatArray, FloatArray]:
    """Number of each row's user among the distinct ones, and the checked labels and scores."""
    y, scores = _checked(labels, logits)
    groups = np.asarray(users)
    if groups.shape != y.shape:
        raise TableError(
            f"metrics: {groups.size} users for {y.size} labels; pass one user for each scored row"
        )
    return np.unique(groups, return_inverse=True)[1].astype(np.int64), y, scores


def _ranks(scores: FloatArray) -> FloatArray:
    """Ranks from 1 on, ties sharing their mean rank."""
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    last = np.cumsum(counts).astype(np.float64)
    return np.asarray((last - (counts - 1) / 2)[inverse], dtype=np.float64)


def _ranks_within(group: IntArray, scores: FloatArray) -> FloatArray:
    """Ranks from 1 on inside each group, ties sharing their mean rank; `group` holds 0..G-1."""
    order = np.lexsort((scores, group))
    sorted_group, sorted_scores = group[order], scores[order]
    new_group = np.r_[True, sorted_group[1:] != sorted_group[:-1]]
    new_tie = new_group | np.r_[True, sorted_scores[1:] != sorted_scores[:-1]]
    starts = np.flatnonzero(new_tie)
    counts = np.diff(np.r_[starts, sorted_group.size])
    group_starts = np.flatnonzero(new_group)[np.cumsum(new_group) - 1]
    mean_rank = np.repeat(starts + (counts + 1) / 2, counts) - group_starts
    ranks = np.empty(scores.size, dtype=np.float64)
    ranks[order] = mean_rank
    return ranks
