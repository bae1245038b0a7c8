"""The findings of a study: every method on the same rows, means over seeds, paired differences.

A figure of a cell (method, K, shots) is the mean over its seeds. Its interval resamples users, all
seeds at once: a resample draws users from those of all seeds' rows, every seed's metric is computed
under those draws, and their mean is one replicate. Differences are taken seed by seed inside each
resample, so what two methods share cancels. The spread between seeds stands beside the interval,
which does not hold it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from rellax_ds import metrics
from rellax_ds.config import CRM_NAMES
from rellax_ds.evaluation.findings import as_json
from rellax_ds.evaluation.significance import METRICS, point_values
from rellax_ds.evaluation.study_blends import blends
from rellax_ds.evaluation.study_cells import (
    RESAMPLES,
    Comparison,
    difference,
    group,
    label_of,
    logits_of,
    order,
    reference_cell,
    with_llm_alone,
)
from rellax_ds.evaluation.study_contrasts import contrasts, history_labels
from rellax_ds.evaluation.study_curves import curves
from rellax_ds.evaluation.study_groups import by_history, groups_of
from rellax_ds.study import ALONE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rellax_ds.evaluation.study_cells import Cell
    from rellax_ds.evaluation.study_runs import Rows, Scored, StudyRuns


def find(study: StudyRuns, resamples: int = RESAMPLES) -> dict[str, Any]:
    """All figures of a study as one JSON-like document.

    Args:
        study: Its runs.
        resamples: Resamples of users behind each interval.

    Raises:
        TableError: A metric is not defined on the scored rows.
    """
    compared = Comparison.of(study.scored, resamples)
    reference = study.plan["reference"]
    scored = group(study.scored, lambda one: one.run.cell)
    cells = with_llm_alone(scored)
    results = [_result(compared, cell, cells, reference, study) for cell in cells]
    results.sort(key=order)
    recommenders = _recommenders(study.scored, compared, cells, reference)
    groups = groups_of(cells, resamples)
    first = study.scored[0]
    return {
        "name": study.plan["name"],
        "description": study.plan["description"],
        "reference": reference,
        "resamples": resamples,
        "runs": len(study.runs),
        "missing": study.missing,
        "seeds": sorted(compared.rows),
        "rows": {str(seed): _describe(rows) for seed, rows in sorted(compared.rows.items())},
        "users": compared.num_users(list(compared.rows)),
        "results": results,
        "recommenders": recommenders,
        "best_recommender": max(recommenders, key=lambda row: row["valid_auc"])["label"],
        "contrasts": contrasts(study.plan["contrasts"], compared, groups, cells),
        "groups": by_history(groups, cells, reference),
        "curves": curves(cells, compared),
        "blends": blends(scored, compared, reference),
        "history_labels": history_labels(study.scored, compared, groups),
        "heterogeneity": _heterogeneity(study.scored),
        "notes": _notes(study.scored),
        "test_reads": _test_reads(study),
        "versions": first.versions,
        "commits": sorted({one.commit for one in study.scored if one.commit}),
    }


def _result(
    compared: Comparison,
    cell: Cell,
    cells: dict[Cell, dict[int, Scored]],
    reference: str,
    study: StudyRuns,
) -> dict[str, Any]:
    method, length, shots, varied = cell
    by_seed = cells[cell]
    seeds = sorted(by_seed)
    found = compared.mean(cell, logits_of(by_seed), seeds)
    other = reference_cell(cell, cells, reference)
    gap = None
    if other is not None and other != cell:
        gap = difference(compared, (cell, logits_of(by_seed)), (other, logits_of(cells[other])))
    own_crm = {seed: one.test.crm for seed, one in by_seed.items()}
    first = by_seed[seeds[0]]
    return {
        "method": method,
        "label": label_of(method, varied),
        "derived": method.endswith(ALONE),
        "axes": dict(varied),
        "history_length": length,
        "shots": shots,
        "seeds": seeds,
        "missing_seeds": _missing_seeds(cell, study),
        **as_json(found.estimates()),
        "spread": _spread(compared, logits_of(by_seed)),
        "by_seed": [
            {
                "seed": seed,
                "run": by_seed[seed].run.name,
                **_figures(compared.rows[seed], by_seed[seed].test.logit),
            }
            for seed in seeds
        ],
        "valid_auc": _valid_auc(by_seed),
        "minus_reference": gap,
        "minus_crm": difference(compared, (cell, logits_of(by_seed)), ((cell, "crm"), own_crm)),
        "crm": {
            "kind": first.run.recipe.crm.kind,
            "used": first.reads_crm,
            "rows": first.crm_rows,
            "train_rows": first.train_rows,
        },
        "trained_parameters": first.counts["trained_parameters"],
        "steps": first.counts["steps"],
        "seconds": {
            name: round(float(np.mean([one.seconds[name] for one in by_seed.values()])), 6)
            for name in first.seconds
        },
    }


def _recommenders(
    scored: Sequence[Scored],
    compared: Comparison,
    cells: dict[Cell, dict[int, Scored]],
    reference: str,
) -> list[dict[str, Any]]:
    """The recommenders alone, on the rows the LLMs have scored."""
    found = []
    for (kind, varied), by_seed in group(scored, lambda one: one.crm).items():
        logits = {seed: one.test.crm for seed, one in by_seed.items()}
        first = next(iter(by_seed.values()))
        main = next((cell for cell in cells if cell[0] == reference), None)
        gap = None
        if main is not None:
            gap = difference(
                compared, (("crm", kind, varied), logits), (main, logits_of(cells[main]))
            )
        found.append(
            {
                "kind": kind,
                "label": label_of(f"CRM alone ({CRM_NAMES[kind]})", varied),
                "axes": dict(varied),
                "seeds": sorted(by_seed),
                **as_json(
                    compared.mean(("crm", kind, varied), logits, sorted(by_seed)).estimates()
                ),
                "spread": _spread(compared, logits),
                "valid_auc": float(np.mean([one.crm_valid_auc for one in by_seed.values()])),
                "rows": first.crm_rows,
                "train_rows": first.train_rows,
                "minus_reference": gap,
                "reference_cell": None if main is None else [main[1], main[2]],
            }
        )
    return found


def _figures(rows: Rows, logits: Any) -> dict[str, float | None]:
    """Every metric on one seed's rows."""
    return point_values(rows.user, rows.label, logits)


def _spread(compared: Comparison, logits: dict[int, Any]) -> dict[str, dict[str, float]] | None:
    """Standard deviation (of a sample) and range of each metric over seeds; None for one seed."""
    if len(logits) < 2:
        return None
    figures = [_figures(compared.rows[seed], found) for seed, found in sorted(logits.items())]
    spread = {}
    for name in METRICS:
        values = [value for value in (found[name] for found in figures) if value is not None]
        if len(values) == len(figures):
            spread[name] = {
                "std": float(np.std(values, ddof=1)),
                "min": min(values),
                "max": max(values),
            }
    return spread


def _valid_auc(by_seed: dict[int, Scored]) -> float:
    rows = [one.valid for one in by_seed.values()]
    return float(np.mean([metrics.auc(part.label, part.logit) for part in rows]))


def _missing_seeds(cell: Cell, study: StudyRuns) -> list[int]:
    """Seeds that are planned for a cell and not finished."""
    names = set(study.missing)
    return sorted(run.recipe.seed for run in study.runs if run.name in names and run.cell == cell)


def _describe(rows: Rows) -> dict[str, Any]:
    return {
        "n": int(rows.sample.size),
        "users": int(np.unique(rows.user).size),
        "base_rate": float(rows.label.mean()),
    }


def _heterogeneity(scored: Sequence[Scored]) -> dict[str, dict[str, float]]:
    """Mean distinct genres by history and K; the first run's figure counts where runs differ."""
    merged: dict[str, dict[str, float]] = {}
    for one in scored:
        for kind, by_k in one.heterogeneity.items():
            for k, value in by_k.items():
                merged.setdefault(kind, {}).setdefault(k, value)
    return merged


def _test_reads(study: StudyRuns) -> dict[str, Any]:
    """How often test rows were scored in the study's folder, and when for what is shown."""
    shown = {one.key for one in study.scored}
    times = sorted(line["time"] for line in study.reads if line["key"] in shown)
    return {
        "scorings": len({line["key"] for line in study.reads}),
        "shown": len(times),
        "first": times[0] if times else None,
        "last": times[-1] if times else None,
    }


def _notes(scored: Sequence[Scored]) -> dict[str, Any]:
    """What a reader must know of the recipes to judge the figures."""
    recipes = [one.run.recipe for one in scored]
    return {
        "backbones": sorted({recipe.model.backbone for recipe in recipes}),
        "history_weights": sorted({recipe.train.history_weight for recipe in recipes}),
        "centred": sorted({recipe.train.centre_logit for recipe in recipes}),
        "residuals": sorted({recipe.model.residual for recipe in recipes} - {"none"}),
        "frozen_histories": sorted({recipe.data.freeze_history for recipe in recipes}),
        "datasets": sorted({recipe.data.dataset for recipe in recipes}),
    }
