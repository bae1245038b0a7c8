"""Partitions on clusters that are small, or become so: one CPU, and a node that dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from rellax_ds.errors import ArtifactError
from rellax_ds.partitions import Partition, private_folder, run_partitions, split_rows

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]


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


def test_run_partitions_after_an_error_leaves_its_cpu_to_the_next(
    cluster: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    parts = [*split_rows(4, 2), Partition("part-00002", {"start": 4})]  # no stop: a defect
    with pytest.raises(ArtifactError, match="part-00002 failed: KeyError") as held:
        run_partitions("sleep", parts, Sleeper, {}, tmp_path / "a", "k")
    assert len(run_partitions("sleep", split_rows(4, 2), Sleeper, {}, tmp_path / "b", "k")) == 2
    assert held is not None
    assert "retries" not in capfd.readouterr().err


def test_run_partitions_again_after_a_killed_driver_computes_only_the_rest(tmp_path: Path) -> None:
    log, out = tmp_path / "log", tmp_path / "out"
    code = (
        "import sys; from pathlib import Path; from rellax_ds import runtime; runtime.prepare();"
        "from tests.test_partitions_cluster import Sleeper; from rellax_ds.partitions import *;"
        "settings = {'seconds': 0.1, 'log': sys.argv[1]};"
        "run_partitions('sleep', split_rows(40, 2), Sleeper, settings, Path(sys.argv[2]), 'k')"
    )
    command = [sys.executable, "-c", code, str(log), str(out)]
    first = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        while len(list(out.glob("*.committed.json"))) < 5:
            assert first.poll() is None
            time.sleep(0.01)
        family = psutil.Process(first.pid).children(recursive=True)
    finally:
        os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
    before = {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in out.glob("part*")}
    records = [name for name in before if name.endswith(".committed.json")]
    log.unlink()
    subprocess.run(command, cwd=ROOT, check=True, timeout=80)
    started = {json.loads(line)["partition"] for line in log.read_text().splitlines()}
    assert len(records) >= 5
    assert started == {f"part-{n:05d}" for n in range(20)} - {r.split(".")[0] for r in records}
    for name in records:
        path = out / name
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == before[name]
    assert len(list(out.glob("*.txt"))) == 20
    assert not private_folder(out).exists()


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
