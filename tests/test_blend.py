"""The blend of recommender and LLM: against a library's optimiser, and at its limits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize

from rellax_ds.blend import PRIOR_SD, fit_blend


def rows(seed: int, num: int, of_llm: float) -> tuple[Any, Any, Any]:
    """Labels drawn from 0.8 c + of_llm m - 0.3."""
    rng = np.random.default_rng(seed)
    crm, margins = 1.3 * rng.normal(size=num), 2 * rng.normal(size=num)
    chance = 1 / (1 + np.exp(-(0.8 * crm + of_llm * margins - 0.3)))
    return (rng.random(num) < chance).astype(np.float64), crm, margins


@pytest.mark.parametrize(("seed", "num", "of_llm"), [(0, 40, 0.5), (5, 300, 0.2), (2, 300, -0.6)])
def test_fit_is_the_penalised_optimum_with_a_weight_that_is_not_negative(
    seed: int, num: int, of_llm: float
) -> None:
    labels, crm, margins = rows(seed, num, of_llm)
    start = np.array([1.0, 0.0, 0.0])

    def loss(at: Any) -> float:
        logits = at[0] * crm + at[1] * margins + at[2]
        fit = np.logaddexp(0, logits) - labels * logits
        return float(fit.sum() + (((at - start) / PRIOR_SD) ** 2).sum() / 2)

    bounds = [(None, None), (0, None), (None, None)]
    wanted = minimize(loss, start, method="L-BFGS-B", bounds=bounds, tol=1e-14).x
    found = fit_blend(labels, crm, margins)
    assert found == pytest.approx(wanted, abs=2e-4)
    assert (found[1] > 0) == (of_llm > 0)


def test_many_rows_recover_what_they_were_drawn_from() -> None:
    assert fit_blend(*rows(3, 200_000, 0.5)) == pytest.approx((0.8, 0.5, -0.3), abs=0.02)


def test_rows_of_one_label_and_logits_that_separate_keep_the_fit_finite() -> None:
    crm, margins = np.array([-900.0, 5.0, 800.0]), np.array([-700.0, 3.0, 600.0])
    for labels in (np.zeros(3), np.ones(3), np.array([0.0, 0.0, 1.0])):
        assert np.isfinite(fit_blend(labels, crm, margins)).all()
