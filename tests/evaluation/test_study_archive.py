"""A packed study gives the figures of its folder, and nothing of the data set."""

from __future__ import annotations

import dataclasses
import json
import zipfile
from typing import TYPE_CHECKING

import pytest
from made_studies import forget, make_study

from rellax_ds.errors import ArtifactError, TableError
from rellax_ds.evaluation import study_archive
from rellax_ds.evaluation.study import find
from rellax_ds.evaluation.study_runs import StudyRuns
from rellax_ds.tables import write_tables
from rellax_ds.testing import made_tables

if TYPE_CHECKING:
    from pathlib import Path

    from rellax_ds.artifacts import WorkDir


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, WorkDir]:
    """A study of two methods with one run missing, and a work folder with its stages 1 to 3."""
    axes = {"shards.history_length": [5], "seed": [1, 2]}
    root, runs = make_study(
        tmp_path, grids=[{"methods": ["plain.yaml", "full.yaml"], "axes": axes}]
    )
    forget(root, "full-K5-n800-s2")
    return root, runs[0].work(root)


def test_archive_gives_the_figures_of_the_folder(
    made: tuple[Path, WorkDir], tmp_path: Path
) -> None:
    root, work = made
    path = tmp_path / "scores" / "made.zip"
    study_archive.pack(root, path)
    folder, archive = StudyRuns.read(root), study_archive.read(path, work)
    assert find(archive, 50) == find(folder, 50)
    assert archive.missing == ["full-K5-n800-s2"]
    for ours, theirs in zip(archive.scored, folder.scored, strict=True):
        for part in dataclasses.fields(ours.test):
            one, two = getattr(ours.valid, part.name), getattr(theirs.valid, part.name)
            assert one.dtype == two.dtype
            assert one.tolist() == two.tolist()
    assert [run.name for run in study_archive.plan_of(path)[1]] == [run.name for run in folder.runs]


def test_archive_is_the_same_again_and_names_neither_folder_nor_rows(
    made: tuple[Path, WorkDir], tmp_path: Path
) -> None:
    root, _ = made
    plan = json.loads((root / "plan.json").read_text())
    plan["runs"][0]["recipe"]["model"]["adapter"] = str(root / "runs" / "x" / "6_train" / "adapter")
    (root / "plan.json").write_text(json.dumps(plan))
    for name in ("a.zip", "b.zip"):
        study_archive.pack(root, tmp_path / name)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        for name in archive.namelist():
            assert str(tmp_path).encode() not in archive.read(name)
    _, runs = study_archive.plan_of(tmp_path / "a.zip")
    assert str(runs[0].recipe.model.adapter) == "runs/x/6_train/adapter"


def test_archive_on_other_tables_is_refused(made: tuple[Path, WorkDir], tmp_path: Path) -> None:
    root, work = made
    study_archive.pack(root, tmp_path / "made.zip")
    for events, message in ((3100, "other rows"), (900, "is scored, the tables have")):
        other = made_tables(tmp_path / str(events), num_users=60, num_events=events)
        write_tables(other, work.stage_dir("tables"))
        with pytest.raises(TableError, match=message):
            study_archive.read(tmp_path / "made.zip", work)


def test_file_that_is_no_archive_is_one_line(made: tuple[Path, WorkDir], tmp_path: Path) -> None:
    path = tmp_path / "made.zip"
    study_archive.pack(made[0], path)
    whole = path.read_bytes()
    for content in (None, b"", whole[: len(whole) // 2]):
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ArtifactError, match=r"made\.zip") as caught:
            study_archive.read(path, made[1])
        assert "\n" not in str(caught.value)
