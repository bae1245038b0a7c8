"""Out-of-fold features: what a recommender that never saw a training row says about it.

A recommender fits its own training rows better than new ones, so an LLM tuned on those rows learns
to trust it more than it deserves on the day it meets a new one. Here K further recommenders are
trained, each without one fold, and a training row's logit, instance embedding and item vectors come
from the one without it (stacking, Wolpert 1992). Two ways of cutting:

- `user`: whole users, so a row is scored as that of an unknown user, and no history of the others
  holds it;
- `time`: K + 1 blocks in order of time, each scored by a recommender of the blocks before it; the
  first block has none and lends no rows to the LLM.

Two trainings need not put the same meaning on the same unit. All start from the same weights, and a
fold's vectors are brought to the full recommender's axes by a linear map (ridge regression) fitted
on the valid rows, which neither was trained on; its item vectors by one fitted on the items both
have seen. Logits need no map. What a fold's recommender learns does not depend on the labels of its
fold, but two things come from the full one, which has seen them: how many epochs to train, and the
axes, by the coefficients of the maps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from rellax_ds import metrics, runtime
from rellax_ds.crm.features import build_vocabulary
from rellax_ds.crm.fit import fit_rows, score
from rellax_ds.errors import TableError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rellax_ds.config import CRMConfig
    from rellax_ds.crm.features import History, IntArray, Interactions
    from rellax_ds.crm.fit import Fitted

    FloatArray = NDArray[np.float32]

FULL = -1
"""Fold of a row that the full recommender scores."""

_RIDGE = 1e-3  # of the mean variance: the map is used where directions hardly vary, too


@dataclass(frozen=True)
class OutOfFold:
    """What K recommenders say about the rows they did not see.

    Attributes:
        fold: int8 [num_samples], the fold of each sample; `FULL` for valid, test and, cut by time,
            the first block.
        rows: Sample ids that have a fold, ascending, [n].
        logits: float32 [n].
        instances: float32 [n, H], in the full recommender's axes.
        item_tables: float32 [K, num_items + 1, E], in the full recommender's axes; items that a
            fold's recommender has not seen are zero.
        facts: For `metrics.json`: rows, AUC of every fold, and how well the maps fit.
    """

    fold: NDArray[np.int8]
    rows: IntArray
    logits: FloatArray
    instances: FloatArray
    item_tables: FloatArray
    facts: dict[str, Any]


def assign_folds(log: Interactions, rows: IntArray, config: CRMConfig, seed: int) -> IntArray:
    """Fold of each training row, [n]; `FULL` where no recommender can be trained without it.

    Args:
        log: Users of the samples.
        rows: Sample ids of the training split in time order, [n].
        config: The recipe's section; its `folds` is K.
        seed: Draws the users of a fold.

    Raises:
        TableError: There are fewer users or rows than folds.
    """
    if config.fold_by == "time":
        blocks = config.folds + 1
        if len(rows) < blocks:
            raise TableError(f"crm.folds {config.folds}: train holds {len(rows)} rows only")
        return np.arange(len(rows)) * blocks // len(rows) - 1
    users, of_row, counts = np.unique(
        log.sample_user[rows], return_inverse=True, return_counts=True
    )
    if len(users) < config.folds:
        raise TableError(f"crm.folds {config.folds}: train holds {len(users)} users only")
    order = np.random.default_rng(runtime.stable_seed(seed, "crm", "folds")).permutation(len(users))
    before = np.cumsum(counts[order]) - counts[order]
    fold = np.empty(len(users), np.int64)
    fold[order] = before * config.folds // len(rows)
    return fold[of_row]


def out_of_fold(
    log: Interactions, history: History, config: CRMConfig, seed: int, full: Fitted
) -> OutOfFold:
    """Train K recommenders, each without one fold, for as many epochs as the full one's best.

    Raises:
        TableError: Too few rows or users, or a fold whose recommender would have no row.
        ConfigError: A loss is not finite.
    """
    train, valid = log.split_rows("train"), log.split_rows("valid")
    fold_of = assign_folds(log, train, config, seed)
    fold = np.full(log.num_samples, FULL, np.int8)
    fold[train] = fold_of
    rows = train[fold_of != FULL]
    width = full.model.architecture.instance_dim
    logits = np.empty(len(rows), np.float32)
    instances = np.empty((len(rows), width), np.float32)
    table = full.model.item_table().numpy()
    tables = np.zeros((config.folds, *table.shape), np.float32)
    reference = _instances(full, valid)
    facts: list[dict[str, Any]] = []
    for number in range(config.folds):
        kept = train[fold_of < number] if config.fold_by == "time" else train[fold_of != number]
        if not len(kept):
            raise TableError(f"crm.folds: nothing is left to train on without fold {number}")
        unseen = build_vocabulary(log, history, kept, config).unseen_items
        vocabulary = replace(full.vocabulary, unseen_items=unseen)
        runtime.logger.info("crm: fold %d of %d, %d rows", number + 1, config.folds, len(kept))
        fitted = fit_rows(log, history, config, seed, kept, vocabulary, full.best_epoch)
        to_full, fit_h = _map(_instances(fitted, valid), reference)
        places = np.flatnonzero(fold[rows] == number)
        for ids, logit, instance in score(fitted.model, fitted.features, rows[places]):
            part = np.searchsorted(rows, ids)
            logits[part], instances[part] = logit, instance @ to_full[:-1] + to_full[-1]
        own = fitted.model.item_table().numpy()
        both = np.flatnonzero(own.any(axis=1) & table.any(axis=1))
        to_table, fit_items = _map(own[both], table[both])
        seen = np.flatnonzero(own.any(axis=1))
        tables[number, seen] = own[seen] @ to_table[:-1] + to_table[-1]
        facts.append(
            {
                "rows": len(places),
                "trained_on": len(kept),
                "auc": _auc(log.label[rows[places]], logits[places]),
                "instance_fit": fit_h,
                "item_fit": fit_items,
            }
        )
    document = {
        "by": config.fold_by,
        "rows": len(rows),
        "auc": _auc(log.label[rows], logits),
        "log_loss": metrics.log_loss(log.label[rows], logits),
        "folds": facts,
    }
    return OutOfFold(fold, rows, logits, instances, tables, document)


def _instances(fitted: Fitted, rows: IntArray) -> FloatArray:
    parts = [instance for _, _, instance in score(fitted.model, fitted.features, rows)]
    return np.concatenate(parts)


def _map(source: FloatArray, target: FloatArray) -> tuple[FloatArray, float]:
    """Ridge regression of `target` [n, b] on `source` [n, a] with a constant.

    Returns:
        The map [a + 1, b], its last row the constant, and the share of variance it explains.
    """
    x, y = source.astype(np.float64), target.astype(np.float64)
    x_mean, y_mean = x.mean(axis=0), y.mean(axis=0)
    x, y = x - x_mean, y - y_mean
    gram = x.T @ x
    penalty = _RIDGE * max(float(np.trace(gram)) / len(gram), 1e-12)
    weights = np.linalg.solve(gram + penalty * np.eye(len(gram)), x.T @ y)
    total = float((y**2).sum())
    left = float(((y - x @ weights) ** 2).sum())
    found = np.vstack([weights, y_mean - x_mean @ weights])
    return found.astype(np.float32), 1.0 - left / total if total else 1.0


def _auc(labels: NDArray[np.int8], logits: FloatArray) -> float | None:
    """AUC, or None where one class is absent."""
    return metrics.auc(labels, logits) if 0 < labels.sum() < len(labels) else None
