"""What the recommender leaves behind: item table, instance embeddings, logits, metrics and itself.

Everything is computed once, in eval mode, over every sample, and written beside the weights; the
LLM's loop reads arrays and never runs the recommender. Arrays are written through memory maps, so
memory follows the batch. The saved model holds its vocabulary, and `load` rebuilds a recommender
that repeats the written logits.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.torch import load_file, save

from rellax_ds import metrics, runtime
from rellax_ds.artifacts import write_bytes, write_json
from rellax_ds.crm.features import Vocabulary
from rellax_ds.crm.fit import score
from rellax_ds.crm.kinds import build
from rellax_ds.crm.network import Architecture
from rellax_ds.errors import ArtifactError
from rellax_ds.schema import SPLITS

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from rellax_ds.crm.features import IntArray, Interactions
    from rellax_ds.crm.fit import Fitted
    from rellax_ds.crm.folds import OutOfFold
    from rellax_ds.crm.network import Recommender

ITEM_TABLE = "item_table.npy"
"""float32 [num_items + 1, E]; item i is row i + 1, unseen items and row 0 are zero."""

INSTANCES = "instances.npy"
"""float32 [num_samples, H], h of every sample, not standardised."""

LOGITS = "logits.npy"
"""float32 [num_samples], log-odds of a like."""

FOLDS = "folds.npy"
"""int8 [num_samples], the fold whose recommender, trained without the sample, gave its h and logit;
-1 where it was the full one. Absent without folds, as is the next."""

FOLD_TABLES = "fold_tables.npy"
"""float32 [K, num_items + 1, E], item table of every fold's recommender, in the axes of the full
one's."""


def export(
    fitted: Fitted, log: Interactions, directory: Path, unseen: OutOfFold | None = None
) -> dict[str, Any]:
    """Score every sample and write the recommender's artefact.

    Args:
        fitted: The trained recommender.
        log: The interactions it was trained on.
        directory: Folder to write into.
        unseen: What recommenders that did not see them say about training rows; it takes the place
            of what the full one says, which remains in `metrics.json` only.

    Returns:
        The document of `metrics.json`: rows, AUC, log loss and accuracy of each set of rows, the
        training curve, the first held-out sample id and the number of constant units of h.
    """
    model, width = fitted.model, fitted.model.architecture.instance_dim
    np.save(directory / ITEM_TABLE, model.item_table().numpy())
    instances = np.lib.format.open_memmap(
        directory / INSTANCES, mode="w+", dtype=np.float32, shape=(log.num_samples, width)
    )
    logits = np.empty(log.num_samples, np.float32)
    with runtime.Progress("crm export", log.num_samples, "samples") as progress:
        for rows, logit, instance in score(model, fitted.features, np.arange(log.num_samples)):
            logits[rows], instances[rows] = logit, instance
            progress.advance(len(rows))
    document = _metrics(fitted, log, logits)
    document["dead_units"] = _constant_columns(instances, fitted.train_rows)
    if unseen is not None:
        logits[unseen.rows], instances[unseen.rows] = unseen.logits, unseen.instances
        np.save(directory / FOLDS, unseen.fold)
        np.save(directory / FOLD_TABLES, unseen.item_tables)
        document["out_of_fold"] = unseen.facts
    instances.flush()
    np.save(directory / LOGITS, logits)
    _save_model(fitted, directory)
    write_json(directory / "metrics.json", document)
    return document


def load(directory: Path) -> tuple[Recommender, Vocabulary]:
    """Rebuild the recommender that `export` wrote, in eval mode.

    Raises:
        ArtifactError: The kind is unknown, or the weights do not fit the described network.
    """
    document = json.loads((directory / "model.json").read_text(encoding="utf-8"))
    model = build(Architecture(**document["architecture"]))
    try:
        model.load_state_dict(load_file(directory / "model.safetensors"))
    except RuntimeError as error:
        raise ArtifactError(
            f"{directory / 'model.safetensors'}: the weights do not fit model.json "
            f"({str(error).splitlines()[-1].strip()}); rerun `rellax crm`"
        ) from None
    return model.eval(), Vocabulary.parse(document["vocabulary"])


def _save_model(fitted: Fitted, directory: Path) -> None:
    write_bytes(directory / "model.safetensors", save(fitted.model.state_dict()))
    write_json(
        directory / "model.json",
        {
            "architecture": asdict(fitted.model.architecture),
            "vocabulary": fitted.vocabulary.document(),
        },
    )


def _metrics(fitted: Fitted, log: Interactions, logits: NDArray[np.float32]) -> dict[str, Any]:
    rows = {split: log.split_rows(split) for split in SPLITS}
    rows["train"] = fitted.train_rows
    if fitted.holdout_start is not None:
        train = log.split_rows("train")
        rows["holdout"] = train[train >= fitted.holdout_start]
    scores = {name: _score(log.label[ids], logits[ids]) for name, ids in rows.items()}
    return {
        "rows": {name: len(ids) for name, ids in rows.items()},
        **scores,
        "epochs": fitted.epochs,
        "holdout_start": fitted.holdout_start,
        "num_features": fitted.vocabulary.num_features,
        "num_parameters": sum(p.numel() for p in fitted.model.parameters()),
        "num_unseen_items": len(fitted.vocabulary.unseen_items),
    }


def _score(labels: NDArray[np.int8], logits: NDArray[np.float32]) -> dict[str, float]:
    return {
        "auc": metrics.auc(labels, logits),
        "log_loss": metrics.log_loss(labels, logits),
        "accuracy": metrics.accuracy(labels, logits),
    }


def _constant_columns(instances: NDArray[np.float32], rows: IntArray) -> int:
    low = np.full(instances.shape[1], np.inf)
    high = -low
    for part in np.array_split(rows, 1 + len(rows) // 65536):
        chunk = instances[part]
        low, high = np.minimum(low, chunk.min(0)), np.maximum(high, chunk.max(0))
    return int((low == high).sum())
