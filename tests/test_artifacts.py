"""Artefacts: whole or absent, skipped when they match, rebuilt with the reason when they do not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rellax_ds.artifacts import MANIFEST, WorkDir, write_json
from rellax_ds.errors import ArtifactError


def commit(work: WorkDir, text: str = "one", parts: dict[str, str] | None = None) -> None:
    run = work.open("tables", parts or {"code": "1"}, {})
    (run.begin() / "data.txt").write_text(text)
    run.commit({"rows": 3})


def test_commit_publishes_the_folder_with_its_digests(tmp_path: Path) -> None:
    work = WorkDir(tmp_path)
    commit(work)
    manifest = work.require("tables")
    assert (work.stage_dir("tables") / "data.txt").read_text() == "one"
    assert manifest.files["data.txt"]["bytes"] == 3
    assert manifest.counts == {"rows": 3}
    assert not (tmp_path / ".running").exists()


def test_stage_matching_is_recognised_and_changes_are_named(tmp_path: Path) -> None:
    work = WorkDir(tmp_path)
    commit(work, parts={"code": "1", "recipe data": "a"})
    assert work.open("tables", {"code": "1", "recipe data": "a"}, {}).committed() is not None
    other = work.open("tables", {"code": "1", "recipe data": "b", "input x": "c"}, {})
    assert other.committed() is None
    assert other.changes() == ["input x", "recipe data"]


def test_stage_with_a_truncated_file_is_not_taken_for_committed(tmp_path: Path) -> None:
    work = WorkDir(tmp_path)
    commit(work)
    (work.stage_dir("tables") / "data.txt").write_text("on")
    assert work.open("tables", {"code": "1"}, {}).committed() is None


def test_interrupted_run_leaves_the_old_artefact_and_is_found_again(tmp_path: Path) -> None:
    work = WorkDir(tmp_path)
    commit(work, "old")
    attempt = work.open("tables", {"code": "2"}, {})
    (attempt.begin() / "part").write_text("half")
    again = work.open("tables", {"code": "2"}, {})
    assert (again.begin() / "part").read_text() == "half"
    assert (work.stage_dir("tables") / "data.txt").read_text() == "old"


def test_begin_drops_attempts_with_another_key(tmp_path: Path) -> None:
    work = WorkDir(tmp_path)
    stale = work.open("tables", {"code": "2"}, {}).begin()
    work.open("tables", {"code": "3"}, {}).begin()
    assert not stale.exists()


def test_commit_of_nothing_is_refused(tmp_path: Path) -> None:
    run = WorkDir(tmp_path).open("tables", {"code": "1"}, {})
    run.begin()
    with pytest.raises(ArtifactError, match="wrote no file"):
        run.commit({})


def test_content_is_equal_for_equal_bytes_and_differs_otherwise(tmp_path: Path) -> None:
    contents = []
    for name, text in (("a", "x"), ("b", "x"), ("c", "y")):
        work = WorkDir(tmp_path / name)
        commit(work, text)
        contents.append(work.require("tables").content)
    assert contents[0] == contents[1] != contents[2]


def test_required_stage_absent_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="rellax crm"):
        WorkDir(tmp_path).require("crm")


def test_manifest_torn_counts_as_absent(tmp_path: Path) -> None:
    work = WorkDir(tmp_path)
    commit(work)
    (work.stage_dir("tables") / MANIFEST).write_text('{"stage": "tab')
    assert work.manifest("tables") is None


def test_write_json_failing_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
