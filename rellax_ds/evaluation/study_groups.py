"""Where a method helps and where it hurts: differences on groups of rows, by length of history.

Retrieval can only change a prompt where the history is longer than K, so an average over all rows
hides what it does. The groups are those of a run's report; the figures are a study's: means over
seeds, users resampled inside the group, differences paired.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rellax_ds.evaluation.findings import as_json
from rellax_ds.evaluation.groups import history_groups
from rellax_ds.evaluation.study_cells import Comparison, label_of, logits_of, reference_cell

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rellax_ds.evaluation.significance import Resampled
    from rellax_ds.evaluation.study_cells import Cell
    from rellax_ds.evaluation.study_runs import Scored

_MIN_USERS = 5


@dataclass(frozen=True)
class Group:
    """Test rows whose user had so many events before the target.

    Attributes:
        name: Such as `20 to 49`.
        masks: Which rows of a seed belong to it, [N] each.
        compared: Comparisons on its rows.
    """

    name: str
    masks: Mapping[int, Any]
    compared: Comparison

    def mean(
        self, name: object, logits: Mapping[int, Any], seeds: Sequence[int]
    ) -> Resampled | None:
        """A model's mean over seeds; None where a seed has fewer than five users or one class.

        Args:
            name: Of the model; what was computed for it is kept.
            logits: Its logits on all test rows, by seed.
            seeds: Seeds that count.
        """
        for seed in seeds:
            rows = self.compared.rows[seed]
            positives = int(rows.label.sum())
            if np.unique(rows.user).size < _MIN_USERS or not 0 < positives < rows.label.size:
                return None
        inside = {seed: logits[seed][self.masks[seed]] for seed in seeds}
        return self.compared.mean(name, inside, seeds)

    def size(self, seeds: Sequence[int]) -> dict[str, int]:
        """Rows and users over these seeds."""
        users = [self.compared.rows[seed].user for seed in seeds]
        return {
            "rows": sum(int(self.masks[seed].sum()) for seed in seeds),
            "users": int(np.unique(np.concatenate(users)).size),
        }


def groups_of(cells: Mapping[Cell, Mapping[int, Scored]], resamples: int) -> list[Group]:
    """The groups of history length, over the test rows of these runs.

    Args:
        cells: Runs by cell and seed.
        resamples: Resamples of users behind each interval.
    """
    tests = {one.seed: one.test for by_seed in cells.values() for one in by_seed.values()}
    found = []
    for place, (name, _) in enumerate(history_groups(np.zeros(0, dtype=np.int64))):
        masks = {seed: history_groups(rows.history)[place][1] for seed, rows in tests.items()}
        rows_of = {seed: rows.where(masks[seed]) for seed, rows in tests.items()}
        found.append(Group(name, masks, Comparison(rows_of, resamples)))
    return found


def by_history(
    groups: Sequence[Group], cells: Mapping[Cell, Mapping[int, Scored]], reference: str
) -> list[dict[str, Any]]:
    """Test AUC of every cell and its difference to the reference's, by group.

    Args:
        groups: From `groups_of`.
        cells: Runs by cell and seed.
        reference: Method that the others are compared with.

    Returns:
        One entry per group and cell: `group`, `rows` and `users` over all seeds of the cell,
        `label`, `method`, `history_length`, `shots`, `auc` and `minus_reference`, None where a
        group has fewer than five users or one class only.
    """
    found = []
    for group in groups:
        for cell, by_seed in cells.items():
            method, length, shots, varied = cell
            seeds = sorted(by_seed)
            ours, gap = group.mean(cell, logits_of(by_seed), seeds), None
            other = reference_cell(cell, cells, reference)
            if ours and other is not None and other != cell and set(seeds) <= set(cells[other]):
                theirs = group.mean(other, logits_of(cells[other]), seeds)
                gap = theirs and as_json(ours.minus(theirs).estimates())["auc"]
            found.append(
                {
                    "group": group.name,
                    "label": label_of(method, varied),
                    "method": method,
                    "history_length": length,
                    "shots": shots,
                    **group.size(seeds),
                    "auc": ours and as_json(ours.estimates())["auc"],
                    "minus_reference": gap,
                }
            )
    return found
