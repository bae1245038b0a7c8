"""The main job in miniature, as a user runs it: `ray job submit`, two ZeRO-3 ranks, a report."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pyarrow.parquet as pq
import pytest

from rellax_ds.artifacts import STAGES, WorkDir
from rellax_ds.testing import tiny_recipe

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
pytestmark = [pytest.mark.ray, pytest.mark.distributed, pytest.mark.slow]
DATA_PATH = STAGES[:5]
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}


def environment(**extra: str) -> dict[str, str]:
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return {**os.environ, "PATH": path, **settings, **TOKEN, **extra}


def call(*command: str, timeout: float = 240, **extra: str) -> str:
    """Run a command from the checkout's root; returns both streams, fails the test with them."""
    done = subprocess.run(
        command, cwd=ROOT, env=environment(**extra), capture_output=True, text=True, timeout=timeout
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-4000:]
    return output


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_recipe(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Home folder of the cluster's user."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory, home: Path) -> Iterator[str]:
    """A Ray head on ports of its own; yields the address of its Jobs API."""
    port, dashboard = free_port(), free_port()
    command = [
        *(str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=2", f"--port={port}"),
        *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--disable-usage-stats"),
        f"--dashboard-agent-listen-port={free_port()}",  # another head may have the default one
    ]
    log = tmp_path_factory.mktemp("ray") / "head.log"
    with log.open("w") as sink:
        process = subprocess.Popen(
            command,
            env=environment(HOME=str(home)),
            stdout=sink,
            stderr=sink,
            start_new_session=True,
        )
    try:
        address = f"http://127.0.0.1:{dashboard}"
        probe = ["ray", "job", "submit", "--address", address, "--", "true"]
        deadline = time.monotonic() + 150
        # The port opens before the agent that starts jobs is up; only a job shows that it is.
        while subprocess.run(probe, env=environment(), capture_output=True, check=False).returncode:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        yield address
    finally:
        family = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        process.wait(timeout=30)
        _, alive = psutil.wait_procs(family, timeout=10)
        for survivor in alive:
            survivor.kill()


@pytest.fixture(scope="module")
def submitted(head: str, recipe: Path, home: Path) -> WorkDir:
    """Stages 1 to 5, submitted to the cluster as the README says, with nothing but the recipe."""
    call(
        *("ray", "job", "submit", "--address", head, "--working-dir", ".", "--"),
        *("python", "ray_jobs/pipeline.py", "--recipe", str(recipe), "--until", "shards"),
    )
    return WorkDir(home / "work" / recipe.stem)


@pytest.fixture(scope="module")
def finished(submitted: WorkDir, recipe: Path) -> tuple[WorkDir, str]:
    """The remaining stages, run by the `rellax` command on the submitted job's artefacts."""
    run = ("rellax", "run", "--recipe", str(recipe), "--work-dir", str(submitted.root))
    return submitted, call(*run)


def test_ray_job_commits_the_data_path(submitted: WorkDir) -> None:
    for stage in DATA_PATH:
        assert submitted.require(stage).files, stage
    assert not (submitted.root / ".running").exists()


@pytest.mark.parametrize("token", [None, "f" * 64])
def test_jobs_api_without_the_clusters_token_is_refused(head: str, token: str | None) -> None:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(f"{head}/api/jobs/", headers=headers)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=30)
    assert refused.value.code in {401, 403}


@pytest.mark.slow_soak
def test_data_path_without_a_cluster_gives_the_same_bytes(
    submitted: WorkDir, recipe: Path, tmp_path: Path
) -> None:
    flags = ("--recipe", str(recipe), "--work-dir", str(tmp_path))
    call("python", "ray_jobs/stage1_tables.py", *flags)
    output = call("python", "ray_jobs/pipeline.py", *flags, "--until", "shards")
    assert "tables: up to date" in output
    local = WorkDir(tmp_path)
    different = [s for s in DATA_PATH if local.require(s).content != submitted.require(s).content]
    assert not different


def test_run_skips_what_the_job_committed_and_ends_in_a_report(
    finished: tuple[WorkDir, str],
) -> None:
    work, output = finished
    for stage in DATA_PATH:
        assert f"{stage}: up to date" in output
    assert str(work.stage_dir("report") / "report.html") in output
    report = json.loads((work.stage_dir("report") / "report.json").read_text())
    assert "NaN" not in json.dumps(report)
    html = (work.stage_dir("report") / "report.html").read_text()
    assert not re.search(r'(?:src|href)="https?:', html)


def test_predictions_hold_every_valid_and_test_sample_once(finished: tuple[WorkDir, str]) -> None:
    work, _ = finished
    index = json.loads((work.stage_dir("shards") / "index.json").read_text())
    predictions = pq.read_table(work.stage_dir("predict") / "predictions.parquet")
    samples = predictions["sample"].to_pylist()
    assert len(samples) == len(set(samples)) == 32 + 40
    assert index
    tables = pq.read_table(work.stage_dir("tables") / "samples.parquet")
    labels = tables["label"].take(predictions["sample"])
    assert labels.to_pylist() == predictions["label"].to_pylist()


def test_run_again_skips_all_eight_stages(finished: tuple[WorkDir, str], recipe: Path) -> None:
    work, _ = finished
    before = {stage: work.require(stage) for stage in STAGES}
    output = call("rellax", "run", "--recipe", str(recipe), "--work-dir", str(work.root))
    for stage in STAGES:
        assert f"{stage}: up to date" in output
    assert {stage: work.require(stage) for stage in STAGES} == before


def test_changed_field_reruns_only_what_reads_it_and_says_so(
    finished: tuple[WorkDir, str], recipe: Path
) -> None:
    work, _ = finished
    output = call(
        *("rellax", "run", "--recipe", str(recipe), "--work-dir", str(work.root)),
        *("--set", "predict.bootstrap=300"),
    )
    assert "train: up to date" in output
    assert re.search(r"report: runs again because recipe predict[.\w]* changed", output)
