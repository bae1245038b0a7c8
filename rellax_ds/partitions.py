"""Idempotent partitions on Ray: the unit of work, retry and resume of every distributed stage.

A partition has a name fixed by its input and writes its own files; nothing depends on which worker
ran it or when. A worker writes into a private folder outside the output, the files are hashed and
linked into place, and a small JSON record, linked last, commits them. A link never replaces: of two
attempts at one partition (a second driver, or the late worker of a killed one) the first wins and
the other takes over its record. A worker looks for a record before it computes, so no committed
partition is computed twice, and a rerun after a kill does only what is missing. Results come back
in the order of the partitions, so what a stage makes of them is the same for one worker or many.

Ray restarts an actor that dies, also on another node. What it cannot know is when to stop: a
partition that keeps killing its workers leaves their private folders behind, and these are counted.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import platform
import secrets
import shutil
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rellax_ds import runtime
from rellax_ds.artifacts import file_sha256, fsync, out_of_space, set_aside, write_json
from rellax_ds.errors import ArtifactError, ConfigError, RellaxError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_MAX_ATTEMPTS = 3
_MAX_DEATHS = 10
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS}


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
    num_workers: int | None = None,
    unit: str | None = None,
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
        num_workers: Actors; by default as many as the cluster has CPUs (or GPUs) for.
        unit: A count of the worker's whose rate the progress line shows, for example `rows`.

    Returns:
        One record per partition, in order.

    Raises:
        ArtifactError: A partition failed `_MAX_ATTEMPTS` times, killed `_MAX_DEATHS` workers, or
            found no space; names it and the cause.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _drop_private_of_the_dead(directory)
    records = {p.name: read_record(directory, p.name, key) for p in partitions}
    todo = [p for p in partitions if records[p.name] is None]
    if len(todo) < len(partitions):
        runtime.logger.info(
            "%s: %d of %d partitions are already committed",
            label,
            len(partitions) - len(todo),
            len(partitions),
        )
    if todo:
        pool = _Pool(label, todo, directory, key, unit)
        records.update(pool.run(worker, settings, num_gpus, num_workers))
    # Every partition is committed: whatever an attempt still holds in private is of no use.
    shutil.rmtree(private_folder(directory), ignore_errors=True)
    return [record for p in partitions if (record := records[p.name]) is not None]


def process(instance: Worker, partition: Partition, directory: Path, key: str) -> PartitionRecord:
    """Run one partition and commit its files, unless it is committed already; what the actor
    executes, and what a test can call directly.
    """
    directory.mkdir(parents=True, exist_ok=True)
    found = read_record(directory, partition.name, key)
    if found is not None:
        return found
    private = _open_private(directory, partition.name)
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
        return _publish(
            private, directory, PartitionRecord(partition.name, files, counts, False), key
        )
    except Exception as error:
        full = out_of_space(error, directory)
        if full is None:
            raise
        written = sum(p.stat().st_size for p in private.iterdir())
        raise ArtifactError(
            f"{full}; partition {partition.name} needs more than the {written} bytes it had written"
        ) from error
    finally:
        shutil.rmtree(private, ignore_errors=True)


def drop_records(directory: Path, records: Sequence[PartitionRecord], files: bool = False) -> None:
    """Leave the records (and with `files` the outputs) out of the artefact, once a stage has merged
    what it needs from them.

    They are deleted when the stage is committed, not before: a driver killed while it merges or
    hashes finds every partition again.
    """
    names = [_record_path(directory, record.name).name for record in records]
    if files:
        names += [name for record in records for name in record.files]
    set_aside(directory, names)


def read_record(directory: Path, name: str, key: str) -> PartitionRecord | None:
    """The record of a partition committed under `key` whose files still verify, else None."""
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


def private_folder(directory: Path) -> Path:
    """Where attempts write before they commit to `directory`: beside it, so that a late worker's
    half-written file is never part of an artefact.
    """
    return directory.parent / f".writing-{directory.name}"


def _record_path(directory: Path, name: str) -> Path:
    return directory / f"{name}.committed.json"


def _open_private(directory: Path, name: str) -> Path:
    """A new private folder; its name says whose it is."""
    folder = private_folder(directory)
    deaths = len(list(folder.glob(f"{name}@*")))
    if deaths >= _MAX_DEATHS:
        raise ArtifactError(
            f"partition {name} took {deaths} workers down with it; look for the cause in Ray's "
            "logs (most often memory: make partitions smaller), then run again"
        )
    private = folder / f"{name}@{platform.node()}@{os.getpid()}@{secrets.token_hex(4)}"
    private.mkdir(parents=True)
    return private


def _drop_private_of_the_dead(directory: Path) -> None:
    """Remove what processes of this machine that no longer live have left in private."""
    for private in private_folder(directory).glob(f"*@{platform.node()}@*@*"):
        try:
            os.kill(int(private.name.split("@")[-2]), 0)
        except ProcessLookupError:
            shutil.rmtree(private, ignore_errors=True)
        except OSError:
            continue


def _publish(private: Path, directory: Path, record: PartitionRecord, key: str) -> PartitionRecord:
    """Link files and record into `directory`; the record that stands there afterwards."""
    for name, facts in record.files.items():
        target = directory / name
        if not _link(private / name, target) and (
            target.stat().st_size != facts["bytes"] or file_sha256(target) != facts["sha256"]
        ):
            standing = read_record(directory, record.name, key)
            if standing is not None:
                return standing
            (private / name).replace(target)  # damaged, or of another key: nothing stands on it
    fsync(directory)
    document = {"key": key, "files": record.files, "counts": record.counts}
    staged, target = private / "record", _record_path(directory, record.name)
    write_json(staged, document)
    if not _link(staged, target):
        standing = read_record(directory, record.name, key)
        if standing is not None:
            return standing
        staged.replace(target)
    fsync(directory)
    return record


def _link(source: Path, target: Path) -> bool:
    """Give `source` the name `target` unless that name is taken; says whether it was free."""
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if target.exists():  # without links the check and the rename are two steps
            return False
        source.rename(target)
    return True


class _Actor:
    """Body of the Ray actor: finds the worker class by name, so nothing is pickled by a script's
    name.

    The worker is built by the first partition: an error in its constructor is then an error of that
    partition, with its type, and not the death of an actor.
    """

    def __init__(self, module: str, name: str, settings: dict[str, Any]) -> None:
        runtime.prepare()
        self._made_of = (module, name, settings)
        self._worker: Worker | None = None

    def run(self, partition: Partition, directory: str, key: str) -> PartitionRecord:
        if self._worker is None:
            module, name, settings = self._made_of
            self._worker = getattr(importlib.import_module(module), name)(**settings)
        return process(self._worker, partition, Path(directory), key)


class _Pool:
    """Partitions on their way through a set of actors.

    While there are more partitions than actors every actor has its next one queued, so that it does
    not wait for the driver; the last ones go to whoever is free. An actor without work is ended at
    once: its CPU may be the one that another, waiting actor needs.
    """

    def __init__(
        self, label: str, todo: Sequence[Partition], directory: Path, key: str, unit: str | None
    ) -> None:
        self._label, self._directory, self._key, self._unit = label, directory, key, unit
        self._waiting = deque(todo)
        self._attempts: dict[str, int] = {}
        self._running: dict[Any, tuple[Any, Partition]] = {}
        self._done: dict[str, PartitionRecord] = {}
        self._total = len(todo)
        self._rows = 0
        self._load: dict[Any, int] = {}

    def run(
        self, worker: type, settings: Mapping[str, Any], num_gpus: float, num_workers: int | None
    ) -> dict[str, PartitionRecord]:
        """Process everything; records by partition name."""
        import ray

        connect()
        resources = ray.cluster_resources()
        slots = resources.get("GPU", 0) / num_gpus if num_gpus else resources.get("CPU", 1)
        if slots < 1:
            _refuse_or_wait(self._label, num_gpus)
        num_actors = max(1, min(self._total, num_workers or int(slots)))
        made = ray.remote(num_cpus=1, num_gpus=num_gpus, max_restarts=-1, max_task_retries=-1)(
            _Actor
        )
        arguments = (worker.__module__, worker.__name__, dict(settings))
        self._load = {made.remote(*arguments): 0 for _ in range(num_actors)}
        start = time.monotonic()
        try:
            with runtime.Progress(self._label, self._total, "partitions") as progress:
                for actor in list(self._load):
                    self._feed(actor)
                while self._running:
                    (finished, *_), _ = ray.wait(list(self._running), num_returns=1)
                    record = self._take(finished)
                    if record is not None:
                        progress.advance(note=self._rate(record, time.monotonic() - start))
        finally:
            # After an error some still work. They end after what they have: Ray would report every
            # partition of a killed one to the terminal.
            for actor in self._load:
                actor.__ray_terminate__.options(max_task_retries=0).remote()
        return self._done

    def _feed(self, actor: Any) -> None:
        """Give an actor work up to its depth, or end it when there is none left."""
        import ray

        depth = 2 if len(self._waiting) > len(self._load) else 1
        while self._waiting and self._load[actor] < depth:
            partition = self._waiting.popleft()
            task = actor.run.remote(partition, str(self._directory), self._key)
            self._running[task] = (actor, partition)
            self._load[actor] += 1
        if not self._load[actor]:
            del self._load[actor]
            ray.kill(actor)

    def _take(self, finished: Any) -> PartitionRecord | None:
        """Receive one result and feed its actor; None when the partition has to be tried again."""
        import ray

        actor, partition = self._running.pop(finished)
        self._load[actor] -= 1
        record = None
        try:
            record = ray.get(finished)
            self._done[partition.name] = record
        except ray.exceptions.RayTaskError as error:
            _count_attempt(self._label, partition, error.cause or error, self._attempts)
            self._waiting.appendleft(partition)
        except ray.exceptions.RayError as error:
            raise ArtifactError(
                f"{self._label}: partition {partition.name}: Ray lost it ({type(error).__name__}: "
                f"{' '.join(str(error).split())}); run again, what is committed is kept"
            ) from error
        self._feed(actor)
        return record

    def _rate(self, record: PartitionRecord, seconds: float) -> str:
        if self._unit is None:
            return ""
        self._rows += int(record.counts.get(self._unit, 0))
        return f"{self._rows / max(seconds, 1e-9):.0f} {self._unit}/s"


def _refuse_or_wait(label: str, num_gpus: float) -> None:
    """Say that no node can take an actor: a cluster may grow one, our own never will."""
    if runtime.ray_address() is None:
        raise ConfigError(
            f"{label}: needs {num_gpus:g} GPU and this machine has none; set the section's device "
            "to cpu, or submit to a cluster with GPUs"
        )
    runtime.logger.warning("%s: waits until the cluster has %g GPU", label, num_gpus)


def _count_attempt(
    label: str, partition: Partition, cause: BaseException, attempts: dict[str, int]
) -> None:
    """Count a failure; re-raise at once what no retry can mend."""
    if isinstance(cause, RellaxError):
        raise cause
    attempts[partition.name] = attempts.get(partition.name, 0) + 1
    # torch's CUDA error is known by name: this floor does not import torch.
    again = isinstance(cause, (OSError, MemoryError)) or type(cause).__name__ == "OutOfMemoryError"
    if not again or attempts[partition.name] >= _MAX_ATTEMPTS:
        raise ArtifactError(
            f"{label}: partition {partition.name} failed: {type(cause).__name__}: {cause}"
        ) from cause
    runtime.logger.warning(
        "%s: partition %s failed (%s), trying again", label, partition.name, cause
    )
