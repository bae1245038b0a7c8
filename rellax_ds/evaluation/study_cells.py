"""Cells of a study (method, K, shots, what else varies), and metrics of theirs to compare.

The draws of users are shared by everything that is compared, so differences are paired.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from rellax_ds.evaluation.findings import as_json
from rellax_ds.evaluation.significance import Resampled, UserBootstrap
from rellax_ds.study import ALONE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from rellax_ds.evaluation.study_runs import Rows, Scored

    Cell = tuple[str, int, int, tuple[tuple[str, Any], ...]]
    Model = tuple[object, Mapping[int, Any]]  # a name to keep results by, and logits by seed

RESAMPLES = 1000


@dataclass
class Comparison:
    """Resampled metrics of runs, seed by seed, under draws shared by all that is compared.

    Attributes:
        rows: Test rows by seed; runs of one seed have the same.
        resamples: Resamples of users.
    """

    rows: dict[int, Rows]
    resamples: int = RESAMPLES
    _bootstraps: dict[tuple[int, ...], UserBootstrap] = field(default_factory=dict)
    _found: dict[tuple[object, ...], Resampled] = field(default_factory=dict)

    @classmethod
    def of(cls, scored: Sequence[Scored], resamples: int = RESAMPLES) -> Comparison:
        """A comparison of these runs."""
        return cls({one.seed: one.test for one in scored}, resamples)

    def mean(self, name: object, logits: Mapping[int, Any], seeds: Sequence[int]) -> Resampled:
        """The mean over seeds of a model's metrics.

        Args:
            name: Of the model; what was computed for it is kept.
            logits: Its logits on the test rows, by seed.
            seeds: Seeds that count.
        """
        drawn = tuple(sorted(seeds))
        return Resampled.mean([self._of_seed(name, logits[seed], seed, drawn) for seed in drawn])

    def num_users(self, seeds: Sequence[int]) -> int:
        """Users that are drawn from."""
        return self._bootstrap(tuple(sorted(seeds))).num_users

    def _of_seed(self, name: object, logits: Any, seed: int, drawn: tuple[int, ...]) -> Resampled:
        key = (name, seed, drawn)
        if key not in self._found:
            rows = self.rows[seed]
            bootstrap = self._bootstrap(drawn).on(rows.user)
            self._found[key] = bootstrap.resample(rows.label, logits)
        return self._found[key]

    def _bootstrap(self, drawn: tuple[int, ...]) -> UserBootstrap:
        if drawn not in self._bootstraps:
            users = np.concatenate([self.rows[seed].user for seed in drawn])
            self._bootstraps[drawn] = UserBootstrap(users, self.resamples, 0)
        return self._bootstraps[drawn]


def group(scored: Sequence[Scored], key: Callable[[Scored], Any]) -> dict[Any, dict[int, Scored]]:
    """Runs by key, then by seed; the first of several with one key and seed counts."""
    groups: dict[Any, dict[int, Scored]] = {}
    for one in scored:
        groups.setdefault(key(one), {}).setdefault(one.seed, one)
    return groups


def with_llm_alone(cells: Mapping[Cell, dict[int, Scored]]) -> dict[Cell, dict[int, Scored]]:
    """The cells, and beside each blended one its LLM without the recommender's logit.

    A blended logit is a times the recommender's plus w times the LLM's plus b (`counts["blend"]`).
    Where w is 0 nothing of the LLM is in it, and the seed is left out.
    """
    found: dict[Cell, dict[int, Scored]] = {}
    for cell, by_seed in cells.items():
        found[cell] = dict(by_seed)
        alone = {
            seed: replace(one, test=_unblended(one.test, blend), valid=_unblended(one.valid, blend))
            for seed, one in by_seed.items()
            if (blend := one.counts.get("blend")) and blend[1] > 0
        }
        if alone:
            found[cell[0] + ALONE, *cell[1:]] = alone
    return found


def _unblended(rows: Rows, blend: Sequence[float]) -> Rows:
    of_crm, of_llm, offset = blend
    return replace(rows, logit=(rows.logit - of_crm * rows.crm - offset) / of_llm)


def logits_of(by_seed: Mapping[int, Scored]) -> dict[int, Any]:
    """Logits of runs on their test rows, by seed."""
    return {seed: one.test.logit for seed, one in by_seed.items()}


def difference(compared: Comparison, ours: Model, theirs: Model) -> dict[str, Any] | None:
    """The paired difference of two models on the `seeds` both have; None without one."""
    seeds = sorted(set(ours[1]) & set(theirs[1]))
    if not seeds:
        return None
    found = compared.mean(*ours, seeds).minus(compared.mean(*theirs, seeds))
    return {"seeds": seeds, **as_json(found.estimates())}


def order(row: Mapping[str, Any]) -> tuple[int, int, float]:
    """Key that sorts rows of a table by K and shots, the best AUC first."""
    return row["history_length"], row["shots"], -row["auc"]["value"]


def label_of(method: str, varied: Sequence[tuple[str, Any]]) -> str:
    """A method's name with what varies beside K, shots and seed."""
    return ", ".join([method, *(f"{key} {value}" for key, value in varied)])


def reference_cell(cell: Cell, cells: Mapping[Cell, Any], reference: str) -> Cell | None:
    """The reference method's cell of the same K and shots: with the same further values if there
    is one, else with none.
    """
    _, length, shots, varied = cell
    candidates = ((reference, length, shots, varied), (reference, length, shots, ()))
    return next((found for found in candidates if found in cells), None)
