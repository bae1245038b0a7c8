"""Running a stage: two processes at once, and a disk that is full."""

from __future__ import annotations

import errno
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from rellax_ds.artifacts import WorkDir
from rellax_ds.config import parse_recipe
from rellax_ds.errors import ArtifactError
from rellax_ds.stages.stage import Stage, StageContext

if TYPE_CHECKING:
    from pathlib import Path

    from rellax_ds.artifacts import Manifest

RECIPE = parse_recipe({"name": "t"}, "t")


def stage(build: Any) -> Stage:
    return Stage("tables", 1, ("data",), lambda _recipe: (), build)


def test_stage_run_twice_at_once_builds_once(tmp_path: Path) -> None:
    builds: list[float] = []

    def build(context: StageContext) -> dict[str, Any]:
        builds.append(time.monotonic())
        (context.directory / "half").write_text("x")
        time.sleep(0.3)
        (context.directory / "whole").write_text("y")
        return {}

    work = WorkDir(tmp_path)
    found: list[Manifest] = []
    runs = [
        threading.Thread(target=lambda: found.append(stage(build).run(RECIPE, work)))
        for _ in range(3)
    ]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert len(builds) == 1
    assert found == [found[0]] * 3
    assert set(found[0].files) == {"half", "whole"}
    assert not (tmp_path / ".running").exists()


def test_stage_run_after_a_failed_one_is_not_kept_waiting(tmp_path: Path) -> None:
    def broken(context: StageContext) -> dict[str, Any]:
        raise ArtifactError("broken; mend it")

    with pytest.raises(ArtifactError, match="mend it"):
        stage(broken).run(RECIPE, WorkDir(tmp_path))
    assert not (tmp_path / ".running").exists()


def test_stage_run_on_a_full_disk_is_one_line_with_the_folder_and_the_room(tmp_path: Path) -> None:
    def full(context: StageContext) -> dict[str, Any]:
        raise OSError(errno.ENOSPC, "No space left on device", "events.parquet")

    with pytest.raises(ArtifactError, match=r"1_tables-\w+: no space left \(\d+ bytes are free\)"):
        stage(full).run(RECIPE, WorkDir(tmp_path))


def test_stage_run_other_system_errors_keep_their_type(tmp_path: Path) -> None:
    def other(context: StageContext) -> dict[str, Any]:
        raise PermissionError(errno.EACCES, "Permission denied", "events.parquet")

    with pytest.raises(PermissionError):
        stage(other).run(RECIPE, WorkDir(tmp_path))


def test_stage_run_leaves_what_a_kill_left_half_written_out_of_the_artefact(tmp_path: Path) -> None:
    def build(context: StageContext) -> dict[str, Any]:
        (context.directory / ".index.json.123").write_text("{")
        (context.directory / ".columns.123").mkdir()
        (context.directory / ".columns.123" / "item.npy").write_text("x")
        (context.directory / "data").write_text("y")
        return {}

    manifest = stage(build).run(RECIPE, WorkDir(tmp_path))
    assert set(manifest.files) == {"data"}
    assert {p.name for p in (tmp_path / "1_tables").iterdir()} == {"data", "manifest.json"}


def test_stage_run_with_a_cut_input_names_the_file_and_the_stage_that_writes_it(
    tmp_path: Path,
) -> None:
    def build(context: StageContext) -> dict[str, Any]:
        (context.directory / "events.parquet").write_text("whole")
        return {}

    work = WorkDir(tmp_path)
    stage(build).run(RECIPE, work)
    (tmp_path / "1_tables" / "events.parquet").write_text("who")
    reader = Stage("retrieval", 1, ("retrieval",), lambda _recipe: ("tables",), build)
    with pytest.raises(ArtifactError, match=r"events\.parquet: 3 bytes.* 5; run `rellax tables`"):
        reader.run(RECIPE, work)
