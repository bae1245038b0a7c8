"""Partitions on clusters that are small, or become so: one CPU, and a node that dies."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from rellax_ds.partitions import Partition, private_folder, run_partitions, split_rows

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.ray, pytest.mark.timeout(90)]


class Sleeper:
    """Writes where it ran; slow enough to be killed in the middle."""

    def __init__(self, seconds: float = 0.0, log: str = "") -> None:
        self.seconds, self.log = seconds, log

    def __call__(self, partition: Partition, directory: Path) -> dict[str, Any]:
        import ray

        started = {"partition": partition.name, "pid": os.getpid()}
        started["node"] = ray.get_runtime_context().get_node_id()
        if self.log:
            with Path(self.log).open("a") as file:
                file.write(json.dumps(started) + "\n")
        time.sleep(self.seconds)
        (directory / f"{partition.name}.txt").write_text(str(partition.payload))
        return {"rows": partition.payload["stop"] - partition.payload["start"]}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Any]:
    """A head with one CPU, which notices a dead node within a second; a test may add nodes."""
    import ray
    from ray.cluster_utils import Cluster

    fast = {"health_check_period_ms": 200, "health_check_failure_threshold": 3}
    fast["health_check_initial_delay_ms"] = 0
    ray.shutdown()
    made = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "include_dashboard": False, "_system_config": fast},
    )
    ray.init(address=made.address, log_to_driver=False, configure_logging=False)
    yield made
    ray.shutdown()
    made.shutdown()


def test_run_partitions_with_more_workers_than_cpus_finishes(cluster: Any, tmp_path: Path) -> None:
    """The second actor gets its CPU only when the first, out of work, is ended."""
    parts = split_rows(9, 2)
    records = [
        run_partitions("sleep", parts, Sleeper, {}, tmp_path / str(n), "k", num_workers=n)
        for n in (1, 2)
    ]
    assert records[0] == records[1]
    assert len(records[0]) == 5


def test_run_partitions_survives_a_killed_node_and_computes_nothing_committed_again(
    cluster: Any, tmp_path: Path
) -> None:
    doomed = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    log, out = tmp_path / "log", tmp_path / "out"
    committed: dict[str, int] = {}

    def kill() -> None:
        while not ran_on(doomed.node_id) or not list(out.glob("*.committed.json")):
            time.sleep(0.02)
        committed.update({p.name: p.stat().st_ino for p in out.glob("*.committed.json")})
        raylet = doomed.all_processes["raylet"][0].process
        family = psutil.Process(raylet.pid).children(recursive=True)
        for process in (psutil.Process(raylet.pid), *family):
            process.send_signal(signal.SIGKILL)

    def ran_on(node: str) -> list[str]:
        lines = log.read_text().splitlines() if log.exists() else []
        return [row["partition"] for row in map(json.loads, lines) if row["node"] == node]

    killer = threading.Thread(target=kill)
    killer.start()
    settings = {"seconds": 0.3, "log": str(log)}
    records = run_partitions("sleep", split_rows(24, 2), Sleeper, settings, out, "k")
    killer.join()
    assert [r.name for r in records] == [f"part-{n:05d}" for n in range(12)]
    assert all((out / f"{r.name}.txt").is_file() for r in records)
    assert committed
    assert {name: (out / name).stat().st_ino for name in committed} == committed
    started = [json.loads(line)["partition"] for line in log.read_text().splitlines()]
    again = {name for name in started if started.count(name) > 1}
    assert not again & {name.removesuffix(".committed.json") for name in committed}
    assert not private_folder(out).exists()
