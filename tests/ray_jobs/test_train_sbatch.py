"""The Slurm script of stage 6: its trap, its hostfile and its requeue, with Slurm stood in for."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SBATCH = ROOT / "ray_jobs" / "cluster" / "train.sbatch"

SRUN = """#!/usr/bin/env bash
# Leaves with 143 once STOP is there, as the ranks do; an old STOP is removed by their start.
sleep 0.5
mkdir -p "$WORK_DIR/.running/6_train-0123"
rm -f "$WORK_DIR/.running/6_train-0123/STOP"
echo "$@" >"$WORK_DIR/command"
touch "$WORK_DIR/started"
for _ in $(seq 300); do
    [[ $FATE != stop ]] && exit "$FATE"
    [[ -e $WORK_DIR/.running/6_train-0123/STOP ]] && exit 143
    sleep 0.1
done
exit 99
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == requeue ]]; then echo "$2" >"$WORK_DIR/requeued"; else printf 'node-a\\nnode-b\\n'; fi
"""


def submit(tmp_path: Path, fate: str) -> subprocess.Popen[str]:
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (binaries / name).write_text(text)
        (binaries / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        "WORK_DIR": str(tmp_path / "work"),
        "RELLAX_CACHE": str(tmp_path / "cache"),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_GPUS_ON_NODE": "8",
        "FATE": fate,
    }
    return subprocess.Popen(
        ["bash", str(SBATCH)], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    )


def test_train_sbatch_told_to_end_waits_for_the_checkpoint_and_is_queued_again(
    tmp_path: Path,
) -> None:
    job, work = submit(tmp_path, "stop"), tmp_path / "work"
    hosts, deadline = work / "hosts-4711", time.monotonic() + 20
    while not hosts.exists() or hosts.read_text().count("\n") < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert hosts.read_text() == "node-a slots=8\nnode-b slots=8\n"
    job.send_signal(signal.SIGTERM)
    _, errors = job.communicate(timeout=30)
    assert job.returncode == 143, errors
    assert (work / "requeued").read_text() == "4711\n"
    assert not hosts.exists()


@pytest.mark.parametrize("status", [0, 1])
def test_train_sbatch_that_ends_by_itself_passes_its_status_on(tmp_path: Path, status: int) -> None:
    job = submit(tmp_path, str(status))
    _, errors = job.communicate(timeout=30)
    assert job.returncode == status, errors
    assert not (tmp_path / "work" / "requeued").exists()
    command = (tmp_path / "work" / "command").read_text()
    assert "--kill-on-bad-exit=1" in command
    assert '--node_rank "$SLURM_NODEID" --master_addr "$MASTER"' in command


def test_train_sbatch_asks_slurm_for_what_its_trap_needs() -> None:
    subprocess.run(["bash", "-n", str(SBATCH)], check=True)
    text = SBATCH.read_text()
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.MULTILINE))
    assert directives["signal"] == "B:TERM@120"
    assert {"requeue", "nodes", "time"} <= set(directives)
