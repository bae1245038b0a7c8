"""The figures of a report are the figures of its inputs, and its sentences are true of them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from rellax_ds import metrics
from rellax_ds.config import parse_recipe
from rellax_ds.errors import ArtifactError, TableError
from rellax_ds.evaluation import report
from rellax_ds.evaluation.findings import find

if TYPE_CHECKING:
    from rellax_ds.evaluation.findings import Evidence


def result(found: dict[str, Any], model: str, split: str = "test") -> dict[str, Any]:
    (row,) = [r for r in found["results"] if r["model"] == model and r["split"] == split]
    return row


def sentences(evidence: Evidence) -> str:
    said = report.statements(find(evidence))
    return " ".join(said["result"] + said["protocol"])


def with_recipe(evidence: Evidence, **sections: dict[str, Any]) -> Evidence:
    document = evidence.recipe.model_dump(mode="json")
    for name, changes in sections.items():
        document[name] = {**document[name], **changes}
    return replace(evidence, recipe=parse_recipe(document, "test"))


def test_results_are_the_metrics_of_every_model_on_the_same_rows(evidence: Evidence) -> None:
    found = find(evidence)
    json.dumps(found, allow_nan=False)
    for split, number in (("valid", 1), ("test", 2)):
        ids = evidence.rows_of(number)
        ours = evidence.logits[np.isin(evidence.scored, ids)]
        crm, labels, users = evidence.crm_logits[ids], evidence.log.label[ids], evidence.user[ids]
        for model, logits in (("rellax", ours), ("crm", crm), ("ensemble", (ours + crm) / 2)):
            row = result(found, model, split)
            assert (row["n"], row["users"]) == (ids.size, np.unique(users).size)
            assert row["auc"]["value"] == metrics.auc(labels, logits)
            assert row["log_loss"]["value"] == metrics.log_loss(labels, logits)
            assert row["accuracy"]["value"] == metrics.accuracy(labels, logits)
            assert row["gauc"]["value"] == metrics.gauc(users, labels, logits).value
            assert row["ece"] == metrics.ece(labels, logits)
            assert row["auc"]["low"] < row["auc"]["value"] < row["auc"]["high"]
        assert {r["model"] for r in found["results"]} == set(found["models"])
    assert find(evidence) == found


def test_differences_have_their_own_interval_and_sign(evidence: Evidence) -> None:
    found = find(evidence)
    (gap,) = [
        d
        for d in found["differences"]
        if (d["model"], d["minus"], d["split"]) == ("rellax", "crm", "test")
    ]
    expected = result(found, "rellax")["auc"]["value"] - result(found, "crm")["auc"]["value"]
    assert gap["auc"]["value"] == pytest.approx(expected)
    assert gap["auc"]["high"] < 0  # planted
    assert f"{evidence.model_name} is behind" in sentences(evidence)


def test_full_split_counts_every_test_row(evidence: Evidence) -> None:
    found = find(evidence)
    test = np.flatnonzero(evidence.log.split == 2)
    assert {row["n"] for row in found["full_split"]} == {test.size}
    crm = next(row for row in found["full_split"] if row["model"] == "crm")
    assert crm["auc"]["value"] == metrics.auc(evidence.log.label[test], evidence.crm_logits[test])
    assert result(found, "crm")["n"] < test.size


def test_groups_hold_every_scored_test_row_once_by_what_is_known_of_it(evidence: Evidence) -> None:
    found = find(evidence)["groups"]
    test, log = evidence.rows_of(2), evidence.log
    assert [group["by"] for group in found] == ["user"] * 2 + ["history"] * 4 + ["target"] * 4
    for by in ("user", "history", "target"):
        assert sum(group["n"] for group in found if group["by"] == by) == test.size
    count = {(group["by"], group["group"]): group["n"] for group in found}
    known = set(evidence.user[log.split == 0].tolist())
    assert count["user", "cold"] == sum(evidence.user[n] not in known for n in test)
    length = (log.history_end - log.history_start)[test]
    assert count["history", "20 to 49"] == ((length >= 20) & (length < 50)).sum()
    item = log.event_item[log.event]
    rows = [int((item[log.split == 0] == item[n]).sum()) for n in test]
    assert count["target", "0"] == rows.count(0)
    assert count["target", "100 and more"] == sum(n >= 100 for n in rows)


def test_crm_sentence_tells_the_full_training_set(evidence: Evidence) -> None:
    num_train = int((evidence.log.split == 0).sum())
    said = sentences(evidence)
    assert f"The CRM saw the full training set: it was trained on all {num_train:,}" in said
    assert "100 shots" in said
    assert "the CRM had been trained on every one of them" in said


def test_crm_sentence_counts_held_out_rows_and_shots(evidence: Evidence) -> None:
    train = np.flatnonzero(evidence.log.split == 0)
    start = int(train[1000])
    held = replace(
        evidence, crm={"holdout_start": start}, shots=np.r_[train[990:1030], train[990:1030]]
    )
    said = sentences(held)
    assert "full training set" not in said
    assert f"the earliest 1,000 of {train.size:,} training rows" in said
    assert f"the latest {train.size - 1000:,} were held out" in said
    assert "40 shots" in said
    assert "80 prompts" in said
    assert "the CRM had been trained on 10 of them, 30 were new to it" in said
    only_held = with_recipe(
        replace(held, shots=train[1000:1030]),
        crm={"holdout": 0.2},
        shards={"train_from": "holdout"},
    )
    said = sentences(only_held)
    assert "drawn from the rows held out from the CRM; the CRM had been trained on none" in said


def test_crm_sentence_tells_of_out_of_fold_features_and_shots_new_to_them(
    evidence: Evidence,
) -> None:
    unseen = {"by": "user", "auc": 0.7421, "folds": [{}, {}, {}]}
    said = sentences(replace(evidence, crm={"holdout_start": None, "out_of_fold": unseen}))
    assert "3 further recommenders, trained without the row's fold of users" in said
    assert "their AUC on the rows they did not see is .742" in said
    assert "the CRM had been trained on none of them" in said
    assert "The CRM saw the full training set" in said


def test_statements_name_what_is_not_published(evidence: Evidence) -> None:
    assert "not part of the published method" not in sentences(evidence)
    other = with_recipe(evidence, model={"interaction_scope": "question", "residual": "crm"})
    said = sentences(replace(other, blend=[0.9, 0.1234, -0.2]))
    assert "M(h) acts on the target's question only" in said
    assert "0.900 times the CRM's logit, plus 0.123 times the LLM's, plus -0.200" in said


def test_statements_follow_the_recipe(evidence: Evidence) -> None:
    plain = sentences(evidence)
    assert "dequantised from a 4-bit file" in plain
    assert "Histories stream" in plain
    assert "One constant was subtracted" in plain
    assert "Valid figures took part in the choice" in plain
    assert "Zero-shot (step 0, soft tokens untrained) AUC on the valid rows is .611" in plain
    assert "best on valid at step 3, has .722" in plain
    other = with_recipe(
        evidence,
        data={"freeze_history": True},
        model={"backbone": "other", "spa": False, "interaction": "identity"},
        train={"history_weight": 0.3, "centre_logit": False},
    )
    said = sentences(other)
    assert other.model_name == "LoRA"
    assert "ReLLaX" not in said
    assert "4-bit" not in said
    assert "One constant" not in said
    assert "frozen histories" in said
    assert "not part of the published method" in said
    assert "feeds nothing of it to the LLM" in said


def test_without_valid_rows_nothing_is_called_test(evidence: Evidence) -> None:
    test = evidence.log.split[evidence.scored] == 2
    found = find(
        replace(evidence, scored=evidence.scored[test], logits=evidence.logits[test], training=[])
    )
    assert found["test_label"] == "held-out"
    said = report.statements(found)
    assert "are not called test figures" in said["result"][-1]
    page = report.render(found | {"statements": said})
    assert "held-out AUC" in page
    assert "test AUC" not in page


def test_predictions_without_test_rows_or_with_nan_are_refused(evidence: Evidence) -> None:
    valid = evidence.log.split[evidence.scored] == 1
    with pytest.raises(ArtifactError, match="no test row"):
        find(replace(evidence, scored=evidence.scored[valid], logits=evidence.logits[valid]))
    broken = evidence.logits.copy()
    broken[-1] = np.nan
    with pytest.raises(TableError, match="not finite"):
        find(replace(evidence, logits=broken))


def test_few_users_are_cautioned_about_and_many_are_not(evidence: Evidence) -> None:
    found = find(evidence)
    for users, warned in ((29, True), (30, False)):
        for facts in found["rows"].values():
            facts["users"] = users
        said = " ".join(report.statements(found)["protocol"])
        assert ("tends to be too narrow" in said) == warned
