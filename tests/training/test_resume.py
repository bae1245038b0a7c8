"""Training as a user runs it: on one and two ranks, stopped, killed and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from rellax_ds.training.throughput import FIELDS

if TYPE_CHECKING:
    from collections.abc import Callable

    from rellax_ds.artifacts import WorkDir

ROOT = Path(__file__).resolve().parents[2]
STEPS = 12

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def start(recipe: Path, work: WorkDir, ranks: int, *flags: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(ROOT / "train.py"), "--recipe", str(recipe)]
    command += ["--work-dir", str(work.root), "--set", f"train.num_processes={ranks}", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (work.root / "stderr").open("ab") as errors:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=errors
        )


def said(work: WorkDir) -> str:
    return (work.root / "stderr").read_text()


def finish(process: subprocess.Popen[bytes], work: WorkDir, status: int) -> None:
    assert process.wait(timeout=240) == status, said(work)


def train(recipe: Path, work: WorkDir, ranks: int, *flags: str) -> WorkDir:
    finish(start(recipe, work, ranks, *flags), work, 0)
    return work


def wait_for_checkpoint(work: WorkDir, process: subprocess.Popen[bytes], step: int) -> None:
    deadline = time.monotonic() + 200
    while not any(
        path.parent.name >= f"step-{step:08d}"
        for path in work.root.glob(".running/6_train-*/checkpoints/step-*/manifest.json")
    ):
        assert process.poll() is None, said(work)
        assert time.monotonic() < deadline, said(work)
        time.sleep(0.005)


def ranks_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "rellax_ds.cli" in child.cmdline() and not child.children()
    ]


def records(work: WorkDir) -> list[dict[str, Any]]:
    """What the log says, less the speed."""
    lines = (work.stage_dir("train") / "log.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key not in FIELDS}
        for line in lines
    ]


def adapter(work: WorkDir) -> dict[str, bytes]:
    folder = work.stage_dir("train") / "adapter"
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.fixture(scope="module")
def one_rank(recipe_file: Path, make_work: Callable[..., WorkDir]) -> WorkDir:
    return train(recipe_file, make_work(), 1)


@pytest.fixture(scope="module")
def two_ranks(recipe_file: Path, make_work: Callable[..., WorkDir]) -> WorkDir:
    return train(recipe_file, make_work(), 2)


def test_training_on_two_ranks_equals_training_on_one(
    one_rank: WorkDir, two_ranks: WorkDir
) -> None:
    alone, together = records(one_rank), records(two_ranks)
    assert [(r["event"], r["step"]) for r in alone] == [(r["event"], r["step"]) for r in together]
    losses = [[r["loss"] for r in log if r["event"] == "step"] for log in (alone, together)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert losses[0][0] != pytest.approx(losses[0][-1], abs=0.05)
    scores = [[r["log_loss"] for r in log if r["event"] == "valid"] for log in (alone, together)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    assert two_ranks.require("train").counts["ranks"] == 2


def test_training_stopped_by_sigterm_resumes_to_the_same_bits(
    recipe_file: Path, make_work: Callable[..., WorkDir], one_rank: WorkDir
) -> None:
    work = make_work()
    process = start(recipe_file, work, 1)
    wait_for_checkpoint(work, process, 2)
    process.send_signal(signal.SIGTERM)
    finish(process, work, 143)
    assert "train: stopped at step" in said(work)
    assert work.manifest("train") is None
    train(recipe_file, work, 1)
    assert "continues from" in said(work)
    assert records(work) == records(one_rank)
    assert adapter(work) == adapter(one_rank)


def test_training_with_a_killed_rank_resumes_to_the_same_bits(
    recipe_file: Path, make_work: Callable[..., WorkDir], two_ranks: WorkDir
) -> None:
    work = make_work()
    process = start(recipe_file, work, 2)
    wait_for_checkpoint(work, process, 3)
    family = psutil.Process(process.pid).children(recursive=True)
    ranks = ranks_of(process)
    assert len(ranks) == 2
    ranks[1].kill()
    finish(process, work, 1)
    assert "without committing" in said(work)
    assert not psutil.wait_procs(family, timeout=40)[1], "a process outlived the training"
    train(recipe_file, work, 2)
    assert "continues from" in said(work)
    assert records(work) == records(two_ranks)
    assert adapter(work) == adapter(two_ranks)


def test_training_of_two_ranks_stopped_by_ctrl_c_continues_on_one(
    recipe_file: Path, make_work: Callable[..., WorkDir], one_rank: WorkDir
) -> None:
    work = make_work()
    process = start(recipe_file, work, 2)
    wait_for_checkpoint(work, process, 3)
    process.send_signal(signal.SIGINT)
    finish(process, work, 143)
    train(recipe_file, work, 1)
    losses = [[r["loss"] for r in records(run) if r["event"] == "step"] for run in (one_rank, work)]
    assert len(losses[1]) == STEPS
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
