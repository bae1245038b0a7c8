"""Baselines without an LLM: means of labels in the history, and a logistic model on means.

They are the floor a report needs: the mean of the last labels asks how much of a score is the
user's mood, that of the most similar events' what retrieval adds to it, the logistic model how much
is item popularity and user leniency. Both are causal and streaming like the main model: a
history may run into the valid and test period, as the samples' ranges say, but item statistics
come from training events before the sample only, and the weights from the training split only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rellax_ds import metrics
from rellax_ds.errors import TableError
from rellax_ds.retrieval.heterogeneity import Ranked
from rellax_ds.schema import EVENTS, RETRIEVED, SAMPLES, SPLITS, check_table

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import ArrayLike, NDArray

    FloatArray = NDArray[np.float64]
    IntArray = NDArray[np.int64]

FEATURES = ("item mean", "user mean", "popularity", "user residual")
"""Inputs of the logistic baseline, in order."""

_TRAIN = SPLITS.index("train")
_ITEM_PRIOR_ROWS = 10.0
_USER_PRIOR_ROWS = 2.0
_LAST_PRIOR_ROWS = 1.0


@dataclass(frozen=True)
class Log:
    """The events and samples of stage 1 as arrays.

    Attributes:
        event_item: Item of each event, [E].
        event_label: Label of each event, [E].
        event_time: Time of each event in seconds, [E]; events are sorted by (user, time, item).
        event: Event that is the target of each sample, [S].
        label: Label of each sample, [S].
        split: Position in `schema.SPLITS` of each sample, [S].
        history_start: First event of each sample's history, [S].
        history_end: One past the last event of each sample's history, [S].
    """

    event_item: IntArray
    event_label: FloatArray
    event_time: IntArray
    event: IntArray
    label: FloatArray
    split: IntArray
    history_start: IntArray
    history_end: IntArray

    @classmethod
    def read(cls, tables: Path) -> Log:
        """Read stage 1's folder.

        Raises:
            TableError: A table does not have the promised columns.
        """
        events_path, samples_path = tables / "events.parquet", tables / "samples.parquet"
        events = check_table(pq.read_table(events_path), EVENTS, str(events_path))
        samples = check_table(pq.read_table(samples_path), SAMPLES, str(samples_path))

        def integers(table: object, name: str) -> IntArray:
            return np.asarray(table[name].to_numpy(), dtype=np.int64)  # type: ignore[index]

        return cls(
            event_item=integers(events, "item"),
            event_label=integers(events, "label").astype(np.float64),
            event_time=integers(events, "time"),
            event=integers(samples, "event"),
            label=integers(samples, "label").astype(np.float64),
            split=integers(samples, "split"),
            history_start=integers(samples, "history_start"),
            history_end=integers(samples, "history_end"),
        )

    @property
    def base_rate(self) -> float:
        """Share of likes among the training samples."""
        return float(self.label[self.split == _TRAIN].mean())

    def training_events(self) -> NDArray[np.bool_]:
        """Which events belong to the training period, [E].

        Targets of training samples, and the events that are no target at all (each user's first)
        up to the time of the last training target.
        """
        targets = self.event[self.split == _TRAIN]
        is_target = np.zeros(self.event_item.size, dtype=bool)
        is_target[self.event] = True
        known: NDArray[np.bool_] = ~is_target & (self.event_time <= self.event_time[targets].max())
        known[targets] = True
        return known


def last_labels(log: Log, samples: ArrayLike, num_last: int = 10) -> FloatArray:
    """Logit of the mean of the last `num_last` labels in each sample's history.

    The mean is smoothed with one row at the training base rate, so a short history leans towards
    it and an empty one is equal to it.

    Args:
        log: Events and samples.
        samples: Sample ids, [N].
        num_last: Labels to average.

    Returns:
        Logits, float64 [N].
    """
    ids = np.asarray(samples, dtype=np.int64)
    stop = log.history_end[ids]
    start = np.maximum(log.history_start[ids], stop - num_last)
    total = np.r_[0.0, np.cumsum(log.event_label)]
    likes, rows = total[stop] - total[start], (stop - start).astype(np.float64)
    return metrics.logit(_smoothed(likes, rows, _LAST_PRIOR_ROWS, log.base_rate))


def similar_labels(log: Log, retrieval: Path, samples: ArrayLike, num_similar: int) -> FloatArray:
    """Logit of the mean label of the `num_similar` events most similar to each sample's target.

    Smoothed as `last_labels`, with which it is equal where a history is no longer than that.

    Args:
        log: Events and samples.
        retrieval: Stage 3's folder, of at least as many retrieved events.
        samples: Sample ids in ascending order, [N].
        num_similar: Labels to average.

    Returns:
        Logits, float64 [N].

    Raises:
        TableError: Stage 3's table does not have the promised columns, or lacks a sample.
    """
    ids, path = np.asarray(samples, dtype=np.int64), retrieval / "retrieved.parquet"
    lists = pq.read_table(path, filters=pc.field("sample").isin(ids))
    lists = check_table(lists, RETRIEVED, str(path))
    if not np.array_equal(lists["sample"].to_numpy(), ids):
        raise TableError(f"{path}: a sample is missing or twice; run `rellax retrieval` again")
    row, event = Ranked(lists).best(num_similar)
    likes, rows = np.zeros(ids.size), np.zeros(ids.size)
    np.add.at(likes, row, log.event_label[event])
    np.add.at(rows, row, 1.0)
    return metrics.logit(_smoothed(likes, rows, _LAST_PRIOR_ROWS, log.base_rate))


@dataclass(frozen=True)
class LogisticBaseline:
    """Logistic regression on item mean, user mean, popularity and user residual.

    Attributes:
        weights: One weight per standardised feature, in the order of `FEATURES`.
        intercept: Bias.
        num_rows: Training rows it was fitted on.
    """

    weights: FloatArray
    intercept: float
    num_rows: int
    _features: FloatArray
    _mean: FloatArray
    _scale: FloatArray

    @classmethod
    def fit(cls, log: Log) -> LogisticBaseline:
        """Fit on every training sample, each described by what came before it."""
        from sklearn.linear_model import LogisticRegression

        features = causal_features(log)
        train = log.split == _TRAIN
        mean = features[train].mean(axis=0)
        scale = np.maximum(features[train].std(axis=0), 1e-6)
        model = LogisticRegression(C=1.0, tol=1e-8, max_iter=1000)
        model.fit((features[train] - mean) / scale, log.label[train])
        return cls(
            weights=np.asarray(model.coef_[0], dtype=np.float64),
            intercept=float(model.intercept_[0]),
            num_rows=int(train.sum()),
            _features=features,
            _mean=mean,
            _scale=scale,
        )

    def logits(self, samples: ArrayLike) -> FloatArray:
        """Logits of samples by id, float64 [N]."""
        rows = self._features[np.asarray(samples, dtype=np.int64)]
        found: FloatArray = (rows - self._mean) / self._scale @ self.weights + self.intercept
        return found


def causal_features(log: Log) -> FloatArray:
    """Features of every sample from what precedes it, float64 [S, 4] in the order of `FEATURES`.

    Item mean and popularity (log of one plus the count) come from training events of the item
    strictly earlier in time. User mean and user residual (label minus the item mean at that
    moment) are averaged over the sample's own history range. All means are smoothed towards the
    training base rate, the residual towards zero.
    """
    base = log.base_rate
    likes_E, rows_E = _before_same_item(log)
    item_mean_E = _smoothed(likes_E, rows_E, _ITEM_PRIOR_ROWS, base)
    residual = np.r_[0.0, np.cumsum(log.event_label - item_mean_E)]
    total = np.r_[0.0, np.cumsum(log.event_label)]
    start, stop = log.history_start, log.history_end
    rows = (stop - start).astype(np.float64)
    return np.column_stack(
        [
            metrics.logit(item_mean_E[log.event]),
            metrics.logit(_smoothed(total[stop] - total[start], rows, _USER_PRIOR_ROWS, base)),
            np.log1p(rows_E[log.event]),
            _smoothed(residual[stop] - residual[start], rows, _USER_PRIOR_ROWS, 0.0),
        ]
    )


def _before_same_item(log: Log) -> tuple[FloatArray, FloatArray]:
    """Likes and count of training events of the same item strictly earlier in time, [E] each."""
    order = np.lexsort((log.event_time, log.event_item))
    item, time = log.event_item[order], log.event_time[order]
    known = log.training_events()[order].astype(np.float64)
    rows = np.r_[0.0, np.cumsum(known)]
    likes = np.r_[0.0, np.cumsum(known * log.event_label[order])]
    new_item = np.r_[True, item[1:] != item[:-1]]
    new_moment = new_item | np.r_[True, time[1:] != time[:-1]]
    item_start = np.flatnonzero(new_item)[np.cumsum(new_item) - 1]
    moment_start = np.flatnonzero(new_moment)[np.cumsum(new_moment) - 1]
    found_rows, found_likes = np.empty_like(known), np.empty_like(known)
    found_rows[order] = rows[moment_start] - rows[item_start]
    found_likes[order] = likes[moment_start] - likes[item_start]
    return found_likes, found_rows


def _smoothed(total: FloatArray, rows: FloatArray, prior_rows: float, prior: float) -> FloatArray:
    found: FloatArray = (total + prior_rows * prior) / (rows + prior_rows)
    return found
