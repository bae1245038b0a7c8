"""Stage 4, crm: tables (and retrieval for SIM) to a trained recommender and its cached outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rellax_ds.crm.export import export
from rellax_ds.crm.features import Interactions, build_history
from rellax_ds.crm.fit import fit
from rellax_ds.crm.folds import out_of_fold
from rellax_ds.stages.stage import Stage, StageContext
from rellax_ds.tables import read_tables

if TYPE_CHECKING:
    from rellax_ds.config import Recipe


def _inputs(recipe: Recipe) -> tuple[str, ...]:
    return ("tables", "retrieval") if recipe.crm.kind == "sim" else ("tables",)


def build(context: StageContext) -> dict[str, Any]:
    """Train the recommender and write its item table, instance embeddings, logits and metrics."""
    recipe = context.recipe
    log = Interactions.of(read_tables(context.input("tables")))
    retrieval = context.input("retrieval") if recipe.crm.kind == "sim" else None
    history = build_history(log, recipe.crm, retrieval)
    fitted = fit(log, history, recipe.crm, recipe.seed)
    unseen = None
    if recipe.crm.folds:
        unseen = out_of_fold(log, history, recipe.crm, recipe.seed, fitted)
    document = export(fitted, log, context.directory, unseen)
    counts = {"folds": recipe.crm.folds} if recipe.crm.folds else {}
    return counts | {
        "samples": log.num_samples,
        "trained_on": document["rows"]["train"],
        "epochs": len(document["epochs"]),
        "valid_auc": document["valid"]["auc"],
        "test_auc": document["test"]["auc"],
    }


STAGE = Stage(name="crm", version=2, sections=("crm", "seed"), inputs=_inputs, build=build)
