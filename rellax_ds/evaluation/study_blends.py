"""Every LLM with its recommender's logit added: the honest baseline of a method that reads one.

A method that gains by reading a recommender has to gain over an LLM that does not, added to that
recommender afterwards. Weights are fitted on the valid rows, seed by seed, by the same fit that
`model.residual` uses, and are applied to the test rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rellax_ds.blend import fit_blend
from rellax_ds.evaluation.findings import as_json
from rellax_ds.evaluation.study_cells import difference, label_of, order, reference_cell

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rellax_ds.evaluation.study_cells import Cell, Comparison
    from rellax_ds.evaluation.study_runs import Scored


def blends(
    cells: Mapping[Cell, Mapping[int, Scored]], compared: Comparison, reference: str
) -> list[dict[str, Any]]:
    """Each cell with the recommender's logit added.

    Args:
        cells: Runs by cell and seed, as they were scored.
        compared: Comparisons on all test rows.
        reference: Method that the others are compared with, blended likewise.

    Returns:
        One entry per cell: `method`, `label`, `history_length`, `shots`, `seeds`, `weights` of the
        LLM by seed, the estimates `auc` and `log_loss`, and the differences of AUC `minus_crm` and
        `minus_reference` (None for the reference, or without a seed in common).
    """
    fits = {cell: {s: _fit(one) for s, one in runs.items()} for cell, runs in cells.items()}
    logits = {
        cell: {seed: _blended(one, fits[cell][seed]) for seed, one in runs.items()}
        for cell, runs in cells.items()
    }
    found = []
    for cell, runs in cells.items():
        method, length, shots, varied = cell
        seeds = sorted(runs)
        ours = ("blend", cell), logits[cell]
        crm = {seed: one.test.crm for seed, one in runs.items()}
        gap = None
        other = reference_cell(cell, cells, reference)
        if other is not None and other != cell:
            gap = difference(compared, ours, (("blend", other), logits[other]))
        mean = compared.mean(*ours, seeds)
        less_crm = mean.minus(compared.mean((cell, "crm"), crm, seeds))
        estimates = as_json(mean.estimates())
        found.append(
            {
                "method": method,
                "label": label_of(method, varied),
                "history_length": length,
                "shots": shots,
                "seeds": seeds,
                "weights": [fits[cell][seed][1] for seed in seeds],
                "auc": estimates["auc"],
                "log_loss": estimates["log_loss"],
                "minus_crm": as_json(less_crm.estimates())["auc"],
                "minus_reference": gap and gap["auc"],
            }
        )
    return sorted(found, key=order)


def _fit(one: Scored) -> tuple[float, float, float]:
    """a, w and b; those of the run itself where it was blended in training."""
    if one.counts.get("blend"):
        of_crm, of_llm, offset = one.counts["blend"]
        return of_crm, of_llm, offset
    rows = one.valid
    return fit_blend(rows.label.astype(float), rows.crm, rows.logit)


def _blended(one: Scored, fit: tuple[float, float, float]) -> Any:
    if one.counts.get("blend"):
        return one.test.logit
    return fit[0] * one.test.crm + fit[1] * one.test.logit + fit[2]
