"""Trainings of the tiny model as a user starts them, and what tests ask of their processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from rellax_ds.artifacts import WorkDir

ROOT = Path(__file__).resolve().parents[2]


def start(recipe: Path, work: WorkDir, ranks: int, *flags: str) -> subprocess.Popen[bytes]:
    """Start `train.py`; what it says goes into a file."""
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


def wait_for(process: subprocess.Popen[bytes], work: WorkDir, pattern: str) -> Path:
    """Wait until a file of the training's running folder exists; returns it."""
    deadline = time.monotonic() + 200
    while not (found := sorted(work.root.glob(f".running/6_train-*/{pattern}"))):
        assert process.poll() is None, said(work)
        assert time.monotonic() < deadline, said(work)
        time.sleep(0.005)
    return found[-1]


def wait_for_checkpoint(work: WorkDir, process: subprocess.Popen[bytes], step: int) -> None:
    deadline = time.monotonic() + 200
    while wait_for(process, work, "checkpoints/step-*/manifest.json").parent.name < (
        f"step-{step:08d}"
    ):
        assert time.monotonic() < deadline, said(work)
        time.sleep(0.005)


def family_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Every process below a training's."""
    return psutil.Process(process.pid).children(recursive=True)


def ranks_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The ranks, in the order they were started."""
    found = []
    for child in family_of(process):
        try:
            if "rellax_ds.cli" in child.cmdline() and not child.children():
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found
