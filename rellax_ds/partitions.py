"""Idempotent partitions on Ray: the unit of work, retry and resume of every distributed stage.

A partition has a name fixed by its input and writes its own files; nothing depends on which worker
ran it or when. A worker writes into a private folder, the files are hashed and renamed into place,
and a small JSON record commits them. A rerun after a kill skips every partition whose record and
files still verify. Results come back in the order of the partitions, so what a stage makes of them
is the same for one worker or many.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rellax_ds import runtime
from rellax_ds.artifacts import file_sha256, fsync, write_json
from rellax_ds.errors import ArtifactError, RellaxError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_MAX_ATTEMPTS = 3


@dataclass(frozen=True)
class Partition:
    """One piece of a stage's input.

    Attributes:
        name: Fixed-width name, for example `part-00017`; its files begin with it.
        payload: What the worker needs to know; small, JSON-like, picklable.
    """

    name: str
    payload: dict[str, Any]


@dataclass(frozen=True)
class PartitionRecord:
    """A committed partition: its files (name to bytes and sha256), the worker's counts, and whether
    it was reused.
    """

    name: str
    files: dict[str, dict[str, Any]]
    counts: dict[str, Any]
    reused: bool


class Worker(Protocol):
    """A class whose instances process partitions; built once per Ray actor from picklable keyword
    arguments.
    """

    def __call__(self, partition: Partition, directory: Path) -> dict[str, Any]:
        """Write the partition's files, each named `PARTITION...`, into `directory` and return
        counts.
        """
        ...


def split_rows(num_rows: int, rows_per_partition: int) -> list[Partition]:
    """Cut `num_rows` rows into partitions with payload `start` and `stop`."""
    starts = range(0, num_rows, rows_per_partition)
    return [
        Partition(
            f"part-{n:05d}", {"start": start, "stop": min(start + rows_per_partition, num_rows)}
        )
        for n, start in enumerate(starts)
    ]


def connect() -> None:
    """Join the Ray cluster that RAY_ADDRESS or `ray job submit` names; else start a private one.

    A cluster that merely runs on this machine is left alone; RAY_ADDRESS=auto joins it.
    """
    runtime.guard_environment()
    import ray

    address = runtime.ray_address()
    if ray.is_initialized():
        return
    if address:
        ray.init(address=address, log_to_driver=False, configure_logging=False)
        runtime.logger.info("ray: joined the cluster at %s", address)
    else:
        ray.init(
            address="local",
            num_cpus=runtime.num_cpus(),
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
        )


def disconnect() -> None:
    """Leave the Ray cluster, and end it if it is our own; `connect` may be called again."""
    if "ray" in sys.modules:
        import ray

        ray.shutdown()


def run_partitions(
    label: str,
    partitions: Sequence[Partition],
    worker: type,
    settings: Mapping[str, Any],
    directory: Path,
    key: str,
    num_gpus: float = 0.0,
) -> list[PartitionRecord]:
    """Process partitions on Ray actors, skipping those already committed under `key` in
    `directory`.

    Args:
        label: Name for the progress line.
        partitions: The work; names must be unique.
        worker: Importable class, see `Worker`; one instance per actor.
        settings: Keyword arguments of `worker`.
        directory: Folder for the output files, on a file system every worker sees.
        key: Digest of everything the outputs depend on; records with another key are redone.
        num_gpus: GPUs an actor needs.

    Returns:
        One record per partition, in order.

    Raises:
        ArtifactError: A partition failed `_MAX_ATTEMPTS` times; names it and the cause.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in directory.glob(".writing-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    records = {p.name: _read_record(directory, p.name, key) for p in partitions}
    todo = [p for p in partitions if records[p.name] is None]
    if len(todo) < len(partitions):
        runtime.logger.info(
            "%s: %d of %d partitions are already committed",
            label,
            len(partitions) - len(todo),
            len(partitions),
        )
    if todo:
        done = _run_on_actors(label, todo, worker, settings, directory, key, num_gpus)
        records.update(done)
    return [record for p in partitions if (record := records[p.name]) is not None]


def process(instance: Worker, partition: Partition, directory: Path, key: str) -> PartitionRecord:
    """Run one partition and commit its files; what the actor executes, and what a test can call
    directly.
    """
    private = directory / f".writing-{partition.name}-{os.getpid()}"
    shutil.rmtree(private, ignore_errors=True)
    private.mkdir(parents=True)
    try:
        counts = instance(partition, private)
        files = {}
        for path in sorted(private.iterdir()):
            if not path.name.startswith(partition.name):
                raise ArtifactError(
                    f"partition {partition.name} wrote '{path.name}', which is not named after it"
                )
            fsync(path)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for name in files:
            (private / name).replace(directory / name)
        fsync(directory)
        record = {"key": key, "files": files, "counts": counts}
        write_json(_record_path(directory, partition.name), record)
    finally:
        shutil.rmtree(private, ignore_errors=True)
    return PartitionRecord(partition.name, files, counts, reused=False)


def drop_records(directory: Path, records: Sequence[PartitionRecord], files: bool = False) -> None:
    """Remove the records (and with `files` the outputs) once a stage has merged what it needs from
    them.
    """
    for record in records:
        _record_path(directory, record.name).unlink(missing_ok=True)
        if files:
            for name in record.files:
                (directory / name).unlink(missing_ok=True)


def _record_path(directory: Path, name: str) -> Path:
    return directory / f"{name}.committed.json"


def _read_record(directory: Path, name: str, key: str) -> PartitionRecord | None:
    try:
        record = json.loads(_record_path(directory, name).read_text(encoding="utf-8"))
        if record["key"] != key:
            return None
        for file, facts in record["files"].items():
            path = directory / file
            if path.stat().st_size != facts["bytes"] or file_sha256(path) != facts["sha256"]:
                return None
        return PartitionRecord(name, record["files"], record["counts"], reused=True)
    except (OSError, ValueError, KeyError, TypeError):
        return None


class _Actor:
    """Body of the Ray actor: finds the worker class by name, so nothing is pickled by a script's
    name.
    """

    def __init__(self, module: str, name: str, settings: dict[str, Any]) -> None:
        runtime.prepare()
        self._worker: Worker = getattr(importlib.import_module(module), name)(**settings)

    def run(self, partition: Partition, directory: str, key: str) -> PartitionRecord:
        return process(self._worker, partition, Path(directory), key)


def _run_on_actors(
    label: str,
    todo: Sequence[Partition],
    worker: type,
    settings: Mapping[str, Any],
    directory: Path,
    key: str,
    num_gpus: float,
) -> dict[str, PartitionRecord]:
    import ray

    connect()
    resources = ray.cluster_resources()
    slots = resources.get("GPU", 0) / num_gpus if num_gpus else resources.get("CPU", 1)
    num_actors = max(1, min(len(todo), int(slots)))
    remote = ray.remote(num_cpus=1, num_gpus=num_gpus, max_restarts=-1, max_task_retries=-1)(_Actor)
    actors = [
        remote.remote(worker.__module__, worker.__name__, dict(settings)) for _ in range(num_actors)
    ]
    waiting = list(reversed(todo))
    attempts: dict[str, int] = {}
    running: dict[Any, tuple[Any, Partition]] = {}
    done: dict[str, PartitionRecord] = {}

    def submit(actor: Any) -> None:
        if waiting:
            partition = waiting.pop()
            running[actor.run.remote(partition, str(directory), key)] = (actor, partition)

    try:
        with runtime.Progress(label, len(todo), "partitions") as progress:
            for actor in actors:
                submit(actor)
            while running:
                (finished, *_), _ = ray.wait(list(running), num_returns=1)
                actor, partition = running.pop(finished)
                try:
                    done[partition.name] = ray.get(finished)
                    progress.advance()
                except ray.exceptions.RayTaskError as error:
                    _count_attempt(label, partition, error.cause or error, attempts)
                    waiting.append(partition)
                submit(actor)
    finally:
        for actor in actors:
            ray.kill(actor)
    return done


def _count_attempt(
    label: str, partition: Partition, cause: BaseException, attempts: dict[str, int]
) -> None:
    """Count a failure; re-raise at once what no retry can mend."""
    if isinstance(cause, RellaxError):
        raise cause
    attempts[partition.name] = attempts.get(partition.name, 0) + 1
    if not isinstance(cause, (OSError, MemoryError)) or attempts[partition.name] >= _MAX_ATTEMPTS:
        raise ArtifactError(
            f"{label}: partition {partition.name} failed: {type(cause).__name__}: {cause}"
        ) from cause
    runtime.logger.warning(
        "%s: partition %s failed (%s), trying again", label, partition.name, cause
    )
