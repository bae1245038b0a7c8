"""Where the runs of a study go: processes of this machine, or tasks of a Ray cluster.

`study.run_all` decides which run is next and what a failure means; a launcher starts it, says
whether it has ended, and passes a stop on. In both cases a run is a process of its own, with the
same command. On Ray a task holds the run's CPUs and GPUs on one node and does nothing but start the
process there and wait for it.

The stages of a run use Ray themselves. That process must not join the cluster its task is part of:
its actors would wait for CPUs that the tasks hold, among them its own. So it is detached
(`runtime.detached_environment`) and starts a private Ray of as many CPUs as its task asked for.
"""

from __future__ import annotations

import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rellax_ds import runtime
from rellax_ds.errors import ConfigError
from rellax_ds.partitions import connect
from rellax_ds.study import PLAN

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rellax_ds.config import Recipe
    from rellax_ds.study import Run

LOG = "log.txt"
"""In a run's folder: what its process said, when Ray started it."""

_MAX_LOSSES = 3
"""How often a run is started again because Ray lost its worker or node."""

_POLL_SECONDS = 0.1


class Launched(Protocol):
    """A run on its way."""

    def poll(self) -> str | None:
        """None while it runs; then how it ended, empty if it ended well."""
        ...

    def terminate(self) -> None:
        """Ask it to stop in good order; it has left when `poll` says so."""
        ...


class Launcher(Protocol):
    """Starts runs.

    Attributes:
        hears_interrupt: Whether a terminal's Ctrl-C reaches the runs by itself.
    """

    hears_interrupt: bool

    def start(self, run: Run, arguments: Sequence[str]) -> Launched:
        """Start `python ARGUMENTS`, the process of `run`."""
        ...


class LocalLauncher:
    """Runs as child processes of this one."""

    hears_interrupt = True

    def start(self, run: Run, arguments: Sequence[str]) -> Launched:
        """Start a child process."""
        command = [sys.executable, *arguments]
        return _Child(subprocess.Popen(command, env=runtime.child_environment()))


class _Child:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def poll(self) -> str | None:
        status = self._process.poll()
        return None if status is None else _ended(status)

    def terminate(self) -> None:
        self._process.terminate()


class RayLauncher:
    """Runs as tasks of the Ray cluster that `partitions.connect` joins.

    A run whose worker or node is lost is started again where there is room: what it has committed
    is kept, and a training continues from its checkpoint.
    """

    hears_interrupt = False

    def __init__(self, runs: Sequence[Run], root: Path) -> None:
        """Join the cluster.

        Args:
            runs: What is going to be started.
            root: The study's folder, the same on every node.

        Raises:
            ConfigError: There is no cluster but this machine, which is too small for a run.
        """
        self._root = root
        if runs:
            connect()
            _check_room(runs)

    def start(self, run: Run, arguments: Sequence[str]) -> Launched:
        """Submit a task; Ray starts it on a node that has the CPUs and GPUs it asks for."""
        import ray

        num_cpus, num_gpus = needs(run.recipe)
        task = ray.remote(run_process).options(
            name=f"study {run.name}",
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            max_retries=0,  # lost ones are counted here, also those that ran out of memory
            scheduling_strategy="SPREAD",  # Ray does not know how much memory a run takes
        )
        settings = runtime.travelling_environment() | {"RELLAX_NUM_CPUS": str(num_cpus)}
        folders = (self._root, run.work(self._root).root, Path.cwd())
        given = (list(arguments), *map(str, folders))
        return _Task(run.name, lambda: task.remote(*given, settings))


class _Task:
    """A Ray task, and those that take its place when it is lost."""

    def __init__(self, name: str, submit: Callable[[], Any]) -> None:
        self._name, self._submit = name, submit
        self._reference = submit()
        self._losses = 0
        self._stopped = False

    def poll(self) -> str | None:
        import ray

        ready, _ = ray.wait([self._reference], timeout=0)
        if not ready:
            return None
        try:
            return _ended(ray.get(self._reference))
        except ray.exceptions.RayTaskError as error:
            cause = error.cause or error
            return " ".join(f"its task failed: {type(cause).__name__}: {cause}".split())
        except ray.exceptions.RayError as error:
            lost = type(error).__name__
        if self._stopped:
            return f"it was stopped ({lost})"
        self._losses += 1
        if self._losses > _MAX_LOSSES:
            return f"Ray lost it {self._losses} times, the last time by {lost}"
        runtime.logger.warning("study: Ray lost %s (%s); it is started again", self._name, lost)
        self._reference = self._submit()
        return None

    def terminate(self) -> None:
        import ray

        self._stopped = True
        ray.cancel(self._reference, force=False)


def needs(recipe: Recipe) -> tuple[int, int]:
    """CPUs and GPUs of a run on Ray: one for each rank, GPUs if one of its stages is on `cuda`."""
    ranks = recipe.train.num_processes
    devices = {recipe.embeddings.device, recipe.retrieval.device, recipe.predict.device}
    return ranks, ranks if "cuda" in devices else 0


def run_process(
    arguments: list[str], root: str, work: str, directory: str, settings: dict[str, str]
) -> int:
    """Start the process of a run on this node and wait for it; what the Ray task executes.

    Ray cancels a task by an interrupt of its main thread. It is taken as a request here, so that
    the process gets its SIGTERM and the time it needs, and the task ends after it.

    Args:
        arguments: Arguments of the Python interpreter.
        root: The study's folder.
        work: The run's folder.
        directory: Where to start it, if this node has that folder.
        settings: Environment variables beside the node's own.

    Returns:
        Its exit status.

    Raises:
        ConfigError: This node does not see the study's folder.
    """
    import ray

    if not (Path(root) / PLAN).is_file():
        raise ConfigError(
            f"node {platform.node()} does not see {root}; choose a --work-dir on a file system "
            "that all nodes share"
        )
    log = Path(work) / LOG
    log.parent.mkdir(parents=True, exist_ok=True)
    node = ray.get_runtime_context().get_node_id()
    devices = ",".join(map(str, ray.get_gpu_ids()))  # none: no GPU, and not all of them
    asked: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: asked.append(number))
    try:
        with log.open("ab", buffering=0) as output:
            output.write(f"started on {platform.node()}, Ray node {node}\n".encode())
            process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=directory if Path(directory).is_dir() else None,
                env=runtime.detached_environment({**settings, "CUDA_VISIBLE_DEVICES": devices}),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        while process.poll() is None:
            time.sleep(_POLL_SECONDS)
            if asked:
                asked.clear()
                process.terminate()
    finally:
        signal.signal(signal.SIGINT, before)
    return process.returncode


def _check_room(runs: Sequence[Run]) -> None:
    """Say which runs no node can take: a cluster may grow one, our own never will."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    wanted = {needs(run.recipe): run.name for run in runs}
    for (num_cpus, num_gpus), name in wanted.items():
        if any(n.get("CPU", 0) >= num_cpus and n.get("GPU", 0) >= num_gpus for n in nodes):
            continue
        need = f"{name} asks for {num_cpus} CPUs and {num_gpus} GPUs of one node"
        if runtime.ray_address() is None:
            raise ConfigError(
                f"study: {need}, and this machine has fewer; leave --ray out, or name a cluster by "
                "RAY_ADDRESS"
            )
        runtime.logger.warning("study: %s; it waits until the cluster has such a node", need)


def _ended(status: int) -> str:
    """How a process ended, empty if well."""
    if not status:
        return ""
    return f"its process ended with {f'signal {-status}' if status < 0 else f'status {status}'}"
