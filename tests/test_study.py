"""A study file: what runs it becomes, under which names and in which order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rellax_ds.errors import ArtifactError, ConfigError
from rellax_ds.study import expand, load_study, read_plan, shipped_studies, write_plan

BASE = """
description: base
shards: {train_rows: 100, history_length: 4}
"""
GRID = """
reference: plain
contrasts: [{part: width, method: wide, without: plain}]
set: {shards.valid_rows: 50, shards.train_rows: 60}
grids:
  - methods:
      - {recipe: two.yaml, start_from: plain}
      - plain.yaml
      - {recipe: plain.yaml, name: wide}
    axes: {shards.history_length: [2, 4], seed: [7, 8]}
  - methods: [plain.yaml]
    axes: {shards.history_length: [4], shards.train_rows: [60, 90], seed: [7], crm.kind: [sim]}
  - methods: [plain.yaml]
    axes: {shards.history_length: [2], seed: [8]}
"""


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    (tmp_path / "plain.yaml").write_text(BASE + "model: {interaction: identity, spa: false}\n")
    (tmp_path / "two.yaml").write_text(
        BASE + "model: {adapter: somewhere, train_factors: false}\ntrain: {epochs: 2}\n"
    )
    path = tmp_path / "grid.yaml"
    path.write_text(GRID)
    return path


@pytest.mark.parametrize("name", sorted(shipped_studies()))
def test_shipped_study_expands(name: str, tmp_path: Path) -> None:
    study = load_study(name)
    runs = expand(study, tmp_path)
    assert study.description
    assert {run.recipe.name for run in runs} == {run.name for run in runs}


def test_study_becomes_runs_with_stable_names_and_each_once(grid: Path, tmp_path: Path) -> None:
    runs = {run.name: run for run in expand(load_study(str(grid)), tmp_path)}
    cells = [f"K{length}-n60-s{seed}" for length in (2, 4) for seed in (7, 8)]
    expected = {f"{method}-{cell}" for method in ("plain", "wide", "two") for cell in cells}
    expected |= {f"plain-K4-n{rows}-s7-kind-sim" for rows in (60, 90)}
    assert set(runs) == expected
    run = runs["plain-K4-n90-s7-kind-sim"]
    assert run.axes == {"crm.kind": "sim"}
    assert (run.recipe.shards.train_rows, run.recipe.shards.valid_rows) == (90, 50)
    assert (run.recipe.crm.kind, run.recipe.seed) == ("sim", 7)


def test_run_that_starts_from_another_follows_it_and_has_its_adapter(
    grid: Path, tmp_path: Path
) -> None:
    runs = expand(load_study(str(grid)), tmp_path)
    names = [run.name for run in runs]
    for run in runs:
        if run.method == "two":
            source = run.name.replace("two", "plain")
            assert run.start_from == source
            assert names.index(source) < names.index(run.name)
            folder = tmp_path / "runs" / source / "6_train" / "adapter"
            assert run.recipe.model.adapter == folder


def test_overrides_of_the_command_line_are_for_every_run(grid: Path, tmp_path: Path) -> None:
    runs = expand(load_study(str(grid)), tmp_path, ["train.epochs=3"])
    assert {run.recipe.train.epochs for run in runs} == {3}


def test_plan_gives_the_runs_back(grid: Path, tmp_path: Path) -> None:
    study = load_study(str(grid))
    runs = expand(study, tmp_path)
    write_plan(study, runs, tmp_path, ["plain-K2-n60-s7"])
    plan, found = read_plan(tmp_path)
    assert plan == {
        "name": "grid",
        "description": "",
        "reference": "plain",
        "contrasts": [{"part": "width", "method": "wide", "without": "plain"}],
        "finished": ["plain-K2-n60-s7"],
    }
    assert found == runs
    with pytest.raises(ArtifactError, match="rellax study"):
        read_plan(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("reference: plain", "reference: plane"), "reference 'plane' is none of its methods"),
        (("without: plain", "without: plane"), "contrast width 'plane' is none of its methods"),
        (("method: wide", "method: 'wide, LLM alone'"), "'wide, LLM alone' is none of its methods"),
        (("start_from: plain", "start_from: plane"), "starts from plane, which has no run"),
        (("seed: [7, 8]", "seed: []"), "axis seed has no value"),
        (("seed: [7, 8]", "sed: [7, 8]"), "unknown key 'sed'"),
        (("{recipe: plain.yaml, name: wide}", "{recipe: two.yaml, name: plain}"), "two different"),
        (("grids:", "grid:"), "'grids'"),
        (("plain.yaml\n", "absent.yaml\n"), "no such file"),
    ],
)
def test_study_that_is_wrong_is_one_line(
    grid: Path, tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    grid.write_text(grid.read_text().replace(*change, 1))
    with pytest.raises(ConfigError, match=message) as caught:
        expand(load_study(str(grid)), tmp_path)
    assert "\n" not in str(caught.value)


def test_plan_that_lacks_a_part_is_one_line(grid: Path, tmp_path: Path) -> None:
    study = load_study(str(grid))
    write_plan(study, expand(study, tmp_path), tmp_path, [])
    document = json.loads((tmp_path / "plan.json").read_text())
    del document["contrasts"]
    (tmp_path / "plan.json").write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match=r"no plan of a study .*contrasts.*rellax study"):
        read_plan(tmp_path)


def test_contrast_may_name_the_llm_of_a_blended_method(grid: Path, tmp_path: Path) -> None:
    text = grid.read_text().replace("method: wide", "method: 'wide, LLM alone'")
    grid.write_text(text.replace("set: {", "set: {model.residual: stacked, "))
    (contrast,) = load_study(str(grid)).contrasts
    assert contrast.method == "wide, LLM alone"
    assert expand(load_study(str(grid)), tmp_path)


def test_study_of_unknown_name_lists_the_shipped_ones() -> None:
    with pytest.raises(ConfigError, match="ml100k_quality"):
        load_study("ml100k_qualty")
