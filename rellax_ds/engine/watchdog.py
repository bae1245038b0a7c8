"""Signs of life of every rank, and the thread that ends a hanging job and says who is missing.

A rank that was stopped, or that sits in a dead file system, answers nobody, and the others wait for
it in a collective that names no one. So each rank writes a small record into the run's folder, its
counter raised by a thread and what the main thread is doing beside it. When the main thread has
made no progress for too long, the thread reads everybody's records twice: a counter that stands
still is a rank that does not answer; where all counters move, the rank behind the others in its
collectives is the one they wait for.

Records are files because the store of torch's rendezvous lives in rank 0 and would be gone with it;
counters are compared with themselves only, so the hosts' clocks do not matter.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed

from rellax_ds import runtime

if TYPE_CHECKING:
    from types import TracebackType

    from rellax_ds.engine.processes import Processes

RANKS = "ranks"
"""Folder of the records, in the stage's running folder."""

ORPHAN_SECONDS = 15.0
"""How long a rank without its launcher may take to leave in good order."""

_RECORD_BYTES = 512
_INTERVAL = 5.0  # longest time between two records, seconds
_PATIENCE = 3  # intervals in which a living rank has certainly written


class Launcher:
    """The processes that started this rank: its parent, and the `rellax` command if one did."""

    def __init__(self) -> None:
        """Remember the parent of this process."""
        self._parent = os.getppid()

    def gone(self) -> bool:
        """Whether one of them has ended."""
        command = runtime.launcher_process()
        return os.getppid() != self._parent or (command is not None and not _alive(command))


class Watchdog:
    """Watches this rank's progress and its launcher; a context manager around the training.

    A job of one process has nobody to wait for and is not watched.
    """

    def __init__(self, processes: Processes, folder: Path, timeout: float) -> None:
        """Watch `processes`.

        Args:
            processes: The ranks; their collectives count as progress.
            folder: Where the ranks leave their records, the same for all of them.
            timeout: Seconds without progress after which the job is ended.
        """
        self._processes, self._folder, self._timeout = processes, folder, timeout
        self._interval = min(_INTERVAL, timeout / 20)
        self._launcher = Launcher()
        self._ticks = 0
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._processes.world_size > 1:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._sign()
            self._processes.barrier()
            self._thread.start()
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        if self._processes.world_size == 1:
            return
        if isinstance(error, torch.distributed.DistError) or "gloo" in str(error):
            self._explain(error)
        self._left.set()
        self._thread.join()
        _record_path(self._folder, self._processes.rank).unlink(missing_ok=True)

    def _watch(self) -> None:
        beats, moved, orphaned = self._processes.beats, time.monotonic(), None
        signed = float("-inf")
        while not self._left.wait(min(1.0, self._interval)):
            now = time.monotonic()
            if now - signed >= self._interval:
                signed = now
                self._sign()
            if self._processes.beats != beats:
                beats, moved = self._processes.beats, now
            elif now - moved > self._timeout:
                self._end_hang()
            if orphaned is None and self._launcher.gone():
                orphaned = now
            if orphaned is not None and now - orphaned > ORPHAN_SECONDS:
                runtime.logger.error(
                    "train: rank %d leaves without a checkpoint, its launcher is gone",
                    self._processes.rank,
                )
                os._exit(1)

    def _sign(self) -> None:
        """Write this rank's record in place, which also works on a full disk."""
        self._ticks += 1
        record = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "doing": self._processes.doing,
            "beats": self._processes.beats,
            "ticks": self._ticks,
        }
        data = json.dumps(record).encode().ljust(_RECORD_BYTES)
        path = _record_path(self._folder, self._processes.rank)
        with contextlib.suppress(OSError):  # a sign that cannot be given must not end the training
            handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.write(handle, data)
            finally:
                os.close(handle)

    def _records(self) -> list[dict[str, Any]]:
        """What every rank says; an empty record for one that says nothing."""
        records: list[dict[str, Any]] = []
        for rank in range(self._processes.world_size):
            try:
                record = json.loads(_record_path(self._folder, rank).read_bytes())
            except (OSError, ValueError):
                record = {}
            records.append(record)
        return records

    def _silent(self) -> tuple[list[dict[str, Any]], list[int]]:
        """The newest records, and the ranks that wrote none while this one waited."""
        before = self._records()
        for _ in range(_PATIENCE):
            time.sleep(self._interval)
            self._sign()
        after = self._records()
        pairs = enumerate(zip(before, after, strict=True))
        return (
            [new or old for old, new in zip(before, after, strict=True)],
            [rank for rank, (old, new) in pairs if old.get("ticks") == new.get("ticks")],
        )

    def _end_hang(self) -> None:
        """Name the rank the others wait for and end this process, unless it moves again."""
        beats = self._processes.beats
        records, silent = self._silent()
        if self._processes.beats != beats:
            return
        counts = [record.get("beats", 0) for record in records]
        behind = silent or [r for r, count in enumerate(counts) if count < max(counts)]
        what = "does not answer" if silent else "is behind the others"
        named = _named(records, behind, what) or f"all ranks wait in {self._processes.doing}"
        self._leave(f"no progress for {self._timeout:.0f} s: {named}", records, silent)

    def _explain(self, error: BaseException | None) -> None:
        """End this process with one line if the error comes from the loss of another rank."""
        records, silent = self._silent()
        if silent:
            reason = " ".join(str(error).split())[:160]
            named = _named(records, silent, "is gone")
            self._leave(f"{named}; its own message, if any, says why ({reason})", records, silent)

    def _leave(self, message: str, records: list[dict[str, Any]], silent: list[int]) -> None:
        """Say it once for all ranks, end those of this host that do not answer, and exit.

        A rank that is stopped takes no SIGTERM, and its launcher would wait for it.
        """
        answering = [r for r in range(self._processes.world_size) if r not in silent]
        if answering[:1] == [self._processes.rank]:
            runtime.logger.error(
                "train: %s; the same command continues from the last checkpoint", message
            )
        else:  # the others are still looking, and must see this rank alive
            for _ in range(_PATIENCE + 1):
                time.sleep(self._interval)
                self._sign()
        for rank in silent:
            if records[rank].get("host") == socket.gethostname():
                _kill_sibling(records[rank]["process"])
        os._exit(1)


def _record_path(folder: Path, rank: int) -> Path:
    return folder / f"{rank:05d}.json"


def _named(records: list[dict[str, Any]], ranks: list[int], what: str) -> str:
    """The ranks with host, process and what they were doing, as part of a sentence."""
    named = []
    for rank in ranks:
        record = {"host": "unknown", "process": "unknown", "doing": "its start"} | records[rank]
        place = f"host {record['host']}, process {record['process']}"
        named.append(f"rank {rank} ({place}) {what}, last seen in {record['doing']}")
    return "; ".join(named)


def _kill_sibling(process: int) -> None:
    """SIGKILL a process if it still is a child of this one's parent."""
    with contextlib.suppress(OSError):
        stat = Path(f"/proc/{process}/stat").read_text()
        if int(stat.rpartition(")")[2].split()[1]) == os.getppid():
            os.kill(process, signal.SIGKILL)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
