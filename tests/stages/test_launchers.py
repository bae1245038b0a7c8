"""Runs of a study on a Ray cluster of two nodes: where they run, and what is lost with whom."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from rellax_ds.config import load_recipe
from rellax_ds.errors import ConfigError
from rellax_ds.stages import launchers
from rellax_ds.stages.launchers import Launched, RayLauncher
from rellax_ds.stages.study import FAILURE, run_all
from rellax_ds.study import PLAN, Run
from rellax_ds.testing import tiny_recipe

ROOT = Path(__file__).resolve().parents[2]
GRID = """
reference: plain
set:
  embeddings.partition_rows: 100
  retrieval.partition_rows: 5000
  shards.samples_per_shard: 64
  predict.partition_rows: 100
grids:
  - methods: [tiny.yaml, broken.yaml, plain.yaml]
    axes: {seed: [1]}
"""
NAMES = ["tiny-K10-n48-s1", "plain-K10-n48-s1"]
PREDICTIONS = "7_predict/predictions.parquet"
BROKEN = "broken-K10-n48-s1"

# A run that says so, waits for a file and ends; asked to stop, it takes its time and leaves with 3.
WAITER = """
import os, signal, sys, time
from pathlib import Path
from rellax_ds import runtime

def stop(*_):
    time.sleep(0.5)
    Path(f"{me}.stopped").touch()
    sys.exit(3)

signal.signal(signal.SIGTERM, stop)
runtime.prepare()
me = f"{sys.argv[1]}-{os.getpid()}"
Path(f"{me}.started").touch()
while not Path(sys.argv[2]).exists():
    time.sleep(0.02)
"""
# A run whose stages use Ray: what it sees of it.
OWN_RAY = """
import json, os, sys
from pathlib import Path
from rellax_ds import runtime
from rellax_ds.partitions import connect

runtime.prepare()
connect()
import ray

seen = {
    "cpus": ray.cluster_resources()["CPU"],
    "nodes": len(ray.nodes()),
    "threads": os.environ["OMP_NUM_THREADS"],
    "sum": ray.get([ray.remote(lambda n: n).remote(n) for n in (1, 2)]),
    "token": os.environ["RAY_AUTH_TOKEN"],
    "here": os.getcwd(),
}
Path(sys.argv[1]).write_text(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head and a node of one CPU each, whose processes find RAY_ADDRESS set."""
    import ray
    from ray.cluster_utils import Cluster

    fast = {"health_check_period_ms": 200, "health_check_failure_threshold": 3}
    ray.shutdown()
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        head = {"num_cpus": 1, "include_dashboard": False, "temp_dir": folder}
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_ADDRESS", "auto")
            made = Cluster(initialize_head=True, head_node_args={**head, "_system_config": fast})
            made.add_node(num_cpus=1, num_gpus=1)  # it says so
            made.wait_for_nodes()
            ray.init(address=made.address, log_to_driver=False, configure_logging=False)
        yield made
        ray.shutdown()
        made.shutdown()


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grid")
    tiny_recipe(folder, train={"num_processes": 1})
    child = "extends: tiny.yaml\ndescription: child\n"
    (folder / "plain.yaml").write_text(child + "model: {interaction: identity}\n")
    (folder / "broken.yaml").write_text(child + "data: {path: /nowhere}\n")
    path = folder / "grid.yaml"
    path.write_text(GRID)
    return path


@pytest.fixture
def runs(grid: Path, tmp_path: Path) -> list[Run]:
    """Two runs of one CPU; their folder is that of a study."""
    (tmp_path / PLAN).touch()
    recipe = load_recipe(str(grid.with_name("tiny.yaml")))
    return [Run(name, "tiny", {}, recipe) for name in ("one", "two")]


def until(reached: Callable[[], Any], seconds: float = 120.0) -> Any:
    deadline = time.monotonic() + seconds
    while True:
        found = reached()
        if found:
            return found
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.02)


def ended(launched: Launched) -> str:
    found: list[str | None] = [None]

    def poll() -> bool:
        found[0] = launched.poll()
        return found[0] is not None

    until(poll)
    return str(found[0])


def started(folder: Path, name: str) -> list[int]:
    """Process ids of the attempts at a run of `WAITER`."""
    return [int(path.stem.split("-")[1]) for path in folder.glob(f"{name}-*.started")]


def nodes_of(run: Run, root: Path) -> list[str]:
    """Nodes on which attempts at a run were started, in order."""
    log = (run.work(root).root / launchers.LOG).read_text()
    return re.findall(r"^started on .*, Ray node (\w+)$", log, re.MULTILINE)


def wait_in(launcher: RayLauncher, run: Run, folder: Path) -> Launched:
    """Start a run of `WAITER`."""
    return launcher.start(run, ["-c", WAITER, str(folder / run.name), str(folder / "go")])


def command(grid: Path, root: Path, *flags: str) -> list[str]:
    return [
        *(sys.executable, "-m", "rellax_ds.cli", "study"),
        *("--study", str(grid), "--work-dir", str(root), *flags),
    ]


class Noted:
    """A launcher whose runs end at the second look; notes what starts while what is on its way."""

    hears_interrupt = True

    def __init__(self, *failing: str) -> None:
        self.starts: list[tuple[str, set[str]]] = []
        self.running: set[str] = set()
        self.failing = failing

    def start(self, run: Run, arguments: Any) -> Launched:
        assert list(arguments)[-1] == run.name
        self.starts.append((run.name, set(self.running)))
        self.running.add(run.name)
        outer, looks = self, iter([False, True])

        class Fake:
            def poll(self) -> str | None:
                if not next(looks):
                    return None
                outer.running.discard(run.name)
                return "it broke" if run.name in outer.failing else ""

            def terminate(self) -> None:
                raise AssertionError("nobody asked for it")

        return Fake()


def test_run_that_starts_from_another_is_launched_when_that_has_ended_well(
    runs: list[Run], tmp_path: Path
) -> None:
    one, two = runs
    third = Run("three", "tiny", {}, one.recipe, start_from="one")
    launcher = Noted()
    assert run_all([one, two, third], tmp_path, ["study"], launcher, 3) == {}
    assert launcher.starts[:2] == [("one", set()), ("two", {"one"})]
    name, beside = launcher.starts[2]
    assert name == "three"
    assert "one" not in beside


def test_failed_run_takes_those_that_start_from_it_along_and_no_other(
    runs: list[Run], tmp_path: Path
) -> None:
    one, two = runs
    stale = one.work(tmp_path).root / FAILURE
    stale.parent.mkdir(parents=True)
    stale.write_text("of an earlier attempt")
    third = Run("three", "tiny", {}, one.recipe, start_from="one")
    failures = run_all([one, two, third], tmp_path, ["study"], Noted("one"), 3)
    assert sorted(failures) == ["one", "three"]
    assert failures["one"] == "it broke; run the same command to continue it"
    assert "one, which failed" in failures["three"]


def test_run_asks_for_a_cpu_a_rank_and_gpus_if_a_stage_is_on_cuda(grid: Path) -> None:
    recipe = str(grid.with_name("tiny.yaml"))
    ranks = "train.num_processes=3"
    assert launchers.needs(load_recipe(recipe, [ranks])) == (3, 0)
    for stage in ("embeddings", "retrieval", "predict"):
        assert launchers.needs(load_recipe(recipe, [ranks, f"{stage}.device=cuda"])) == (3, 3)


@pytest.mark.ray
def test_run_has_a_private_ray_of_its_own_cpus_while_the_cluster_is_full(
    cluster: Any, runs: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    launcher, file = RayLauncher(runs, tmp_path), tmp_path / "seen.json"
    other = wait_in(launcher, runs[0], tmp_path)
    until(lambda: started(tmp_path, "one"))
    assert ended(launcher.start(runs[1], ["-c", OWN_RAY, str(file)])) == ""
    (tmp_path / "go").touch()
    assert ended(other) == ""
    seen = json.loads(file.read_text())
    assert seen["token"] != os.environ["RAY_AUTH_TOKEN"]
    assert (seen["cpus"], seen["nodes"], seen["threads"]) == (1, 1, "1")
    assert (seen["sum"], seen["here"]) == ([1, 2], str(Path.cwd()))
    assert len({node for run in runs for node in nodes_of(run, tmp_path)}) == 2


@pytest.mark.ray
def test_run_that_is_stopped_gets_sigterm_and_has_left_when_it_counts_as_ended(
    cluster: Any, runs: list[Run], tmp_path: Path
) -> None:
    launcher = RayLauncher(runs, tmp_path)
    third = Run("three", "tiny", {}, runs[0].recipe)
    launched = [wait_in(launcher, run, tmp_path) for run in (*runs, third)]
    until(lambda: len(list(tmp_path.glob("*.started"))) == 2)
    for one in launched:
        one.terminate()
    assert sorted(ended(one) for one in launched) == [
        "it was stopped (TaskCancelledError)",  # it had no CPU yet
        "its process ended with status 3",
        "its process ended with status 3",
    ]
    assert len(list(tmp_path.glob("*.stopped"))) == 2
    assert len(list(tmp_path.glob("*.started"))) == 2


@pytest.mark.ray
def test_run_is_started_again_when_its_worker_is_killed_and_named_when_itself_is(
    cluster: Any, runs: list[Run], tmp_path: Path
) -> None:
    launcher = RayLauncher(runs, tmp_path)
    one, two = (wait_in(launcher, run, tmp_path) for run in runs)
    (first,) = until(lambda: started(tmp_path, "one"))
    (other,) = until(lambda: started(tmp_path, "two"))
    os.kill(other, signal.SIGKILL)
    assert ended(two) == "its process ended with signal 9"
    process = psutil.Process(first)
    worker = process.parent()
    assert worker is not None
    worker.kill()
    until(lambda: one.poll() is not None or len(started(tmp_path, "one")) == 2)
    until(lambda: not process.is_running())  # it does not work on beside its successor
    assert (tmp_path / f"one-{first}.stopped").exists()
    (tmp_path / "go").touch()
    assert ended(one) == ""
    assert len(nodes_of(runs[0], tmp_path)) == 2


@pytest.mark.ray
def test_run_sees_the_gpus_it_has_asked_for_and_no_others(
    cluster: Any, grid: Path, runs: list[Run], tmp_path: Path
) -> None:
    recipe = load_recipe(str(grid.with_name("tiny.yaml")), ["predict.device=cuda"])
    both = [runs[0], Run("gpu", "tiny", {}, recipe)]
    launcher = RayLauncher(both, tmp_path)
    code = "import os, sys; open(sys.argv[1], 'w').write(os.environ['CUDA_VISIBLE_DEVICES'])"
    for run in both:
        assert ended(launcher.start(run, ["-c", code, str(tmp_path / run.name)])) == ""
    assert [(tmp_path / run.name).read_text() for run in both] == ["", "0"]


@pytest.mark.ray
def test_run_that_is_lost_again_and_again_fails(
    cluster: Any, runs: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launchers, "_MAX_LOSSES", 1)
    launched = RayLauncher(runs, tmp_path).start(
        runs[0], ["-c", "import os; os.kill(os.getppid(), 9)"]
    )
    assert ended(launched) == "Ray lost it 2 times, the last time by WorkerCrashedError"
    assert len(nodes_of(runs[0], tmp_path)) == 2


@pytest.mark.ray
def test_node_that_does_not_see_the_study_is_named(
    cluster: Any, runs: list[Run], tmp_path: Path
) -> None:
    launched = RayLauncher(runs, tmp_path / "elsewhere").start(runs[0], ["-c", ""])
    assert re.search(r"ConfigError: node \S+ does not see .*elsewhere", ended(launched))


@pytest.mark.ray
def test_run_that_no_node_can_take_waits_in_a_cluster_and_is_refused_without_one(
    cluster: Any,
    grid: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    recipe = load_recipe(str(grid.with_name("tiny.yaml")), ["train.num_processes=2"])
    large = Run("large", "tiny", {}, recipe)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match=r"large asks for 2 CPUs .* leave --ray out"):
        RayLauncher([large], tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    RayLauncher([large], tmp_path)
    assert "large asks for 2 CPUs and 0 GPUs of one node; it waits" in caplog.text


@pytest.mark.ray
@pytest.mark.distributed
@pytest.mark.slow_soak
@pytest.mark.timeout(600)
def test_study_on_ray_is_stopped_continues_and_has_the_bytes_of_a_local_one(
    cluster: Any, grid: Path, tmp_path: Path
) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    joined = environment | {"RAY_ADDRESS": cluster.address}
    local, spread = tmp_path / "local", tmp_path / "spread"
    script = [sys.executable, str(ROOT / "ray_jobs" / "study.py")]
    on_ray = [*script, *command(grid, spread, "--ray")[4:]]

    first = subprocess.Popen(on_ray, cwd=ROOT, env=joined, stderr=subprocess.DEVNULL)
    try:
        until(lambda: list(spread.glob("stages/tables-*/1_tables/manifest.json")), 200)
        family = processes_of(spread, first.pid)
        first.send_signal(signal.SIGTERM)
        assert first.wait(timeout=100) == 143
    finally:
        first.kill()
        first.wait()
    assert family
    assert not psutil.wait_procs(family, timeout=20)[1]

    finish(on_ray, joined, spread)
    shutil.copytree(spread, local, symlinks=True)
    again = local / "runs" / NAMES[1]
    for stage in ("6_train", "7_predict"):  # the other launcher has to make them again
        shutil.rmtree((again / stage).resolve().parent)
    finish(command(grid, local), environment, local)
    for name in NAMES:
        log = (spread / "runs" / name / launchers.LOG).read_text()
        assert "started on" in log
        assert "predict: committed" in log
        assert (spread / "runs" / name / PREDICTIONS).is_file()
    one, other = (root / "runs" / NAMES[1] / PREDICTIONS for root in (local, spread))
    assert not one.samefile(other)
    assert one.read_bytes() == other.read_bytes()


def finish(line: list[str], environment: dict[str, str], root: Path) -> None:
    """Run the study to its end: all runs but the broken one are finished."""
    done = subprocess.run(
        line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    (failed,) = [line for line in done.stderr.splitlines() if line.startswith("failed: ")]
    assert failed.startswith(f"failed: {BROKEN}: ")
    assert "/nowhere" in failed
    assert json.loads((root / PLAN).read_text())["finished"] == sorted(NAMES)


def processes_of(root: Path, driver: int) -> list[psutil.Process]:
    """The runs of a study and all that they have started."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if str(root) in process.cmdline() and process.pid != driver:
                found += [process, *process.children(recursive=True)]
    return found


@pytest.mark.ray
def test_run_is_started_again_elsewhere_when_its_node_dies(
    cluster: Any, runs: list[Run], tmp_path: Path
) -> None:
    """The last one: the cluster has one node afterwards."""
    launcher = RayLauncher(runs, tmp_path)
    launched = [wait_in(launcher, run, tmp_path) for run in runs]
    until(lambda: len(list(tmp_path.glob("*.started"))) == 2)
    doomed = cluster.worker_nodes.pop()
    (lost,) = [run for run in runs if nodes_of(run, tmp_path) == [doomed.node_id]]
    raylet = psutil.Process(doomed.all_processes["raylet"][0].process.pid)
    for process in (raylet, *raylet.children(recursive=True)):
        process.kill()
    (tmp_path / "go").touch()
    assert [ended(one) for one in launched] == ["", ""]
    where = nodes_of(lost, tmp_path)
    assert (where[0], len(where)) == (doomed.node_id, 2)
    assert where[1] == cluster.head_node.node_id
