"""AUC over K and over shots: lines whose points are means over the same seeds.

A cell of a table has the seeds it has; on a line, a point with other seeds than its neighbours
would show the seeds and not the axis.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rellax_ds.evaluation.findings import as_json
from rellax_ds.evaluation.study_cells import label_of, logits_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rellax_ds.evaluation.study_cells import Cell, Comparison
    from rellax_ds.evaluation.study_runs import Scored


def curves(
    cells: Mapping[Cell, Mapping[int, Scored]], compared: Comparison
) -> dict[str, list[dict[str, Any]]]:
    """The lines over each axis, of whatever has two values of it and a seed that all points share.

    Args:
        cells: Runs by cell and seed.
        compared: Comparisons on all test rows.

    Returns:
        For `history_length` and `shots` a list of lines: `label`, `at` (the value of the other
        axis), `seeds`, and by increasing `x` the estimates `auc`.
    """
    return {
        "history_length": _lines(cells, compared, lambda cell: cell[1], lambda cell: cell[2]),
        "shots": _lines(cells, compared, lambda cell: cell[2], lambda cell: cell[1]),
    }


def _lines(
    cells: Mapping[Cell, Mapping[int, Scored]],
    compared: Comparison,
    axis: Callable[[Cell], int],
    other: Callable[[Cell], int],
) -> list[dict[str, Any]]:
    points: dict[tuple[str, int], list[Cell]] = {}
    for cell in sorted(cells, key=axis):
        points.setdefault((label_of(cell[0], cell[3]), other(cell)), []).append(cell)
    found = []
    for (label, at), line in points.items():
        seeds = sorted(set.intersection(*(set(cells[cell]) for cell in line)))
        if len(line) > 1 and seeds:
            means = [compared.mean(cell, logits_of(cells[cell]), seeds) for cell in line]
            found.append(
                {
                    "label": label,
                    "at": at,
                    "seeds": seeds,
                    "x": [axis(cell) for cell in line],
                    "auc": [as_json(mean.estimates())["auc"] for mean in means],
                }
            )
    return found
