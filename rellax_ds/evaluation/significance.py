"""Bootstrap intervals that resample users, and paired differences between two models.

Rows of one user resemble each other, so resampling rows would understate the error. A resample
draws as many users as there are, with replacement; a row then weighs as often as its user was
drawn. Every metric is computed from those weights: one sort a model serves all resamples. Two
models are compared on the same draws, because the noise they share cancels in the difference.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from rellax_ds import metrics
from rellax_ds.errors import TableError
from rellax_ds.runtime import stable_seed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

    FloatArray = NDArray[np.float64]
    IntArray = NDArray[np.int64]

METRICS = ("auc", "log_loss", "accuracy", "gauc", "ndcg_10")
"""Metrics with an interval. Calibration error has none: its resamples are biased upwards, because
every resample adds noise to bins whose absolute gaps are summed."""

_CHUNK_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % percentile interval.

    Attributes:
        value: The figure on the rows themselves.
        low: 2.5 % quantile over the resamples.
        high: 97.5 % quantile over the resamples.
        num_resamples: Resamples in which the figure is defined (AUC needs both classes).
    """

    value: float
    low: float
    high: float
    num_resamples: int

    def as_dict(self) -> dict[str, float | int]:
        """The four fields, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Resampled:
    """The metrics of one model, or of the difference between two, with their resamples.

    Attributes:
        values: Each metric on the rows themselves; None where it is undefined.
        replicates: Each metric on every resample, [B]; NaN where a resample leaves it undefined.
    """

    values: dict[str, float | None]
    replicates: dict[str, FloatArray]

    def estimates(self) -> dict[str, Estimate | None]:
        """Every metric with its interval."""
        return {name: _estimate(self.values[name], self.replicates[name]) for name in METRICS}

    def minus(self, other: Resampled) -> Resampled:
        """The paired difference to a model resampled by the same `UserBootstrap`."""
        values: dict[str, float | None] = {}
        for name in METRICS:
            ours, theirs = self.values[name], other.values[name]
            values[name] = None if ours is None or theirs is None else ours - theirs
        gaps = {name: self.replicates[name] - other.replicates[name] for name in METRICS}
        return Resampled(values, gaps)

    @classmethod
    def mean(cls, parts: Sequence[Resampled]) -> Resampled:
        """The mean over models, for example of several seeds, within every resample."""
        values: dict[str, float | None] = {}
        for name in METRICS:
            known = [v for v in (part.values[name] for part in parts) if v is not None]
            values[name] = sum(known) / len(known) if len(known) == len(parts) else None
        stacked = {name: np.stack([part.replicates[name] for part in parts]) for name in METRICS}
        return cls(values, {name: rows.mean(axis=0) for name, rows in stacked.items()})


class UserBootstrap:
    """The draws of users for one set of rows, shared by every model scored on them."""

    def __init__(self, users: ArrayLike, num_resamples: int, seed: int) -> None:
        """Draw the resamples.

        Args:
            users: User of each row, [N] integers.
            num_resamples: Number of resamples B.
            seed: Equal seeds give equal draws on every machine.

        Raises:
            TableError: There are no rows, or only one user: nothing can be resampled.
        """
        self.users = np.asarray(users)
        self._names, self._group = np.unique(self.users, return_inverse=True)
        self.num_users = int(self._names.size)
        if self.num_users < 2:
            raise TableError(
                f"bootstrap: {self.num_users} user in {self.users.size} rows; "
                "an interval by user needs two"
            )
        generator = np.random.Generator(np.random.PCG64(stable_seed("bootstrap", seed)))
        draws = generator.integers(self.num_users, size=(num_resamples, self.num_users))
        flat = draws + np.arange(num_resamples)[:, None] * self.num_users
        counts = np.bincount(flat.ravel(), minlength=num_resamples * self.num_users)
        self.weights = counts.reshape(num_resamples, self.num_users).astype(np.float64)

    def on(self, users: ArrayLike) -> UserBootstrap:
        """The same draws of the same users, for other rows of theirs: those of another seed.

        Args:
            users: User of each of those rows, [M] integers.

        Raises:
            TableError: One of them is none of the users drawn from.
        """
        rows = np.asarray(users)
        group = np.searchsorted(self._names, rows)
        known = self._names[np.minimum(group, self.num_users - 1)] == rows
        if not known.all():
            raise TableError(f"bootstrap: user {rows[~known][0]} is none of the users drawn from")
        other = copy.copy(self)
        other.users, other._group = rows, group
        return other

    def resample(self, labels: ArrayLike, logits: ArrayLike) -> Resampled:
        """Every metric on the rows themselves and on every resample.

        Raises:
            TableError: As the metrics: lengths, non-finite scores, one class.
        """
        values = point_values(self.users, labels, logits)
        y = np.asarray(labels, dtype=np.float64)
        scores = np.asarray(logits, dtype=np.float64)
        rows = self._mean_over(np.ones_like(y))
        rows[rows == 0] = np.nan  # none of the users drawn has a row here: see `on`
        replicates = {
            "auc": self._auc(y, scores),
            "log_loss": self._mean_over(metrics.row_log_loss(y, scores)) / rows,
            "accuracy": self._mean_over(((scores > 0) == (y == 1)).astype(np.float64)) / rows,
            "gauc": self._gauc(y, scores),
            "ndcg_10": self._ndcg(y, scores),
        }
        return Resampled(values, replicates)

    def _mean_over(self, rows: FloatArray) -> FloatArray:
        """Weighted sum over rows of a per-row quantity, for every resample: [N] -> [B]."""
        per_user = np.bincount(self._group, weights=rows, minlength=self.num_users)
        return np.asarray(self.weights @ per_user, dtype=np.float64)

    def _auc(self, y: FloatArray, scores: FloatArray) -> FloatArray:
        """Weighted AUC per resample: positives times the negative weight below, half at ties."""
        order = np.argsort(scores, kind="stable")
        group, positive, sorted_scores = self._group[order], y[order], scores[order]
        starts = np.flatnonzero(np.r_[True, sorted_scores[1:] != sorted_scores[:-1]])
        ties = starts.size < scores.size
        num_resamples = self.weights.shape[0]
        found = np.empty(num_resamples, dtype=np.float64)
        step = max(1, _CHUNK_ELEMENTS // scores.size)
        for first in range(0, num_resamples, step):
            weight = self.weights[first : first + step][:, group]
            pos = weight * positive
            neg = weight - pos
            if ties:
                pos = np.add.reduceat(pos, starts, axis=1)
                neg = np.add.reduceat(neg, starts, axis=1)
            below = np.cumsum(neg, axis=1) - 0.5 * neg
            pairs = pos.sum(axis=1) * neg.sum(axis=1)
            wins = np.einsum("bn,bn->b", pos, below)
            found[first : first + step] = np.divide(
                wins, pairs, out=np.full_like(wins, np.nan), where=pairs > 0
            )
        return found

    def _gauc(self, y: FloatArray, scores: FloatArray) -> FloatArray:
        """GAUC per resample: a user's own AUC does not change when the user is drawn twice."""
        per_user, rows = metrics.user_auc(self._group, y, scores)
        counted = np.where(np.isnan(per_user), 0.0, rows)
        weights = self._weights_here()
        weight = weights @ counted
        total = weights @ (counted * np.nan_to_num(per_user))
        gauc: FloatArray = np.divide(
            total, weight, out=np.full_like(total, np.nan), where=weight > 0
        )
        return gauc

    def _weights_here(self) -> FloatArray:
        """How often each user that has rows was drawn, [B, users with rows]."""
        return self.weights[:, np.unique(self._group)]

    def _ndcg(self, y: FloatArray, scores: FloatArray) -> FloatArray:
        """NDCG@10 per resample: like GAUC, a mean of what each user has by itself."""
        per_user = metrics.user_ndcg(self._group, y, scores)
        weights = self._weights_here()
        users = weights @ (~np.isnan(per_user)).astype(np.float64)
        total = weights @ np.nan_to_num(per_user)
        ndcg: FloatArray = np.divide(total, users, out=np.full_like(total, np.nan), where=users > 0)
        return ndcg


def point_values(users: ArrayLike, labels: ArrayLike, logits: ArrayLike) -> dict[str, float | None]:
    """Every metric on the rows themselves; GAUC is None when no user has both classes, and so is
    NDCG when none has a positive.
    """
    per_user, _ = metrics.user_auc(users, labels, logits)
    per_user_ndcg = metrics.user_ndcg(users, labels, logits)
    return {
        "auc": metrics.auc(labels, logits),
        "log_loss": metrics.log_loss(labels, logits),
        "accuracy": metrics.accuracy(labels, logits),
        "gauc": None if np.isnan(per_user).all() else metrics.gauc(users, labels, logits).value,
        "ndcg_10": None if np.isnan(per_user_ndcg).all() else float(np.nanmean(per_user_ndcg)),
    }


def _estimate(value: float | None, replicates: FloatArray) -> Estimate | None:
    defined = replicates[~np.isnan(replicates)]
    if value is None or not defined.size:
        return None
    low, high = np.percentile(defined, (2.5, 97.5))
    return Estimate(float(value), float(low), float(high), int(defined.size))
