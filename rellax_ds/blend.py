"""The weights of recommender and LLM in one logit, fitted on scored rows.

Three numbers, a penalised logistic regression: near the start (recommender alone) unless the rows
speak against it, and never a negative weight for the LLM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    FloatArray = npt.NDArray[np.float64]

START = (1.0, 0.0, 0.0)
"""Blend before anything is known: the recommender alone."""

PRIOR_SD = (0.5, 0.5, 1.0)
"""Standard deviations of the Gaussian prior around the start, for a, w and b."""

_STEPS = 50


def fit_blend(
    labels: FloatArray, crm_logits: FloatArray, margins: FloatArray
) -> tuple[float, float, float]:
    """The most probable a, w >= 0, b of a * crm_logits + w * margins + b.

    Args:
        labels: 0 or 1, [N].
        crm_logits: Of the recommender, [N].
        margins: The LLM's logits, [N].
    """
    inputs = np.column_stack([crm_logits, margins, np.ones_like(margins)])
    found = _newton(inputs, labels, np.ones(3, dtype=bool))
    if found[1] < 0:
        found = _newton(inputs, labels, np.array([True, False, True]))
    of_crm, of_llm, offset = found.tolist()
    return of_crm, of_llm, offset


def _newton(inputs: FloatArray, labels: FloatArray, free: npt.NDArray[np.bool_]) -> FloatArray:
    """Newton's method with halved steps, from the start; what is not free stays there."""
    precision = 1 / np.square(PRIOR_SD)
    start = np.asarray(START, dtype=np.float64)

    def loss(at: FloatArray) -> float:
        logits = inputs @ at
        fit = np.logaddexp(0, logits) - labels * logits
        return float(fit.sum() + 0.5 * (precision * np.square(at - start)).sum())

    place, now = start, loss(start)
    for _ in range(_STEPS):
        chance = 0.5 * (1 + np.tanh(0.5 * (inputs @ place)))
        gradient = inputs.T @ (chance - labels) + precision * (place - start)
        curvature = (inputs.T * (chance * (1 - chance))) @ inputs + np.diag(precision)
        step = np.zeros_like(place)
        step[free] = np.linalg.solve(curvature[np.ix_(free, free)], gradient[free])
        size = 1.0
        while loss(place - size * step) > now and size > 1e-6:
            size /= 2
        place = place - size * step
        before, now = now, loss(place)
        if before - now < 1e-12 * max(1.0, abs(now)):
            break
    return place
