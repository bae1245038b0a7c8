"""Findings and pages of a study whose runs are made up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from made_studies import commit, forget, make_study

from rellax_ds import metrics
from rellax_ds.artifacts import WorkDir
from rellax_ds.blend import fit_blend
from rellax_ds.errors import ArtifactError, TableError
from rellax_ds.evaluation import study_page, test_reads
from rellax_ds.evaluation.baselines import Log, last_labels
from rellax_ds.evaluation.significance import UserBootstrap
from rellax_ds.evaluation.study import find
from rellax_ds.evaluation.study_runs import StudyRuns
from rellax_ds.study import Run

Made = tuple[Path, list[Run]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_study(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def found(made: Made) -> dict[str, Any]:
    return find(StudyRuns.read(made[0]), 200)


@pytest.fixture
def small(tmp_path: Path) -> Made:
    """A study of its own that a test may damage: one cell of each method, two seeds."""
    axes = {"shards.history_length": [5], "seed": [1, 2]}
    return make_study(tmp_path, grids=[{"methods": ["plain.yaml", "full.yaml"], "axes": axes}])


def row(found: dict[str, Any], label: str, length: int = 10, shots: int = 100) -> dict[str, Any]:
    (one,) = (
        r
        for r in found["results"]
        if (r["label"], r["history_length"], r["shots"]) == (label, length, shots)
    )
    return dict(one)


def test_rows(root: Path, run: str) -> pa.Table:
    path = root / "runs" / run / "7_predict" / "predictions.parquet"
    return pq.read_table(path, filters=[("split", "=", 2)])


test_rows.__test__ = False  # type: ignore[attr-defined]


def test_figures_are_means_over_seeds_with_their_spread(made: Made, found: dict[str, Any]) -> None:
    ours = row(found, "full")
    aucs = []
    for seed in (1, 2, 3):
        table = test_rows(made[0], f"full-K10-n100-s{seed}")
        aucs.append(metrics.auc(table["label"].to_numpy(), table["logit"].to_numpy()))
    assert ours["seeds"] == [1, 2, 3]
    assert ours["auc"]["value"] == pytest.approx(np.mean(aucs))
    assert ours["auc"]["low"] < ours["auc"]["value"] < ours["auc"]["high"]
    assert ours["spread"]["auc"]["std"] == pytest.approx(np.std(aucs, ddof=1))
    assert [one["auc"] for one in ours["by_seed"]] == pytest.approx(aucs)


def test_differences_are_paired_with_the_reference_of_the_same_k_and_shots(
    found: dict[str, Any],
) -> None:
    ours, theirs = row(found, "full"), row(found, "plain")
    gap = ours["minus_reference"]["auc"]
    assert gap["value"] == pytest.approx(ours["auc"]["value"] - theirs["auc"]["value"])
    # Pairing pays: the interval of the difference is narrower than either model's own.
    assert gap["high"] - gap["low"] < ours["auc"]["high"] - ours["auc"]["low"]
    assert gap["low"] > 0
    assert theirs["minus_reference"] is None
    varied = row(found, "full, crm.kind sim")
    assert varied["minus_reference"]["seeds"] == varied["seeds"] == [1, 2]


def test_recommenders_stand_on_the_same_rows_and_the_best_is_chosen_on_valid(
    made: Made, found: dict[str, Any]
) -> None:
    by_label = {r["label"]: r for r in found["recommenders"]}
    assert set(by_label) == {"CRM alone (DIN)", "CRM alone (SIM)"}
    assert found["best_recommender"] == "CRM alone (DIN)"
    aucs = []
    for seed in (1, 2, 3):
        table = test_rows(made[0], f"full-K10-n100-s{seed}")
        work = WorkDir(made[0] / "runs" / f"full-K10-n100-s{seed}")
        logits = np.load(work.stage_dir("crm") / "logits.npy")[table["sample"].to_numpy()]
        aucs.append(metrics.auc(table["label"].to_numpy(), logits))
    assert by_label["CRM alone (DIN)"]["auc"]["value"] == pytest.approx(np.mean(aucs))
    minus = row(found, "full")["minus_crm"]["auc"]["value"]
    assert minus == pytest.approx(row(found, "full")["auc"]["value"] - np.mean(aucs))


def test_pages_say_what_the_recommender_saw_and_hold_every_figure(
    found: dict[str, Any], tmp_path: Path
) -> None:
    study_page.write(found, tmp_path)
    document = json.loads((tmp_path / "study.json").read_text())
    trained = document["recommenders"][0]["rows"]
    for name in ("study.md", "study.html"):
        text = (tmp_path / name).read_text()
        assert f"{trained:,} (full train)" in text
        assert "full training set" in text
        for one in document["results"]:
            assert f"{one['auc']['value']:.3f}".removeprefix("0") in text
    lines = (tmp_path / "study.md").read_text().partition("## ")[0].splitlines()
    (plain,) = (line for line in lines if line.startswith("| plain | 5 | 50 | 1, 2, 3 |"))
    assert plain.endswith("| \N{EN DASH} |")
    html = (tmp_path / "study.html").read_text()
    assert html.count("<svg") == 9
    assert "http" not in html.replace("http-equiv", "")


def test_pages_are_the_same_for_the_same_runs(made: Made, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
        study_page.write(find(StudyRuns.read(made[0]), 50), folder)
    for name in ("study.json", "study.md", "study.html"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_missing_run_is_named_and_its_seed_left_out(small: Made) -> None:
    root, _ = small
    forget(root, "full-K5-n800-s2")
    found = find(StudyRuns.read(root), 50)
    ours = row(found, "full", 5, 800)
    assert (ours["seeds"], ours["missing_seeds"], ours["spread"]) == ([1], [2], None)
    assert ours["minus_reference"]["seeds"] == [1]
    assert found["missing"] == ["full-K5-n800-s2"]
    assert any("full-K5-n800-s2" in line for line in study_page.statements(found))
    assert "1 (missing: 2)" in study_page.markdown(found | {"statements": []})


def change_predictions(root: Path, run: str, change: Any) -> None:
    work = WorkDir(root / "runs" / run)
    table = pq.read_table(work.stage_dir("predict") / "predictions.parquet")
    changed = change(table)
    commit(work, "predict", lambda folder: pq.write_table(changed, folder / "predictions.parquet"))


def test_runs_of_one_seed_on_other_rows_are_refused(small: Made) -> None:
    change_predictions(small[0], "full-K5-n800-s1", lambda table: table.slice(1))
    with pytest.raises(TableError, match=r"full-K5-n800-s1 .*same rows"):
        StudyRuns.read(small[0])


def test_score_that_is_not_finite_is_refused(small: Made) -> None:
    def poison(table: pa.Table) -> pa.Table:
        bad = pc.if_else(
            pc.equal(table["sample"], table["sample"][3]), float("nan"), table["logit"]
        )
        return table.set_column(5, "logit", bad.cast(pa.float32()))

    change_predictions(small[0], "full-K5-n800-s2", poison)
    with pytest.raises(TableError, match="not finite"):
        StudyRuns.read(small[0])


def test_study_without_a_finished_run_names_the_command(small: Made) -> None:
    forget(small[0], *(run.name for run in small[1]))
    with pytest.raises(ArtifactError, match="rellax study"):
        StudyRuns.read(small[0])


def test_bootstrap_on_other_rows_uses_the_same_draws_of_users() -> None:
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(20), 8)
    labels, logits = rng.integers(0, 2, users.size), rng.normal(size=users.size)
    whole = UserBootstrap(users, 100, 0)
    part = np.flatnonzero(users % 3 == 0)
    found = whole.on(users[part]).resample(labels[part], logits[part])
    for draw in (0, 57):
        weight = whole.weights[draw][users[part]]
        rows = np.repeat(part, weight.astype(int))
        names = np.repeat(np.arange(part.size), weight.astype(int))
        copies = users[rows] * 1000 + [list(names[:n]).count(names[n]) for n in range(names.size)]
        assert found.replicates["auc"][draw] == pytest.approx(
            metrics.auc(labels[rows], logits[rows])
        )
        assert found.replicates["gauc"][draw] == pytest.approx(
            metrics.gauc(copies, labels[rows], logits[rows]).value
        )
    with pytest.raises(TableError, match="user 99"):
        whole.on([0, 99])


def test_groups_by_history_hold_every_row_once_and_pair_with_the_reference(
    made: Made, found: dict[str, Any]
) -> None:
    (of_cell,) = (
        [g for g in found["groups"] if (g["label"], g["history_length"], g["shots"]) == cell]
        for cell in [("full", 10, 100)]
    )
    tables = [test_rows(made[0], f"full-K10-n100-s{seed}") for seed in (1, 2, 3)]
    assert sum(group["rows"] for group in of_cell) == sum(table.num_rows for table in tables)
    defined = [group for group in of_cell if group["auc"]]
    assert defined
    samples = pq.read_table(made[0] / "runs/full-K10-n100-s1/1_tables/samples.parquet")
    length = pc.subtract(samples["history_end"], samples["history_start"]).to_numpy()
    low, high = {"below 20": (0, 20), "20 to 49": (20, 50)}.get(defined[0]["group"], (0, 0))
    aucs = []
    for table in tables:
        inside = length[table["sample"].to_numpy()]
        inside = (inside >= low) & (inside < high)
        aucs.append(
            metrics.auc(table["label"].to_numpy()[inside], table["logit"].to_numpy()[inside])
        )
    assert defined[0]["auc"]["value"] == pytest.approx(np.mean(aucs))
    theirs = {g["group"]: g for g in found["groups"] if g["label"] == "plain"}
    gap = defined[0]["minus_reference"]
    assert gap["low"] <= gap["value"] <= gap["high"]
    assert all(group["minus_reference"] is None for group in theirs.values())
    text = study_page.group_table(found)
    assert f"{defined[0]['group']} events" in text
    assert "| full | 10 | 100 |" in text


def test_contrast_is_the_paired_difference_wherever_both_sides_have_a_seed(
    found: dict[str, Any],
) -> None:
    by_cell = {(c["history_length"], c["shots"]): c for c in found["contrasts"]}
    assert set(by_cell) == {(5, 50), (5, 100), (10, 50), (10, 100)}  # none of the sim runs: no pair
    one, ours, theirs = by_cell[10, 100], row(found, "full"), row(found, "plain")
    assert (one["part"], one["seeds"]) == ("all of it", [1, 2, 3])
    for metric in ("auc", "log_loss", "gauc"):
        assert one[metric] == pytest.approx(ours["minus_reference"][metric])
    whole = ours["minus_reference"]["log_loss"]["value"]
    assert whole == pytest.approx(ours["log_loss"]["value"] - theirs["log_loss"]["value"])
    groups = {g["group"]: g for g in found["groups"] if g["label"] == "full"}
    scored = sum(rows["n"] for rows in found["rows"].values())
    assert sum(group["rows"] for group in one["groups"]) == scored
    assert any(group["auc"] for group in one["groups"])
    for group in one["groups"]:
        assert (group["auc"] is None) == (groups[group["group"]]["minus_reference"] is None)
    text = study_page.contrast_table(found)
    assert "| all of it | full | plain | 10 | 100 | 1, 2, 3 |" in text


def test_contrast_uses_the_seeds_both_sides_have(small: Made) -> None:
    root, _ = small
    forget(root, "plain-K5-n800-s2")
    (one,) = find(StudyRuns.read(root), 50)["contrasts"]
    assert one["seeds"] == [1]
    forget(root, "plain-K5-n800-s1")
    bare = find(StudyRuns.read(root), 50)
    assert bare["contrasts"] == []
    assert "What each part" not in study_page.markdown(bare | {"statements": []})
    assert "What each part" not in study_page.render(bare | {"statements": []})


def test_every_llm_is_blended_with_its_recommender_on_valid(
    made: Made, found: dict[str, Any]
) -> None:
    study = StudyRuns.read(made[0])
    runs = [one for one in study.scored if one.run.cell == ("plain", 10, 100, ())]
    aucs, weights = [], []
    for one in sorted(runs, key=lambda one: one.seed):
        valid = one.valid
        a, w, b = fit_blend(valid.label.astype(float), valid.crm, valid.logit)
        weights.append(w)
        aucs.append(metrics.auc(one.test.label, a * one.test.crm + w * one.test.logit + b))
    rows = {(r["label"], r["history_length"], r["shots"]): r for r in found["blends"]}
    plain, full = rows["plain", 10, 100], rows["full", 10, 100]
    assert plain["weights"] == pytest.approx(weights)
    assert plain["auc"]["value"] == pytest.approx(np.mean(aucs))
    crm = next(r for r in found["recommenders"] if r["kind"] == "din")["auc"]["value"]
    assert plain["minus_crm"]["value"] == pytest.approx(np.mean(aucs) - crm)
    assert plain["minus_reference"] is None
    gap = full["auc"]["value"] - plain["auc"]["value"]
    assert full["minus_reference"]["value"] == pytest.approx(gap)
    assert "| full, crm.kind sim | 10 | 100 | 1, 2 |" in study_page.blend_table(found)


def test_llm_of_a_blended_method_stands_beside_it(small: Made) -> None:
    root, _ = small
    study = StudyRuns.read(root)
    blend = {1: (0.9, 0.5, 0.1), 2: (1.0, 0.0, 0.2)}  # nothing of the LLM is in seed 2
    alone, scored = {}, []
    for one in study.scored:
        if one.run.method == "full":
            a, w, b = blend[one.seed]
            alone[one.seed] = metrics.auc(one.test.label, one.test.logit)
            parts = {
                name: replace(rows, logit=a * rows.crm + w * rows.logit + b)
                for name, rows in (("test", one.test), ("valid", one.valid))
            }
            one = replace(one, counts=one.counts | {"blend": [a, w, b]}, **parts)
        scored.append(one)
    found = find(replace(study, scored=scored), 50)
    ours = row(found, "full, LLM alone", 5, 800)
    assert ours["seeds"] == [1]
    assert ours["auc"]["value"] == pytest.approx(alone[1])
    assert ours["derived"]
    assert not row(found, "full", 5, 800)["derived"]
    blended = next(r for r in found["blends"] if r["label"] == "full")
    assert blended["weights"] == [0.5, 0.0]
    assert blended["auc"] == row(found, "full", 5, 800)["auc"]
    assert {r["label"] for r in found["blends"]} == {"plain", "full"}
    text = study_page.markdown(found | {"statements": []})
    assert (
        text.count("full, LLM alone") == text.partition("## Cost")[0].count("full, LLM alone") > 0
    )


def test_points_of_a_line_have_the_same_seeds(made: Made, found: dict[str, Any]) -> None:
    lines = {(line["label"], line["at"]): line for line in found["curves"]["history_length"]}
    line = lines["full", 100]
    assert (line["x"], line["seeds"]) == ([5, 10], [1, 2, 3])
    ours = [row(found, "full", length, 100)["auc"] for length in (5, 10)]
    assert line["auc"] == ours
    assert {(one["label"], one["at"]) for one in found["curves"]["shots"]} == {
        (label, length) for label in ("plain", "full") for length in (5, 10)
    }
    study = StudyRuns.read(made[0])
    lost = [one for one in study.scored if one.run.name != "full-K5-n100-s2"]
    again = find(replace(study, scored=lost), 200)["curves"]["history_length"]
    fewer = next(one for one in again if (one["label"], one["at"]) == ("full", 100))
    assert fewer["seeds"] == [1, 3]
    by_seed = row(found, "full", 10, 100)["by_seed"]
    aucs = [one["auc"] for one in by_seed if one["seed"] != 2]
    assert fewer["auc"][1]["value"] == pytest.approx(np.mean(aucs))


def test_labels_of_histories_are_compared_without_an_llm(made: Made, found: dict[str, Any]) -> None:
    root = made[0]
    assert [entry["history_length"] for entry in found["history_labels"]] == [5, 10]
    entry = found["history_labels"][0]
    expected = []
    for seed in (1, 2, 3):
        table = test_rows(root, f"full-K10-n100-s{seed}").sort_by("sample")
        work = WorkDir(root / "runs" / f"full-K10-n100-s{seed}")
        log = Log.read(work.stage_dir("tables"))
        logits = last_labels(log, table["sample"].to_numpy(), 5)
        expected.append(metrics.auc(table["label"].to_numpy(), logits))
    assert entry["recent"]["value"] == pytest.approx(np.mean(expected))
    gap = entry["similar"]["value"] - entry["recent"]["value"]
    assert entry["auc"]["value"] == pytest.approx(gap)
    assert entry["auc"]["value"] != 0
    assert any(group["auc"] for group in entry["groups"])
    assert "| 5 |" in study_page.label_table(found)


def test_history_longer_than_the_retrieved_lists_has_no_labels_to_compare(tmp_path: Path) -> None:
    axes = {"shards.history_length": [5, 40], "seed": [1, 2]}
    root, _ = make_study(tmp_path, grids=[{"methods": ["plain.yaml", "full.yaml"], "axes": axes}])
    found = find(StudyRuns.read(root), 50)
    assert [entry["history_length"] for entry in found["history_labels"]] == [5]
    assert study_page.draw(found).keys().isdisjoint({"labels"})


def test_runs_that_differ_in_the_seed_are_named_as_one(small: Made) -> None:
    root, _ = small
    forget(root, "full-K5-n800-s1", "full-K5-n800-s2")
    lines = study_page.statements(find(StudyRuns.read(root), 50))
    assert any("2 of 4 runs are not finished: full-K5-n800-s1/s2." in line for line in lines)


def test_scorings_of_models_that_are_not_shown_are_counted(small: Made) -> None:
    root, runs = small
    key = WorkDir(root / "runs" / runs[0].name).require("predict").key
    for name, of in (("predict-a", key), ("predict-b", "of a recipe that was dropped")):
        (root / "stages" / name).mkdir(parents=True)
        test_reads.record(root / "stages" / name, of, 10)
        test_reads.record(root / "stages" / name, of, 10)
    found = find(StudyRuns.read(root), 50)
    reads = found["test_reads"]
    assert (reads["scorings"], reads["shown"]) == (2, 1)
    assert reads["first"] == reads["last"]
    assert any("models that are not shown: 1" in line for line in study_page.statements(found))
