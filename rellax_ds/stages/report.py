"""Stage 8, report: scores, manifests and baselines to a page, the same as Markdown, and JSON."""

from __future__ import annotations

from typing import Any

from rellax_ds.config import Recipe
from rellax_ds.evaluation import findings, report
from rellax_ds.stages.stage import Stage, StageContext


def build(context: StageContext) -> dict[str, Any]:
    """Compute the findings and write them as a page and as JSON."""
    evidence = findings.Evidence.read(context.recipe, context.work)
    found = findings.find(evidence)
    report.write(found, context.directory)
    ours = next(row for row in found["results"] if row["model"] == "rellax")
    return {"n": ours["n"], "users": ours["users"], "auc": ours["auc"]}


STAGE = Stage(
    name="report",
    version=2,
    # The page prints the whole recipe, so every section is part of it.
    sections=tuple(Recipe.model_fields),
    inputs=lambda _recipe: findings.INPUTS,
    build=build,
)
