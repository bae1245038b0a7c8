"""Faults in the data path: what is killed, filled or cut, and whether the outputs are the same.

A made-up log goes through stages 1 to 5 undisturbed once. Then the same command runs again and
again in other folders while its actors, its driver and a node of its cluster are killed, its disk
is full and its input is cut; after a fault that ends it, it is simply run again. A fault is
survived when the final artefacts have the undisturbed run's digests, no committed partition was
written a second time, nothing is left in `.running` and no process is left over.

Kills are aimed at progress, not at the clock: at a random share of a stage's partitions, so that
they fall into the work on a fast machine and on a busy one. Figures end the output, one a line:
FIGURE name value.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from benchmarks.report import Report, parser
from rellax_ds import runtime
from rellax_ds.artifacts import STAGES, WorkDir

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parent.parent
ON_RAY = {"embeddings": 24, "retrieval": 26, "shards": 25}
"""Stages that run partitions, with about how many of them there are."""
POLL = 0.01
LIMIT = 400.0


@dataclass
class Bench:
    """What all faults share.

    Attributes:
        folder: Where everything is written.
        recipe: Recipe of the made-up run.
        until: Last stage.
        random: Chooses victims and moments.
        page: Takes the checks.
        rows: Fault, where, and what it took, for the table.
    """

    folder: Path
    recipe: Path
    until: str
    random: random.Random
    page: Report
    rows: list[list[object]] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)

    @property
    def stages(self) -> tuple[str, ...]:
        """Stages that are run."""
        return STAGES[: STAGES.index(self.until) + 1]

    @property
    def on_ray(self) -> list[str]:
        """Stages that are run and have partitions."""
        return [stage for stage in ON_RAY if stage in self.stages]

    def settle(self, kind: str, run: Run, moments: list[str]) -> None:
        """Compare a finished run with the undisturbed one and note its faults."""
        found = {s: m.content for s in self.stages if (m := run.work.manifest(s)) is not None}
        wrong = [s for s in self.stages if found.get(s) != self.digests[s]]
        trouble = [f"other digests in {', '.join(wrong)}"] * bool(wrong)
        trouble += [f"{name} was written again" for name in run.rewritten]
        trouble += [".running is left over"] * (run.work.root / ".running").exists()
        left = run.survivors()
        trouble += [f"processes are left over: {left}"] * bool(left)
        self.page.check(not trouble, f"{kind} ({', '.join(moments)}): {'; '.join(trouble)}")
        for moment in moments:
            self.rows.append([kind, moment, "no" if trouble else "yes"])


class Run:
    """One folder, run until it is done; sees every committed partition and whether it is written
    twice.
    """

    def __init__(self, bench: Bench, name: str, root: Path | None = None, **extra: str) -> None:
        self.bench = bench
        self.work = WorkDir(root or bench.folder / name)
        self.mark = f"{os.getpid()}-{name}"
        self.extra = extra
        self.rewritten: list[str] = []
        self._seen: dict[str, tuple[int, int]] = {}
        self.output = ""

    def start(self, *arguments: str, cpus: int | None = None) -> subprocess.Popen[str]:
        """Start the command in a session of its own."""
        command = arguments or ("run", "--until", self.bench.until)
        flags = ["--recipe", str(self.bench.recipe), "--work-dir", str(self.work.root)]
        environment = runtime.child_environment(
            {
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
                "FAULTS_MARK": self.mark,
                **self.extra,
            }
        )
        chosen = ["taskset", "--cpu-list", ",".join(map(str, first_cpus(cpus)))] if cpus else []
        return subprocess.Popen(
            [*chosen, sys.executable, "-m", "rellax_ds.cli", *command, *flags],
            cwd=self.bench.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def follow(
        self, process: subprocess.Popen[str], act: Callable[[], bool] | None = None
    ) -> tuple[int, bool]:
        """Watch the folder until the process ends; `act` is called until it says True.

        Returns:
            Exit status, and whether `act` did.
        """
        lines: list[str] = []
        reader = threading.Thread(target=lambda: lines.extend(process.stdout or ()))
        reader.start()
        deadline, acted = time.monotonic() + LIMIT, act is None
        try:
            while process.poll() is None and time.monotonic() < deadline:
                self.witness()
                acted = acted or bool(act and act())
                time.sleep(POLL)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        reader.join(timeout=30)
        self.output = "".join(lines)
        return int(process.returncode), acted and act is not None

    def finish(self) -> None:
        """Run to the end, undisturbed."""
        status, _ = self.follow(self.start())
        self.bench.page.check(
            status == 0, f"{self.mark}: exit status {status}: {self.output[-600:]}"
        )

    def witness(self) -> None:
        """Note inode and time of every committed partition's record, and of the stages' files."""
        for path in self.work.root.glob(".running/*/*.committed.json"):
            with contextlib.suppress(OSError):
                facts = path.stat()
                name = f"{path.parent.name}/{path.name}"
                identity = (facts.st_ino, facts.st_mtime_ns)
                if self._seen.setdefault(name, identity) != identity:
                    self.rewritten.append(name)
                    self._seen[name] = identity

    def committed(self, stage: str) -> int:
        """Partitions of a stage that are committed; more than enough once the stage is."""
        if self.work.stage_dir(stage).exists():
            return 1 << 30
        number = STAGES.index(stage) + 1
        return len(list(self.work.root.glob(f".running/{number}_{stage}-*/*.committed.json")))

    def survivors(self, seconds: float = 30.0) -> list[str]:
        """Processes started by this run that still live after a grace time."""
        deadline = time.monotonic() + seconds
        while (left := marked(self.mark)) and time.monotonic() < deadline:
            time.sleep(0.1)
        return [f"{p.pid} {' '.join(p.info['cmdline'] or [])[:80]}" for p in left]


def marked(mark: str) -> list[psutil.Process]:
    """Living processes that carry a run's mark in their environment."""
    found = []
    for process in psutil.process_iter(["environ", "cmdline", "status"]):
        environment = process.info["environ"] or {}
        if environment.get("FAULTS_MARK") == mark and process.info["status"] != "zombie":
            found.append(process)
    return found


def first_cpus(count: int) -> list[int]:
    """The first CPUs this process may use."""
    return sorted(os.sched_getaffinity(0))[:count]


def actors_of(parents: list[int]) -> list[psutil.Process]:
    """Ray actors below some processes of ours."""
    found = []
    for parent in parents:
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(parent).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if "_Actor" in " ".join(child.cmdline()):
                        found.append(child)
    return found


def make_recipe(folder: Path) -> Path:
    """A log, a random model and a recipe with about 25 partitions a stage."""
    from rellax_ds.testing import tiny_recipe, write_movielens_100k

    log = write_movielens_100k(folder / "log", num_users=120, num_items=1200, num_events=14_000)
    return tiny_recipe(
        folder,
        data={"path": str(log)},
        embeddings={"encoder": "backbone", "partition_rows": 50},
        retrieval={"num_retrieved": 12, "partition_rows": 512, "heterogeneity_at": [5, 10]},
        shards={"train_rows": 1000, "valid_rows": 100, "test_rows": 100, "samples_per_shard": 48},
        crm={"max_epochs": 1, "embedding_dim": 8, "hidden_dim": 16, "history_length": 10},
    )


def undisturbed(bench: Bench) -> None:
    """The run the others are compared with."""
    run = Run(bench, "undisturbed")
    run.finish()
    bench.digests = {s: run.work.require(s).content for s in bench.stages}


def kill_actors(bench: Bench, name: str, cpus: int, kills_per_stage: int) -> None:
    """Kill random actors at random shares of every stage; the run must go on by itself."""
    run = Run(bench, name)
    plan = [
        (stage, int(share * ON_RAY[stage]))
        for stage in bench.on_ray
        for share in sorted(bench.random.uniform(0.0, 0.8) for _ in range(kills_per_stage))
    ]
    moments: list[str] = []
    process = run.start(cpus=cpus)

    def act() -> bool:
        while plan and run.committed(plan[0][0]) >= 1 << 30:
            plan.pop(0)
        if plan and run.committed(plan[0][0]) >= plan[0][1]:
            victims = actors_of([process.pid])
            if victims:
                stage, at = plan.pop(0)
                bench.random.choice(victims).kill()
                moments.append(f"{stage} at {at} of ~{ON_RAY[stage]}, {cpus} CPU")
        return not plan

    status, _ = run.follow(process, act)
    bench.page.check(status == 0, f"{name}: exit status {status}: {run.output[-600:]}")
    bench.settle("actor killed", run, moments)


def kill_drivers(bench: Bench, kills: int) -> None:
    """Kill the driver's whole session again and again, then let it finish."""
    run = Run(bench, "drivers")
    moments = []
    points = sorted(bench.random.sample(range(len(bench.on_ray) * 100), kills))
    for point in points:
        stage, share = bench.on_ray[point // 100], 0.9 * (point % 100) / 100
        at = int(share * ON_RAY[stage])
        process = run.start()

        def act(process: Any = process, stage: str = stage, at: int = at) -> bool:
            number = STAGES.index(stage) + 1
            begun = any(run.work.root.glob(f".running/{number}_{stage}-*"))
            if not begun or run.committed(stage) < at:
                return False
            os.killpg(process.pid, signal.SIGKILL)
            return True

        status, acted = run.follow(process, act)
        if acted and status == -signal.SIGKILL:
            moments.append(f"{stage} at {at} of ~{ON_RAY[stage]}")
        bench.page.check(not run.survivors(), "driver killed: its cluster outlives it")
    run.finish()
    bench.settle("driver killed", run, moments)


@contextlib.contextmanager
def two_nodes(folder: Path) -> Iterator[tuple[str, Any]]:
    """A cluster of two nodes with a CPU each, its files in `folder`: its address, and the node that
    may die.
    """
    runtime.guard_environment()
    from ray.cluster_utils import Cluster

    quick = {"health_check_period_ms": 300, "health_check_failure_threshold": 3}
    node = {"num_cpus": 1, "include_dashboard": False, "temp_dir": str(folder)}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "_system_config": quick})
    try:
        yield cluster.address, cluster.add_node(num_cpus=1)
    finally:
        cluster.shutdown()


def kill_node(bench: Bench) -> None:
    """Kill one raylet of two in the middle of a stage."""
    stage = bench.on_ray[0]
    with two_nodes(bench.folder / "r") as (address, doomed):
        run = Run(bench, "node", RAY_ADDRESS=address)
        raylet = psutil.Process(doomed.all_processes["raylet"][0].process.pid)
        at = bench.random.randrange(1, ON_RAY[stage] // 2)

        def act() -> bool:
            if run.committed(stage) < at or not actors_of([raylet.pid]):
                return False
            raylet.kill()
            return True

        status, acted = run.follow(run.start(), act)
    bench.page.check(status == 0, f"node: exit status {status}: {run.output[-600:]}")
    bench.settle("raylet killed", run, [f"{stage} at {at} of ~{ON_RAY[stage]}"] * acted)


def fill_disk(bench: Bench) -> None:
    """Run on a file system with too little room, then with enough."""
    mount = bench.folder / "small"
    mount.mkdir()
    undisturbed = bench.folder / "undisturbed"
    total = sum(p.stat().st_size for p in undisturbed.rglob("*") if p.is_file()) // 1024
    sizes = [bench.random.uniform(0.2, 0.9)]
    options = [f"size={max(64, int(total * share))}k" for share in sizes]
    made = ["mount", "-t", "tmpfs", "-o", options[0], "none", str(mount)]
    if subprocess.run(made, capture_output=True, check=False).returncode:
        bench.page.body.append(
            "Full disk: not tried, a small file system needs the right to mount."
        )
        return
    try:
        run, moments = Run(bench, "disk", mount / "run"), []
        for option in options:
            subprocess.run(["mount", "-o", f"remount,{option}", str(mount)], check=True)
            status, _ = run.follow(run.start())
            error = run.output.splitlines()[-1]
            told = error.startswith("error: ") and "bytes are free" in error
            bench.page.check(status == 1 and told, f"full disk: {status}, {run.output[-600:]}")
            moments.append(f"{option} of {total}k")
        subprocess.run(["mount", "-o", "remount,size=1g", str(mount)], check=True)
        run.finish()
        bench.settle("disk full", run, moments)
    finally:
        subprocess.run(["umount", "--lazy", str(mount)], check=False)


def cut_input(bench: Bench) -> None:
    """Cut the raw file before the run, and a table between two stages."""
    log = bench.folder / "log" / "ml-100k.inter"
    whole = log.read_bytes()
    cut = whole[: len(whole) // 2].rfind(b"\n") + 4  # the last row is half a user id
    run, moments = Run(bench, "input"), []
    try:
        log.write_bytes(whole[:cut])
        status, _ = run.follow(run.start())
    finally:
        log.write_bytes(whole)
    refused(bench, run, status, "ml-100k.inter")
    moments.append(f"raw file at {cut} of {len(whole)} bytes")
    last = bench.on_ray[-1] if "retrieval" not in bench.stages else "retrieval"
    run.follow(run.start("run", "--until", STAGES[STAGES.index(last) - 1]))
    table = run.work.stage_dir("tables") / ("items" if last == "embeddings" else "events")
    table = table.with_suffix(".parquet")
    size = table.stat().st_size
    table.write_bytes(table.read_bytes()[: size // 2])
    status, _ = run.follow(run.start(last))
    refused(bench, run, status, table.name)
    moments.append(f"{table.name} at {size // 2} of {size} bytes")
    run.finish()
    bench.settle("input cut", run, moments)


def refused(bench: Bench, run: Run, status: int, name: str) -> None:
    """Check that a run ended with one line that names the file."""
    error = run.output.splitlines()[-1] if run.output else ""
    told = error.startswith("error: ") and name in error and "Traceback" not in run.output
    bench.page.check(status == 1 and told, f"input cut: {status}, {run.output[-600:]}")


def two_drivers(bench: Bench) -> None:
    """Start the same command twice at once on one folder."""
    first, second = Run(bench, "twice"), Run(bench, "twice")
    processes = [run.start() for run in (first, second)]
    other = threading.Thread(target=second.follow, args=(processes[1],))
    other.start()
    status, _ = first.follow(processes[0])
    other.join()
    done = [status, processes[1].returncode]
    bench.page.check(
        done == [0, 0], f"two drivers: {done}: {first.output[-300:]}{second.output[-300:]}"
    )
    bench.settle("two drivers at once", first, ["the whole run"])


FAULTS: dict[str, Callable[[Bench], None]] = {
    "actors": lambda bench: kill_actors(bench, "actors", cpus=2, kills_per_stage=2),
    "one_cpu": lambda bench: kill_actors(bench, "one_cpu", cpus=1, kills_per_stage=2),
    "drivers": lambda bench: kill_drivers(bench, kills=5),
    "node": kill_node,
    "disk": fill_disk,
    "input": cut_input,
    "twice": two_drivers,
}


def main() -> int:
    """Try every fault; 1 when one of them changed an output or was recovered by computing again."""
    arguments = parser(__doc__)
    arguments.add_argument("--seed", type=int, default=int(time.time()))
    arguments.add_argument("--until", default="shards", choices=STAGES[1:5])
    arguments.add_argument("--faults", default=",".join(FAULTS), help="some of the default")
    options = arguments.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that folders and runs are cleared
    page = Report("faults")
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="rellax-faults-") as name:
        folder = Path(name)
        bench = Bench(folder, make_recipe(folder), options.until, random.Random(options.seed), page)
        start = time.monotonic()
        undisturbed(bench)
        if page.failures:
            return page.finish(options.report)
        print(f"undisturbed: {time.monotonic() - start:.1f} s", flush=True)
        for fault in options.faults.split(","):
            before = time.monotonic()
            FAULTS[fault](bench)
            print(f"{fault}: {time.monotonic() - before:.1f} s", flush=True)
    survived = sum(row[2] == "yes" for row in bench.rows)
    page.figures = {"faults_tried": len(bench.rows), "faults_survived": survived}
    for kind in dict.fromkeys(str(row[0]) for row in bench.rows):
        page.figures[f"faults_{kind.replace(' ', '_')}"] = sum(row[0] == kind for row in bench.rows)
    page.figures["faults_minutes"] = (time.monotonic() - start) / 60
    page.body.append(f"Seed {options.seed}.")
    page.table(["fault", "where", "same digests, nothing committed computed again"], bench.rows)
    return page.finish(options.report)


if __name__ == "__main__":
    sys.exit(main())
