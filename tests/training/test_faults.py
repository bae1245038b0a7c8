"""Trainings that hang, lose their launcher or are asked to stop: they end in time and say why."""

from __future__ import annotations

import itertools
import re
import signal
import time
from typing import TYPE_CHECKING

import psutil
import pytest
from trainings import family_of, finish, ranks_of, said, start, train, wait_for, wait_for_checkpoint

from benchmarks.soak import adapter_of, figures_of

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable
    from pathlib import Path

    from rellax_ds.artifacts import WorkDir

HANG_TIMEOUT = 15

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


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


@pytest.mark.slow_soak
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
    "step": "checkpoints/step-*1/manifest.json",
    "save": "checkpoints/.staging-*",
    "score": "",
}
SHORT = [("one rank", "step"), ("all ranks", "save"), ("inner launcher", "score")]


def stop(recipe: Path, work: WorkDir, target: str, moment: str) -> None:
    """Start or continue the training, send SIGTERM, and see every process leave in time."""
    seen = len(said(work)) if (work.root / "stderr").exists() else 0
    process = start(recipe, work, 2)
    wait_for(process, work, MOMENTS["warm-up"])
    if moment != "score":
        wait_for(process, work, MOMENTS[moment])
    else:  # due after every third step
        while not re.search(r'"step", "step": (3|6|9), .*\n$', log_of(work)):
            assert process.poll() is None, said(work)
            time.sleep(0.002)
    family = family_of(process)
    TARGETS[target](process)
    asked = time.monotonic()
    finish(process, work, 143)
    assert time.monotonic() - asked < 30, said(work)
    assert not psutil.wait_procs(family, timeout=5)[1], "a process outlived the training"
    assert "train: stopped at step" in said(work)[seen:]


def log_of(work: WorkDir) -> str:
    return "".join(p.read_text() for p in work.root.glob(".running/6_train-*/log.jsonl"))


def equal(work: WorkDir, undisturbed: WorkDir) -> bool:
    return figures_of(work) == figures_of(undisturbed) and adapter_of(work) == adapter_of(
        undisturbed
    )


@pytest.mark.slow_soak
@pytest.mark.timeout(600)
def test_training_stopped_again_and_again_by_sigterm_gives_the_same_bits(
    recipe_file: Path, make_work: Callable[..., WorkDir], two_ranks: WorkDir
) -> None:
    work = make_work()
    for target, moment in SHORT:
        stop(recipe_file, work, target, moment)
    assert equal(train(recipe_file, work, 2), two_ranks)


@pytest.mark.slow_soak
@pytest.mark.parametrize(("target", "moment"), itertools.product(TARGETS, MOMENTS))
def test_sigterm_to_any_process_at_any_moment_resumes_to_the_same_bits(
    recipe_file: Path,
    make_work: Callable[..., WorkDir],
    two_ranks: WorkDir,
    target: str,
    moment: str,
) -> None:
    work = make_work()
    stop(recipe_file, work, target, moment)
    assert equal(train(recipe_file, work, 2), two_ranks)
