"""Trainings that hang, lose their launcher or are asked to stop: they end in time and say why."""

from __future__ import annotations

import itertools
import signal
import time
from typing import TYPE_CHECKING

import psutil
import pytest
from trainings import (
    adapter,
    family_of,
    finish,
    ranks_of,
    records,
    said,
    start,
    train,
    wait_for,
    wait_for_checkpoint,
)

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable
    from pathlib import Path

    from rellax_ds.artifacts import WorkDir

HANG_TIMEOUT = 20

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def two_ranks(recipe_file: Path, make_work: Callable[..., WorkDir]) -> WorkDir:
    return train(recipe_file, make_work(), 2)


def launcher_of(process: subprocess.Popen[bytes]) -> psutil.Process:
    """DeepSpeed's inner launcher, the parent of the ranks."""
    parent = ranks_of(process)[0].parent()
    assert parent is not None
    return parent


def test_stopped_rank_ends_the_job_in_time_and_is_named(
    recipe_file: Path, make_work: Callable[..., WorkDir]
) -> None:
    work = make_work()
    flags = ("--set", f"train.hang_timeout={HANG_TIMEOUT}", "--set", "train.epochs=40")
    process = start(recipe_file, work, 2, *flags)
    wait_for_checkpoint(work, process, 1)
    family, victim = family_of(process), ranks_of(process)[1]
    victim.suspend()
    stopped = time.monotonic()
    finish(process, work, 1)
    assert HANG_TIMEOUT < time.monotonic() - stopped < HANG_TIMEOUT + 30
    assert f"no progress for {HANG_TIMEOUT} s: rank 1 (host " in said(work)
    assert f"process {victim.pid}) does not answer, last seen in " in said(work)
    assert not psutil.wait_procs(family, timeout=5)[1], "a process outlived the training"


def test_ranks_leave_when_their_launcher_is_killed_and_the_job_fails(
    recipe_file: Path, make_work: Callable[..., WorkDir]
) -> None:
    work = make_work()
    process = start(recipe_file, work, 2, "--set", "train.epochs=40")
    wait_for_checkpoint(work, process, 1)
    family, ranks = family_of(process), ranks_of(process)
    launcher_of(process).kill()
    ranks[1].suspend()  # the other one waits for it in a collective and must leave all the same
    killed = time.monotonic()
    finish(process, work, 1)
    assert time.monotonic() - killed < 30
    assert not psutil.wait_procs(family, timeout=5)[1], "a process outlived the training"


def term_ranks(process: subprocess.Popen[bytes]) -> None:
    for rank in ranks_of(process):
        rank.terminate()


TARGETS: dict[str, Callable[[subprocess.Popen[bytes]], None]] = {
    "one rank": lambda process: ranks_of(process)[1].terminate(),
    "all ranks": term_ranks,
    "inner launcher": lambda process: launcher_of(process).terminate(),
    "entry": lambda process: process.send_signal(signal.SIGTERM),
}
MOMENTS = {
    "warm-up": "ranks/00001.json",
    "step": "checkpoints/step-00000001/manifest.json",
    "save": "checkpoints/.staging-2-*",
    "score": "checkpoints/step-00000005/manifest.json",
}
SHORT = [("one rank", "step"), ("all ranks", "save"), ("inner launcher", "score")]
REST = [
    pytest.param(target, moment, marks=pytest.mark.slow_soak)
    for target, moment in itertools.product(TARGETS, MOMENTS)
    if (target, moment) not in SHORT
]


def stop_and_resume(recipe: Path, work: WorkDir, target: str, moment: str) -> None:
    process = start(recipe, work, 2)
    wait_for(process, work, MOMENTS[moment])
    if moment == "score":  # the next valid score is due after step 6
        log = wait_for(process, work, "log.jsonl")
        while '"event": "step", "step": 6' not in log.read_text():
            assert process.poll() is None, said(work)
            time.sleep(0.002)
    family = family_of(process)
    TARGETS[target](process)
    asked = time.monotonic()
    finish(process, work, 143)
    assert time.monotonic() - asked < 30, said(work)
    assert not psutil.wait_procs(family, timeout=5)[1], "a process outlived the training"
    assert "train: stopped at step" in said(work)
    train(recipe, work, 2)


@pytest.mark.parametrize(("target", "moment"), SHORT + REST)
def test_sigterm_ends_every_rank_with_a_checkpoint_and_resume_gives_the_same_bits(
    recipe_file: Path,
    make_work: Callable[..., WorkDir],
    two_ranks: WorkDir,
    target: str,
    moment: str,
) -> None:
    work = make_work()
    stop_and_resume(recipe_file, work, target, moment)
    assert records(work) == records(two_ranks)
    assert adapter(work) == adapter(two_ranks)
