"""What one part is worth: paired differences of two models that differ in it alone.

A study names pairs of methods; every pair is compared wherever both were run with the same K, shots
and further axes, on the seeds both have, over all test rows and by length of history. What
retrieval does to the labels a history shows is compared without any LLM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rellax_ds.evaluation.baselines import Log, last_labels, similar_labels
from rellax_ds.evaluation.findings import as_json
from rellax_ds.evaluation.study_cells import label_of, logits_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rellax_ds.evaluation.study_cells import Cell, Comparison, Model
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
            models = (cell, logits_of(ours)), (other, logits_of(theirs))
            found.append(
                {
                    "part": pair["part"],
                    "method": label_of(method, varied),
                    "without": label_of(pair["without"], varied),
                    "history_length": length,
                    "shots": shots,
                    "seeds": seeds,
                    **_difference(*models, compared, groups, seeds),
                }
            )
    return found


def history_labels(
    scored: Sequence[Scored], compared: Comparison, groups: Sequence[Group]
) -> list[dict[str, Any]]:
    """What the labels of K events say by themselves: the most similar K against the last K.

    Args:
        scored: The runs; the first of a seed gives its tables and its retrieved lists.
        compared: Comparisons on all test rows.
        groups: The same on groups of rows.

    Returns:
        One entry per K that some run has and every list holds: `history_length`, `seeds`, the
        estimates `recent` and `similar` of the test AUC, and the difference as in `contrasts`.
    """
    first = {one.seed: one for one in reversed(scored)}
    logs = {seed: Log.read(one.work.stage_dir("tables")) for seed, one in first.items()}
    kept = min(one.run.recipe.retrieval.num_retrieved for one in first.values())
    seeds, found = sorted(first), []
    for length in sorted({one.run.recipe.shards.history_length for one in scored}):
        if length > kept:
            continue
        recent, similar = {}, {}
        for seed, one in first.items():
            rows, retrieval = one.test.sample, one.work.stage_dir("retrieval")
            recent[seed] = last_labels(logs[seed], rows, length)
            similar[seed] = similar_labels(logs[seed], retrieval, rows, length)
        models = (("similar", length), similar), (("recent", length), recent)
        values = [as_json(compared.mean(*model, seeds).estimates())["auc"] for model in models]
        found.append(
            {
                "history_length": length,
                "seeds": seeds,
                "recent": values[1],
                "similar": values[0],
                **_difference(*models, compared, groups, seeds),
            }
        )
    return found


def _difference(
    ours: Model,
    theirs: Model,
    compared: Comparison,
    groups: Sequence[Group],
    seeds: Sequence[int],
) -> dict[str, Any]:
    gap = compared.mean(*ours, seeds).minus(compared.mean(*theirs, seeds))
    estimates = as_json(gap.estimates())
    inside = []
    for group in groups:
        one, two = group.mean(*ours, seeds), group.mean(*theirs, seeds)
        auc = as_json(one.minus(two).estimates())["auc"] if one and two else None
        inside.append({"group": group.name, **group.size(seeds), "auc": auc})
    return {**{name: estimates[name] for name in _METRICS}, "groups": inside}
