"""Where a training writes its figures: JSONL files, which are the truth, and wandb if asked for.

The files survive kills and resumes: what was written after the checkpoint a run continues from is
cut off, so every step appears once. wandb is a copy (see `wandb_sink`). Only rank 0 has sinks, and
secrets are masked in all of them.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from rellax_ds import runtime
from rellax_ds.artifacts import write_bytes
from rellax_ds.errors import CheckpointError
from rellax_ds.redaction import redacted

if TYPE_CHECKING:
    from pathlib import Path

    from rellax_ds.training.score import Scores
    from rellax_ds.training.scored import ScoredPrompts
    from rellax_ds.training.wandb_sink import WandbSink

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
        clean = {key: _finite(value) for key, value in redacted(record).items()}
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


class Sinks:
    """All sinks of a training; silent on every rank but the first."""

    def __init__(
        self,
        log: JsonlSink | None = None,
        scored: tuple[JsonlSink, ScoredPrompts] | None = None,
        wandb: WandbSink | None = None,
    ) -> None:
        """Write to those given; none on ranks above 0.

        Args:
            log: Steps and valid scores.
            scored: Where the watched prompts' scores go, and the prompts.
            wandb: A copy of both.
        """
        self._log, self._scored, self._wandb = log, scored, wandb

    def write(self, record: Record) -> None:
        """Write a step or a valid score."""
        for sink in (self._log, self._wandb):
            if sink is not None:
                sink.write(record)

    def show(self, step: int, scores: Scores) -> None:
        """Write what the watched prompts scored at a step."""
        if self._scored is None:
            return
        file, watched = self._scored
        rows = watched.rows(step, scores)
        for row in rows:
            file.write({"event": "valid"} | {k: v for k, v in row.items() if k != "prompt"})
        if self._wandb is not None:
            self._wandb.show(rows)

    def keep(self, adapter: Path, index: Path) -> None:
        """Hand the best adapter and the shards' index to wandb, as artifacts."""
        if self._wandb is not None:
            self._wandb.keep(adapter, index)

    def close(self) -> None:
        """Close every sink."""
        scored = None if self._scored is None else self._scored[0]
        for sink in (self._log, scored, self._wandb):
            if sink is not None:
                sink.close()


def rewind(path: Path, step: int, scored: int) -> None:
    """Cut from a JSONL file what a resumed run will write again.

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
