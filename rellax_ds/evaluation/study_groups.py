"""Where a method helps and where it hurts: differences on groups of rows, by length of history.

Retrieval can only change a prompt where the history is longer than K, so an average over all rows
hides what it does. The groups are those of a run's report; the figures are a study's: means over
seeds, users resampled inside the group, differences paired.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from rellax_ds.evaluation.findings import as_json
from rellax_ds.evaluation.groups import history_groups
from rellax_ds.evaluation.study_cells import Comparison, label_of, reference_cell

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rellax_ds.evaluation.study_cells import Cell
    from rellax_ds.evaluation.study_runs import Scored

_MIN_USERS = 5


def by_history(
    cells: Mapping[Cell, Mapping[int, Scored]], reference: str, resamples: int
) -> list[dict[str, Any]]:
    """Test AUC of every cell and its difference to the reference's, in groups of history length.

    Args:
        cells: Runs by cell and seed.
        reference: Method that the others are compared with.
        resamples: Resamples of users behind each interval.

    Returns:
        One entry per group and cell: `group`, `rows` and `users` over all seeds of the cell,
        `label`, `method`, `history_length`, `shots`, `auc` and `minus_reference`, None where a
        group has fewer than five users or one class only.
    """
    names = [name for name, _ in history_groups(np.zeros(0, dtype=np.int64))]
    found = []
    for place, name in enumerate(names):
        masks = {
            one.seed: history_groups(one.test.history)[place][1]
            for by_seed in cells.values()
            for one in by_seed.values()
        }
        compared = Comparison(
            {
                one.seed: one.test.where(masks[one.seed])
                for by_seed in cells.values()
                for one in by_seed.values()
            },
            resamples,
        )
        for cell, by_seed in cells.items():
            method, length, shots, varied = cell
            seeds = sorted(by_seed)
            entry = {
                "group": name,
                "label": label_of(method, varied),
                "method": method,
                "history_length": length,
                "shots": shots,
                "rows": sum(int(masks[seed].sum()) for seed in seeds),
                "users": _users(compared, seeds),
                "auc": None,
                "minus_reference": None,
            }
            if _defined(compared, seeds):
                logits = _logits(by_seed, masks)
                ours = compared.mean(cell, logits, seeds)
                entry["auc"] = as_json(ours.estimates())["auc"]
                other = reference_cell(cell, cells, reference)
                if other is not None and other != cell and set(seeds) <= set(cells[other]):
                    theirs = compared.mean(other, _logits(cells[other], masks), seeds)
                    entry["minus_reference"] = as_json(ours.minus(theirs).estimates())["auc"]
            found.append(entry)
    return found


def _logits(by_seed: Mapping[int, Scored], masks: Mapping[int, Any]) -> dict[int, Any]:
    return {seed: one.test.logit[masks[seed]] for seed, one in by_seed.items()}


def _users(compared: Comparison, seeds: list[int]) -> int:
    users = [compared.rows[seed].user for seed in seeds]
    return int(np.unique(np.concatenate(users)).size)


def _defined(compared: Comparison, seeds: list[int]) -> bool:
    """Whether every seed has enough users and both classes."""
    for seed in seeds:
        rows = compared.rows[seed]
        positives = int(rows.label.sum())
        if np.unique(rows.user).size < _MIN_USERS or not 0 < positives < rows.label.size:
            return False
    return True
