from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from rellax_ds.crm.export import INSTANCES, ITEM_TABLE, LOGITS, export, load
from rellax_ds.crm.features import Features, build_history
from rellax_ds.crm.fit import fit, score
from rellax_ds.errors import ArtifactError

if TYPE_CHECKING:
    from pathlib import Path

    from rellax_ds.config import CRMConfig
    from rellax_ds.crm.features import Interactions


@pytest.fixture(scope="module")
def exported(
    sparse_log: Interactions, config: CRMConfig, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    directory = tmp_path_factory.mktemp("crm")
    changes = {"holdout": 0.2, "max_epochs": 2, "weight_decay": 0.1}
    config = config.model_copy(update=changes)
    export(
        fit(sparse_log, build_history(sparse_log, config, None), config, 1), sparse_log, directory
    )
    return directory


def test_load_written_model_reproduces_logits_and_instances(
    exported: Path, sparse_log: Interactions, config: CRMConfig
) -> None:
    model, vocabulary = load(exported)
    features = Features(sparse_log, build_history(sparse_log, config, None), vocabulary)
    logits, instances = np.load(exported / LOGITS), np.load(exported / INSTANCES)
    assert logits.shape == (sparse_log.num_samples,)
    assert instances.shape == (sparse_log.num_samples, config.hidden_dim)
    for rows, logit, instance in score(model, features, np.arange(sparse_log.num_samples)):
        np.testing.assert_array_equal(logits[rows], logit)
        np.testing.assert_array_equal(instances[rows], instance)


def test_item_table_unseen_items_and_padding_are_zero_rows(
    exported: Path, sparse_log: Interactions, config: CRMConfig
) -> None:
    table = np.load(exported / ITEM_TABLE)
    _, vocabulary = load(exported)
    assert table.shape == (sparse_log.items.num_rows + 1, config.embedding_dim)
    assert table.dtype == np.float32
    zero = np.flatnonzero(~table.any(axis=1)).tolist()
    assert zero == [0, *(item + 1 for item in vocabulary.unseen_items)]
    assert len(zero) > 1


def test_metrics_held_out_tail_is_counted_apart(exported: Path, sparse_log: Interactions) -> None:
    document = json.loads((exported / "metrics.json").read_text())
    train = sparse_log.split_rows("train")
    rows = document["rows"]
    assert rows["train"] + rows["holdout"] == len(train)
    assert document["holdout_start"] == train[rows["train"]]
    for name in ("train", "holdout", "valid", "test"):
        assert set(document[name]) == {"auc", "log_loss", "accuracy"}
    assert document["valid"]["auc"] == max(record["valid_auc"] for record in document["epochs"])
    instances = np.load(exported / INSTANCES)[train[: rows["train"]]]
    assert document["dead_units"] == int((np.ptp(instances, axis=0) == 0).sum())


def test_load_weights_of_another_network_raises(exported: Path, tmp_path: Path) -> None:
    weights = load_file(exported / "model.safetensors")
    weights["logit.weight"] = weights["logit.weight"][:, :-1].contiguous()
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "model.json").write_bytes((exported / "model.json").read_bytes())
    with pytest.raises(ArtifactError, match=r"do not fit model\.json .*rerun `rellax crm`"):
        load(tmp_path)
