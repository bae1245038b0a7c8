"""The quality benchmark on a study whose runs are made up."""

from __future__ import annotations

import re
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from made_studies import forget, make_study

from benchmarks import quality
from benchmarks.report import Report
from rellax_ds.evaluation import study_archive
from rellax_ds.evaluation.study_runs import StudyRuns
from rellax_ds.study import expand, load_study


def run(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, dict[str, float]]:
    arguments = ["quality", str(root), "--rellax", "full", "--lora", "plain"]
    monkeypatch.setattr(sys, "argv", arguments)
    status = quality.main()
    output = capsys.readouterr().out
    found = re.findall(r"^FIGURE (\w+) (\S+)$", output, re.MULTILINE)
    return status, output, {name: float(value) for name, value in found}


def test_quality_compares_what_valid_chose_and_fails_when_a_seed_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    axes = {"shards.history_length": [5, 10], "seed": [1, 2, 3]}
    grids = [{"methods": ["plain.yaml", "full.yaml"], "axes": axes}]
    root, _ = make_study(tmp_path, grids=grids)
    status, output, figures = run(root, monkeypatch, capsys)
    assert status == 0
    assert set(figures) >= {
        "rellax_test_auc",
        "best_crm_test_auc",
        "lora_recent_test_auc",
        "rellax_minus_crm_low",
        "rellax_minus_lora_low",
    }
    gap = figures["rellax_test_auc"] - figures["lora_recent_test_auc"]
    assert figures["rellax_minus_lora"] == pytest.approx(gap, abs=2e-6)
    assert 0 < figures["rellax_minus_lora_low"] < gap < figures["rellax_minus_lora_high"]
    assert "full training set" in output
    valid = {
        length: np.mean(
            [
                row["valid_auc"]
                for row in quality.find(StudyRuns.read(root), 20)["results"]
                if (row["method"], row["history_length"]) == ("full", length)
            ]
        )
        for length in (5, 10)
    }
    assert f"| full | {max(valid, key=lambda n: valid[n])} |" in output
    forget(root, "plain-K10-n800-s3", "plain-K5-n800-s3")
    status, output, figures = run(root, monkeypatch, capsys)
    assert status == 1
    assert "gate failed: plain lacks the seeds [3]" in output
    assert not figures


def test_cell_of_few_seeds_is_no_candidate_though_it_looks_best() -> None:
    lucky = {"method": "full", "shots": 9, "valid_auc": 0.9, "seeds": [1], "missing_seeds": []}
    three = {**lucky, "valid_auc": 0.8, "seeds": [1, 2], "missing_seeds": [3]}
    report = Report("quality")
    assert quality.best(report, {"results": [lucky, three]}, "full", None) == three
    assert quality.best(report, {"results": [lucky]}, "full", 9) == lucky
    assert not report.failures
    assert quality.best(report, {"results": [lucky]}, "plain", None) is None
    assert report.failures


def test_committed_scores_are_of_runs_of_the_shipped_study_and_name_no_folder() -> None:
    plan, runs = study_archive.plan_of(quality.SCORES)
    shipped = {run.name for run in expand(load_study("ml100k_quality"), Path("nowhere"))}
    assert set(plan["finished"]) <= {run.name for run in runs} == shipped
    assert len(plan["finished"]) >= 3 * 2  # ReLLaX and plain LoRA, three seeds each
    assert plan["contrasts"]
    with zipfile.ZipFile(quality.SCORES) as archive:
        for name in ("plan.json", "runs.json"):
            assert b'"/' not in archive.read(name)


def test_scores_are_kept_from_a_folder_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["quality", "--keep"])
    with pytest.raises(SystemExit) as caught:
        quality.main()
    assert caught.value.code == 2
    assert "name the folder" in capsys.readouterr().err
