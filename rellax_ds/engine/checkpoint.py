"""Checkpoints that are whole or absent: commit protocol, reader's rule and retention.

A checkpoint is staged under a private name, hashed, sealed with a manifest and published by one
rename. `LATEST` is a hint for people; the reader trusts only a manifest whose files match in size
and sha256, takes the newest such folder and says which it passed over and why. Gathering is a
collective and comes first; from the first byte written until rank 0 announces the outcome there is
no collective, so a full disk costs a checkpoint and not the job.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from rellax_ds import runtime
from rellax_ds.artifacts import MANIFEST, file_sha256, fsync, write_bytes, write_json
from rellax_ds.config import digest
from rellax_ds.engine import elastic
from rellax_ds.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from rellax_ds.engine.engine import Engine
    from rellax_ds.engine.processes import Processes

STATE = "state.json"
TENSORS = "elastic.safetensors"
LATEST = "LATEST"

_FORMAT = 1
_MAX_FAILURES = 3
_HEADROOM = 1.2


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint.

    Attributes:
        path: Its folder.
        step: Optimiser steps taken.
        state: The loop's own state, as it was passed to `save`.
    """

    path: Path
    step: int
    state: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one training run."""

    def __init__(self, directory: Path, processes: Processes, keep_last: int) -> None:
        """Open the folder, created on the first save.

        Args:
            directory: Folder of the checkpoints.
            processes: The ranks; all of them call `save` and `choose` together.
            keep_last: Newest checkpoints that are kept.
        """
        self.directory = directory
        self.processes = processes
        self.keep_last = keep_last
        self._failures = 0

    def save(
        self,
        engine: Engine,
        step: int,
        state: dict[str, Any],
        folders: Mapping[str, Path],
        best_step: int | None = None,
    ) -> Path | None:
        """Commit a checkpoint; a collective.

        Args:
            engine: The engine between two optimiser steps.
            step: Optimiser steps taken; names the folder.
            state: JSON-like state of the loop.
            folders: Name to folder copied into the checkpoint; an absent folder is left out.
            best_step: Step whose checkpoint is kept beside the newest ones.

        Returns:
            The committed folder, or None when it could not be written; training can go on.

        Raises:
            CheckpointError: Three attempts in a row failed.
        """
        tensors, facts = elastic.capture(engine)

        def write() -> tuple[str | None, str | None]:
            self._prune(best_step)  # a kill between publishing and pruning left one too many
            try:
                return str(self._commit(step, tensors, facts, state, folders)), None
            except (OSError, SafetensorError, CheckpointError) as error:
                return None, " ".join(str(error).split())

        path, failure = self.processes.from_rank_zero(write)
        if path is None:
            self._failures += 1
            message = f"checkpoint at step {step} was not written: {failure}"
            if self._failures >= _MAX_FAILURES:
                raise CheckpointError(f"{message}; {_MAX_FAILURES} failures in a row, giving up")
            if self.processes.first:
                runtime.logger.warning("%s; training goes on", message)
            return None
        self._failures = 0
        if self.processes.first:
            self._prune(best_step)
        self.processes.barrier()
        return Path(path)

    def choose(self, resume: str) -> Checkpoint | None:
        """The checkpoint to continue from, the same on every rank; a collective.

        Going back to a named checkpoint gives up the later ones of this run.

        Args:
            resume: `auto` for the newest valid one, `never` for none, else a checkpoint's folder.

        Raises:
            CheckpointError: A folder was named and holds no valid checkpoint.
        """

        def find() -> Checkpoint | None:
            self._sweep()
            if resume == "never":
                return None
            if resume == "auto":
                return newest_valid(self.directory)
            named = open_checkpoint(resume)
            for later in self.directory.glob("step-*"):
                if later.name > _name(named.step):
                    self._discard(later)
            return named

        return self.processes.from_rank_zero(find)

    def _commit(
        self,
        step: int,
        tensors: dict[str, torch.Tensor],
        facts: dict[str, Any],
        state: dict[str, Any],
        folders: Mapping[str, Path],
    ) -> Path:
        target = self.directory / _name(step)
        if fault(target) is None:
            return target
        self.directory.mkdir(parents=True, exist_ok=True)
        needed = self._check_space(tensors, folders)
        staging = _fresh(self.directory, f".staging-{step}")
        try:
            elastic.write(staging / TENSORS, tensors, facts)
            write_json(staging / STATE, state)
            for name, folder in folders.items():
                if folder.is_dir():
                    shutil.copytree(folder, staging / name)
            self._seal(staging, step)
            if target.exists():
                self._discard(target)
            staging.rename(target)
        except BaseException as error:
            free = shutil.disk_usage(self.directory).free
            shutil.rmtree(staging, ignore_errors=True)
            if isinstance(error, (OSError, SafetensorError)):
                raise CheckpointError(
                    f"{staging}: {error}; {free} bytes were free, a checkpoint needs {needed}"
                ) from error
            raise
        fsync(self.directory)
        write_bytes(self.directory / LATEST, f"{target.name}\n".encode())
        return target

    def _seal(self, staging: Path, step: int) -> None:
        files = {}
        for path in sorted(p for p in staging.rglob("*") if p.is_file()):
            fsync(path)
            facts = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
            files[str(path.relative_to(staging))] = facts
        manifest = {
            "format": _FORMAT,
            "step": step,
            "files": files,
            "world_size": self.processes.world_size,
            "versions": runtime.versions(),
        }
        write_json(staging / MANIFEST, manifest | {"seal": digest(manifest)})
        fsync(staging)

    def _check_space(self, tensors: Mapping[str, torch.Tensor], folders: Mapping[str, Path]) -> int:
        """Bytes a checkpoint takes at most; raises CheckpointError when they are not free."""
        tensor_bytes = sum(t.numel() * t.element_size() for t in tensors.values())
        copied = sum(p.stat().st_size for f in folders.values() for p in f.rglob("*"))
        needed = int(_HEADROOM * (tensor_bytes + copied))
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise CheckpointError(
                f"{self.directory} has {free} bytes free, a checkpoint needs {needed}"
            )
        return needed

    def _prune(self, best_step: int | None) -> None:
        steps = sorted(self.directory.glob("step-*"), reverse=True)
        kept = steps[: self.keep_last]
        for path in steps[self.keep_last :]:
            if best_step is not None and path.name == _name(best_step):
                continue
            if all(fault(other) is not None for other in kept):
                return
            self._discard(path)

    def _discard(self, path: Path) -> None:
        """Take a folder out of sight first, so that a kill while deleting leaves no half of it."""
        trash = self.directory / f".trash-{path.name}-{os.getpid()}"
        try:
            path.rename(trash)
            shutil.rmtree(trash)
        except OSError as error:
            runtime.logger.warning("%s could not be deleted: %s", path, error)

    def _sweep(self) -> None:
        """Delete what interrupted writes and deletions left behind."""
        for pattern in (".staging-*", ".trash-*"):
            for leftover in self.directory.glob(pattern):
                shutil.rmtree(leftover, ignore_errors=True)


def newest_valid(directory: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies; each one passed over costs a line that says why."""
    for path in sorted(directory.glob("step-*"), reverse=True):
        reason = fault(path)
        if reason is None:
            return _load(path)
        runtime.logger.warning("checkpoint %s passed over: %s", path.name, reason)
    return None


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Verify and open one checkpoint.

    Raises:
        CheckpointError: It is absent or does not verify.
    """
    folder = Path(path).expanduser()
    reason = fault(folder)
    if reason is not None:
        raise CheckpointError(f"{folder}: {reason}; choose another one, or --resume auto")
    return _load(folder)


def fault(path: Path) -> str | None:
    """Why a folder is not a valid checkpoint, or None when every file matches its manifest."""
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        return "it has no manifest, so it was never committed"
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        files = {str(name): (f["bytes"], f["sha256"]) for name, f in manifest["files"].items()}
        known = manifest["format"] == _FORMAT and isinstance(manifest["step"], int)
        sealed = manifest.pop("seal") == digest(manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "its manifest cannot be read"
    if not sealed:
        return "its manifest has been altered"
    if not known or not {TENSORS, STATE} <= set(files):
        return "its manifest is of another format"
    found = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()} - {MANIFEST}
    for name in sorted(found ^ set(files)):
        return f"{name} is {'not in its manifest' if name in found else 'missing'}"
    for name, (size, sha256) in files.items():
        if (path / name).stat().st_size != size:
            return f"{name} has {(path / name).stat().st_size} bytes instead of {size}"
        if file_sha256(path / name) != sha256:
            return f"{name} has another sha256 than its manifest"
    if path.name.startswith("step-") and path.name != _name(manifest["step"]):
        return f"its manifest is of step {manifest['step']}"
    return None


def _load(path: Path) -> Checkpoint:
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    state = json.loads((path / STATE).read_text(encoding="utf-8"))
    return Checkpoint(path.resolve(), manifest["step"], state)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _fresh(directory: Path, prefix: str) -> Path:
    """A new empty folder; an existing name means the next attempt number."""
    attempt = 0
    while True:
        path = directory / f"{prefix}-{attempt}"
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            return path
        attempt += 1
