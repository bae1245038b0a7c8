"""Where a training writes its figures: a JSONL file, which is the truth, and wandb if asked for.

The file survives kills and resumes: what was written after the checkpoint a run continues from is
cut off, so every step appears once. wandb is a copy; it is imported only when used, runs on rank 0
and its failures are counted, never raised.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from rellax_ds import runtime
from rellax_ds.artifacts import write_bytes
from rellax_ds.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from rellax_ds.config import Recipe

Record = dict[str, Any]


class JsonlSink:
    """One JSON object a line, written line by line; a non-finite number is written as null.

    What does not fit on a full disk is kept and written with a later record.
    """

    def __init__(self, path: Path) -> None:
        """Append to `path`, which may exist."""
        self.path = path
        self._file = path.open("ab", buffering=0)
        self._pending = b""
        self._warned = False

    def write(self, record: Record) -> None:
        """Append a record."""
        clean = {key: _finite(value) for key, value in record.items()}
        self._pending += json.dumps(clean, allow_nan=False).encode() + b"\n"
        try:
            self._drain()
        except OSError as error:
            if not self._warned:
                runtime.logger.warning("%s: %s; its lines wait for room", self.path, error)
            self._warned = True

    def close(self) -> None:
        """Write what is left and close the file.

        Raises:
            CheckpointError: There still is no room for it.
        """
        try:
            self._drain()
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: {error}, {len(self._pending)} bytes of the log are not written; "
                "make room and run the same command again"
            ) from error
        finally:
            self._file.close()

    def _drain(self) -> None:
        while self._pending:
            self._pending = self._pending[self._file.write(self._pending) :]
        self._warned = False


class WandbSink:
    """A copy of the records in Weights & Biases; its failures are counted in `failures`."""

    def __init__(self, recipe: Recipe, directory: Path, group: str) -> None:
        """Start a run.

        Args:
            recipe: Names project and mode; its document becomes the run's configuration.
            directory: Where wandb keeps its own files.
            group: Attempts of one training share it.

        Raises:
            ConfigError: wandb is asked for and not installed.
        """
        self.failures = 0
        self._run: Any = None
        try:
            import wandb
        except ImportError:
            raise ConfigError(
                f"train.wandb is {recipe.train.wandb}, but wandb is not installed; install "
                "rellax-ds[wandb] or set train.wandb=off"
            ) from None
        try:
            self._run = wandb.init(
                project=recipe.train.wandb_project,
                mode="online" if recipe.train.wandb == "online" else "offline",
                dir=str(directory),
                group=group,
                job_type="train",
                config=recipe.model_dump(mode="json"),
            )
            for name in ("train/*", "valid/*"):
                self._run.define_metric(name, step_metric="step")
            self._run.define_metric("valid/auc", summary="max")
        except Exception as error:  # a logging service must never end a training
            self._count(error)

    def write(self, record: Record) -> None:
        """Log a step or a valid score; other events are left to the file."""
        prefix = {"step": "train", "valid": "valid"}.get(record["event"])
        if self._run is None or prefix is None:
            return
        figures = {f"{prefix}/{k}": v for k, v in record.items() if k not in ("event", "step")}
        try:
            self._run.log(figures | {"step": record["step"]})
        except Exception as error:  # as above
            self._count(error)

    def close(self) -> None:
        """Finish the run and say how many records were lost, if any."""
        try:
            if self._run is not None:
                self._run.finish()
        except Exception as error:  # as above
            self._count(error)
        if self.failures:
            runtime.logger.warning("wandb: %d calls failed; log.jsonl is complete", self.failures)

    def _count(self, error: Exception) -> None:
        self.failures += 1
        if self.failures == 1:
            runtime.logger.warning(
                "wandb: %s", " ".join(str(error).split()) or type(error).__name__
            )


class Sinks:
    """All sinks of a training; silent on every rank but the first."""

    def __init__(self, *sinks: JsonlSink | WandbSink) -> None:
        """Write to each of `sinks`; none on ranks above 0."""
        self._sinks = sinks

    def write(self, record: Record) -> None:
        """Write a record to every sink."""
        for sink in self._sinks:
            sink.write(record)

    def close(self) -> None:
        """Close every sink."""
        for sink in self._sinks:
            sink.close()


def rewind(path: Path, step: int, scored: int) -> None:
    """Cut from a log what a resumed run will write again.

    Args:
        path: The JSONL file; may be absent.
        step: Optimiser steps taken at the checkpoint; later step records go.
        scored: Step of the last valid score before the checkpoint; later ones go.
    """
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["step"] <= (scored if record["event"] == "valid" else step):
            kept.append(line)
    write_bytes(path, "".join(f"{line}\n" for line in kept).encode())


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value
