"""The running of a study: shared stages are built once, whoever needs them first or fails."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rellax_ds.artifacts import STAGES
from rellax_ds.errors import ArtifactError
from rellax_ds.stages import study as running
from rellax_ds.stages.pipeline import load_stage
from rellax_ds.study import Run, expand, load_study
from rellax_ds.testing import tiny_recipe

ROOT = Path(__file__).resolve().parents[2]
GRID = """
reference: plain
set: {predict.partition_rows: 100, shards.samples_per_shard: 64}
grids:
  - methods: [tiny.yaml, plain.yaml]
    axes: {shards.history_length: [2, 4], seed: [1, 2]}
"""


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grid")
    tiny_recipe(folder, train={"num_processes": 1})
    plain = "extends: tiny.yaml\ndescription: plain\nmodel: {interaction: identity}\n"
    (folder / "plain.yaml").write_text(plain)
    path = folder / "grid.yaml"
    path.write_text(GRID)
    return path


def runs_of(grid: Path, root: Path) -> list[Run]:
    return expand(load_study(str(grid)), root)


def build(run: Run, root: Path, *stages: str) -> None:
    for stage in stages:
        running.run_shared(stage, run.recipe, run.work(root), root / running.STORE)


def store(root: Path) -> dict[str, int]:
    """Committed artefacts of the store, with the time of their manifests."""
    return {
        path.parent.parent.name: path.stat().st_mtime_ns
        for path in (root / running.STORE).glob("*/[1-8]_*/manifest.json")
        if not path.parent.is_symlink()
    }


def test_runs_share_what_does_not_depend_on_where_they_differ(grid: Path, tmp_path: Path) -> None:
    runs = runs_of(grid, tmp_path)
    for run in runs:
        build(run, tmp_path, "tables", "crm")
    built = store(tmp_path)
    kinds = [name.split("-")[0] for name in built]
    assert (kinds.count("tables"), kinds.count("crm"), len(kinds)) == (1, 2, 3)
    folders = {
        run.work(tmp_path).stage_dir("crm").resolve() for run in runs if run.recipe.seed == 1
    }
    assert len(folders) == 1
    for run in runs:
        build(run, tmp_path, "tables", "crm")
    assert store(tmp_path) == built


def test_run_whose_recipe_changes_lets_go_of_the_old_artefact_only(
    grid: Path, tmp_path: Path
) -> None:
    one, *_, other = [run for run in runs_of(grid, tmp_path) if run.recipe.seed == 1]
    for run in (one, other):
        build(run, tmp_path, "tables", "crm")
    crm = one.recipe.crm.model_copy(update={"max_epochs": 1})
    changed = Run(one.name, one.method, {}, one.recipe.model_copy(update={"crm": crm}))
    build(changed, tmp_path, "tables", "crm")
    new, old = (run.work(tmp_path) for run in (changed, other))
    assert new.require("crm").key != old.require("crm").key
    assert new.stage_dir("tables").resolve() == old.stage_dir("tables").resolve()


@pytest.mark.parametrize("folders_lock", [True, False])
def test_two_processes_that_need_one_stage_build_it_once(
    grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folders_lock: bool
) -> None:
    lock = fcntl.flock

    def lock_files_only(handle: int, operation: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EBADF, "as NFS says")
        lock(handle, operation)

    if not folders_lock:
        monkeypatch.setattr(fcntl, "flock", lock_files_only)
    runs = runs_of(grid, tmp_path)[:4]
    threads = [threading.Thread(target=build, args=(run, tmp_path, "tables")) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (name,) = store(tmp_path)
    assert name.startswith("tables-")
    assert len({run.work(tmp_path).require("tables").seconds for run in runs}) == 1


def test_folder_that_another_command_has_written_is_left_alone(grid: Path, tmp_path: Path) -> None:
    run = runs_of(grid, tmp_path)[0]
    load_stage("tables").run(run.recipe, run.work(tmp_path))
    with pytest.raises(ArtifactError, match="not a link into the study's store"):
        build(run, tmp_path, "tables")
    assert run.work(tmp_path).manifest("tables") is not None


def test_run_that_fails_says_why_in_its_folder_until_it_is_tried_again(
    grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs_of(grid, tmp_path)[0]
    data = run.recipe.data.model_copy(update={"path": str(tmp_path / "absent")})
    broken = Run(run.name, run.method, {}, run.recipe.model_copy(update={"data": data}))
    with pytest.raises(Exception, match="absent"):
        running.run_one(broken, tmp_path)
    failure = run.work(tmp_path).root / running.FAILURE
    (line,) = failure.read_text().splitlines()
    assert "absent" in line
    assert not running.is_finished(run, tmp_path)
    monkeypatch.setattr(running, "RUN_STAGES", STAGES[:1])
    running.run_one(run, tmp_path)
    assert not failure.exists()
    assert running.is_finished(run, tmp_path)


def command(grid: Path, root: Path, *flags: str) -> list[str]:
    return [
        *(sys.executable, "-m", "rellax_ds.cli", "study"),
        *("--study", str(grid), "--work-dir", str(root), *flags),
    ]


@pytest.mark.distributed
@pytest.mark.slow
def test_failed_runs_are_one_line_each_and_the_status_is_1(grid: Path, tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    few = grid.with_name("few.yaml")
    few.write_text(GRID.replace("[2, 4], seed: [1, 2]", "[2], seed: [1]"))
    flags = ("--set", "data.path=/nowhere", "--parallel", "2")
    done = subprocess.run(
        command(few, tmp_path, *flags),
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    failed = [line for line in done.stderr.splitlines() if line.startswith("failed: ")]
    names = sorted(line.split(": ")[1] for line in failed)
    assert names == ["plain-K2-n48-s1", "tiny-K2-n48-s1"]
    assert all("/nowhere" in line for line in failed)
    assert "no run of this study is finished" in done.stderr.splitlines()[-1]


@pytest.mark.ray
@pytest.mark.distributed
@pytest.mark.slow_soak
@pytest.mark.timeout(1800)
def test_study_killed_in_a_training_goes_on_and_a_rerun_gives_the_same_bytes(
    grid: Path, tmp_path: Path
) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    log = (tmp_path / "log").open("w")
    first = subprocess.Popen(
        command(grid, tmp_path), cwd=ROOT, env=environment, stderr=log, start_new_session=True
    )
    deadline = time.monotonic() + 900
    while not list(tmp_path.glob("stages/train-*/.running/6_train-*/checkpoints/step-*")):
        assert first.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    before = store(tmp_path)
    for _ in range(2):
        subprocess.run(command(grid, tmp_path), cwd=ROOT, env=environment, check=True)
        document = (tmp_path / "study.json").read_bytes()
        (tmp_path / "study.json").unlink()
        subprocess.run(
            command(grid, tmp_path, "--report-only"), cwd=ROOT, env=environment, check=True
        )
        assert (tmp_path / "study.json").read_bytes() == document
    built = store(tmp_path)
    assert before.items() <= built.items()
    kinds = [name.split("-")[0] for name in built]
    expected = dict.fromkeys(("tables", "embeddings", "retrieval"), 1)
    expected |= {"crm": 2, "shards": 4, "train": 8, "predict": 8}
    assert {kind: kinds.count(kind) for kind in expected} == expected
    found = json.loads(document)
    assert [row["seeds"] for row in found["results"]] == [[1, 2]] * 4
    assert found["missing"] == []
