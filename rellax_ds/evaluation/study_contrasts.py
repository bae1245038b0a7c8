"""What each part of a method is worth: paired differences of two methods that differ in it alone.

A study names the pairs; every pair is compared wherever both methods were run with the same K,
shots and further axes, on the seeds both have, over all test rows and by length of history.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rellax_ds.evaluation.findings import as_json
from rellax_ds.evaluation.study_cells import label_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rellax_ds.evaluation.study_cells import Cell, Comparison
    from rellax_ds.evaluation.study_groups import Group
    from rellax_ds.evaluation.study_runs import Scored

_METRICS = ("auc", "log_loss", "gauc")


def contrasts(
    pairs: Sequence[Mapping[str, str]],
    compared: Comparison,
    groups: Sequence[Group],
    cells: Mapping[Cell, Mapping[int, Scored]],
) -> list[dict[str, Any]]:
    """Every pair at every cell that both sides have with a seed in common.

    Args:
        pairs: `part`, `method` and `without` of each, as the study names them.
        compared: Comparisons on all test rows.
        groups: The same on groups of rows.
        cells: Runs by cell and seed.

    Returns:
        One entry per pair and cell: `part`, `method` and `without` (labels), `history_length`,
        `shots`, `seeds`, the differences `auc`, `log_loss` and `gauc` (None where undefined), and
        `groups`, with `group`, `rows`, `users` and the difference `auc` of each.
    """
    found = []
    for pair in pairs:
        for cell, ours in cells.items():
            method, length, shots, varied = cell
            other: Cell = (pair["without"], length, shots, varied)
            theirs = cells.get(other, {})
            seeds = sorted(set(ours) & set(theirs))
            if method != pair["method"] or not seeds:
                continue
            gap = compared.mean(cell, _logits(ours), seeds).minus(
                compared.mean(other, _logits(theirs), seeds)
            )
            estimates = as_json(gap.estimates())
            found.append(
                {
                    "part": pair["part"],
                    "method": label_of(method, varied),
                    "without": label_of(pair["without"], varied),
                    "history_length": length,
                    "shots": shots,
                    "seeds": seeds,
                    **{name: estimates[name] for name in _METRICS},
                    "groups": [
                        _of_group(group, (cell, ours), (other, theirs), seeds) for group in groups
                    ],
                }
            )
    return found


def _of_group(
    group: Group,
    ours: tuple[Cell, Mapping[int, Scored]],
    theirs: tuple[Cell, Mapping[int, Scored]],
    seeds: Sequence[int],
) -> dict[str, Any]:
    one, two = group.mean(*ours, seeds), group.mean(*theirs, seeds)
    gap = as_json(one.minus(two).estimates())["auc"] if one and two else None
    return {"group": group.name, **group.size(seeds), "auc": gap}


def _logits(by_seed: Mapping[int, Scored]) -> dict[int, Any]:
    return {seed: one.test.logit for seed, one in by_seed.items()}
