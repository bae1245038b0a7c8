"""Training as a user runs it: on one and two ranks, stopped, killed and resumed."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from trainings import family_of, finish, ranks_of, said, start, train, wait_for_checkpoint

from benchmarks.soak import adapter_of, figures_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from rellax_ds.artifacts import WorkDir

STEPS = 12
BUFFERS = Path("/dev/shm")

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_training_on_two_ranks_equals_training_on_one(
    one_rank: WorkDir, two_ranks: WorkDir
) -> None:
    alone, together = figures_of(one_rank), figures_of(two_ranks)
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
    assert figures_of(work) == figures_of(one_rank)
    assert adapter_of(work) == adapter_of(one_rank)


def test_training_with_a_killed_rank_resumes_to_the_same_bits(
    recipe_file: Path, make_work: Callable[..., WorkDir], two_ranks: WorkDir
) -> None:
    work, before = make_work(), set(BUFFERS.glob("deepspeed_*"))
    process = start(recipe_file, work, 2)
    wait_for_checkpoint(work, process, 3)
    family = family_of(process)
    ranks = ranks_of(process)
    assert len(ranks) == 2
    ranks[1].kill()
    finish(process, work, 1)
    assert "without committing" in said(work)
    assert not psutil.wait_procs(family, timeout=40)[1], "a process outlived the training"
    assert set(BUFFERS.glob("deepspeed_*")) <= before, "a killed training leaves memory behind"
    train(recipe_file, work, 2)
    assert "continues from" in said(work)
    assert figures_of(work) == figures_of(two_ranks)
    assert adapter_of(work) == adapter_of(two_ranks)


@pytest.mark.slow_soak
def test_training_of_two_ranks_stopped_by_ctrl_c_continues_on_one(
    recipe_file: Path, make_work: Callable[..., WorkDir], one_rank: WorkDir
) -> None:
    work = make_work()
    process = start(recipe_file, work, 2)
    wait_for_checkpoint(work, process, 3)
    process.send_signal(signal.SIGINT)
    finish(process, work, 143)
    train(recipe_file, work, 1)
    losses = [
        [r["loss"] for r in figures_of(run) if r["event"] == "step"] for run in (one_rank, work)
    ]
    assert len(losses[1]) == STEPS
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
