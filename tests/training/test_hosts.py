"""Training over two hosts: network namespaces with a link between them, started without ssh."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import psutil
import pytest
from trainings import ROOT, wait_for

from benchmarks.soak import figures_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from rellax_ds.artifacts import WorkDir

HANG_TIMEOUT = 30
ADDRESSES = ("10.77.0.1", "10.77.0.2")

pytestmark = [pytest.mark.distributed, pytest.mark.slow_soak]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[str]]:
    """Names of two namespaces that see nothing but each other."""
    names = [f"rellax-{os.getpid()}-{number}" for number in (0, 1)]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            pair = ["eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0"]
            ip("link", "add", *pair, "netns", names[1])
            for name, address in zip(names, ADDRESSES, strict=True):
                ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
                for device in ("lo", "eth0"):
                    ip("-n", name, "link", "set", device, "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces are not permitted here: {error}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def start_hosts(
    hosts: list[str], recipe: Path, work: WorkDir, *flags: str
) -> list[subprocess.Popen[bytes]]:
    """Start one rank on every host, each host under a name of its own."""
    hostfile = work.root / "hosts"
    hostfile.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    started = []
    for number, host in enumerate(hosts):
        command = ["ip", "netns", "exec", host, "unshare", "--uts", "sh", "-c"]
        command += [f'hostname host-{number}; exec "$@"', "sh"]
        command += [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile)]
        command += ["--no_ssh", "--node_rank", str(number), "--master_addr", ADDRESSES[0]]
        command += ["--quiet", str(ROOT / "train.py"), "--recipe", str(recipe)]
        command += ["--work-dir", str(work.root), *flags]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        environment |= {"DS_ACCELERATOR": "cpu"}
        with (work.root / f"host-{number}").open("ab") as output:
            started.append(
                subprocess.Popen(
                    command, cwd=work.root, env=environment, stdout=output, stderr=output
                )
            )
    return started


def wait_hosts(processes: list[subprocess.Popen[bytes]], work: WorkDir) -> list[int]:
    statuses = [process.wait(timeout=200) for process in processes]
    running = psutil.process_iter(["cmdline"])
    left = [p for p in running if str(work.root) in (p.info["cmdline"] or ())]
    assert not psutil.wait_procs(left, timeout=10)[1], "a process outlived the training"
    return statuses


@pytest.mark.timeout(600)
def test_two_hosts_train_as_two_ranks_and_the_loss_of_one_is_told_by_the_other(
    hosts: list[str], recipe_file: Path, make_work: Callable[..., WorkDir], two_ranks: WorkDir
) -> None:
    work = make_work()
    processes = start_hosts(hosts, recipe_file, work, "--set", f"train.hang_timeout={HANG_TIMEOUT}")
    wait_for(processes[0], work, "checkpoints/step-00000002/manifest.json")
    doomed = psutil.Process(processes[1].pid)
    for process in [*reversed(doomed.children(recursive=True)), doomed]:
        process.kill()
    lost = time.monotonic()
    assert wait_hosts(processes, work)[0] not in (0, None)
    assert time.monotonic() - lost < HANG_TIMEOUT + 30
    told = (work.root / "host-0").read_text()
    assert "train: rank 1 (host host-1, process " in told
    assert "is gone, last seen in " in told
    assert wait_hosts(start_hosts(hosts, recipe_file, work), work) == [0, 0], told
    logs = figures_of(two_ranks), figures_of(work)
    losses = [[r["loss"] for r in log if r["event"] == "step"] for log in logs]
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)
