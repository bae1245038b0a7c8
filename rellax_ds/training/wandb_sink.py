"""Weights & Biases as a copy of what the files hold: never in a training's way.

Every call of the library, its import and its start included, is made in one daemon thread behind a
bounded queue. A service that is down, refuses the key or takes half a minute a call therefore costs
records in wandb and no waiting: what does not fit into the queue is dropped and counted, an error
is counted, and the end waits a bounded time. wandb is told not to capture the console and not to
look at the command line, the checkout or the code; what it is given is masked.

An attempt is a run of its own, of job type `train`, in the group of its training: wandb 0.31
ignores `resume` offline.
"""

from __future__ import annotations

import importlib
import importlib.util
import queue
import re
import threading
import time
from typing import TYPE_CHECKING, Any

from rellax_ds import runtime
from rellax_ds.artifacts import file_sha256
from rellax_ds.config import digest
from rellax_ds.errors import ConfigError
from rellax_ds.redaction import redacted
from rellax_ds.training.scored import COLUMNS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from rellax_ds.config import Recipe

LIMIT = 1024
"""Records that may wait for wandb."""

PATIENCE = 10.0
"""Seconds that the end of a training waits for wandb."""

_PREFIX = {"step": "train", "valid": "valid"}


class WandbSink:
    """A copy of the records in wandb.

    Attributes:
        failures: Calls that failed, or could not be made because wandb had not started.
        dropped: Calls left out because the queue was full.
    """

    def __init__(
        self,
        recipe: Recipe,
        directory: Path,
        group: str,
        limit: int = LIMIT,
        patience: float = PATIENCE,
    ) -> None:
        """Begin to start a run; returns at once.

        Args:
            recipe: Names project and mode; its document becomes the run's configuration.
            directory: Where wandb keeps its own files.
            group: Attempts of one training share it.
            limit: Records that may wait.
            patience: Seconds `close` waits; the library's own limits follow from it.

        Raises:
            ConfigError: wandb is asked for and not installed.
        """
        if importlib.util.find_spec("wandb") is None:
            raise ConfigError(
                f"train.wandb is {recipe.train.wandb}, but wandb is not installed; install "
                "rellax-ds[wandb] or set train.wandb=off"
            )
        self.failures = self.dropped = 0
        self._name = re.sub(r"[^\w.-]", "-", recipe.name)
        self._patience = patience
        self._calls: queue.Queue[Callable[[Any, Any], None] | None] = queue.Queue(limit)
        self._left = threading.Event()
        options = {
            "project": recipe.train.wandb_project,
            "mode": recipe.train.wandb,
            "dir": str(directory),
            "group": group,
            "job_type": "train",
            "config": redacted(recipe.model_dump(mode="json")),
        }
        self._thread = threading.Thread(
            target=self._work, args=(options,), name="wandb", daemon=True
        )
        self._thread.start()

    def write(self, record: dict[str, Any]) -> None:
        """Log a step or a valid score; other events are left to the file."""
        prefix = _PREFIX.get(record["event"])
        if prefix is not None:
            self._offer(lambda _, run: _log(run, prefix, redacted(record)))

    def show(self, rows: Sequence[dict[str, Any]]) -> None:
        """Log a table of scored prompts, see `scored.COLUMNS`."""
        data = [[redacted(row[column]) for column in COLUMNS] for row in rows]

        def call(wandb: Any, run: Any) -> None:
            table = wandb.Table(columns=list(COLUMNS), data=data)
            run.log({"valid/prompts": table, "step": data[0][0]})

        self._offer(call)

    def keep(self, adapter: Path, index: Path) -> None:
        """Log a folder and the shards' index as artifacts whose alias is their digest."""

        def call(wandb: Any, run: Any) -> None:
            for kind, path in (("adapter", adapter), ("shards", index)):
                files = sorted(path.iterdir()) if path.is_dir() else [path]
                sha256 = {file.name: file_sha256(file) for file in files}
                artifact = wandb.Artifact(
                    f"{self._name}-{kind}", type=kind, metadata={"sha256": sha256}
                )
                for file in files:
                    artifact.add_file(str(file))
                run.log_artifact(artifact, aliases=["latest", digest(sha256)[:12]])

        self._offer(call)

    def close(self) -> None:
        """Finish the run, waiting `patience` seconds at most; says what was lost, if anything."""
        deadline = time.monotonic() + self._patience
        try:
            self._calls.put(None, timeout=self._patience)
            self._thread.join(max(deadline - time.monotonic(), 0.0))
        except queue.Full:
            pass
        self._left.set()
        if self._thread.is_alive():
            runtime.logger.warning(
                "wandb: not done after %g s, %d dropped; left behind, log.jsonl is complete",
                self._patience,
                self.dropped,
            )
        elif self.failures or self.dropped:
            runtime.logger.warning(
                "wandb: %d calls failed, %d dropped; log.jsonl is complete",
                self.failures,
                self.dropped,
            )

    def _offer(self, call: Callable[[Any, Any], None]) -> None:
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self.dropped += 1

    def _work(self, options: dict[str, Any]) -> None:
        """The thread: start, make the calls in order, finish; whatever fails is counted."""
        wandb = run = None
        try:
            wandb = importlib.import_module("wandb")
            run = _start(wandb, options, self._patience)
        except Exception as error:  # a logging service must never end a training
            self._count(error)
        while (call := self._calls.get()) is not None and not self._left.is_set():
            if run is None:
                self.failures += 1
                continue
            try:
                call(wandb, run)
            except Exception as error:  # as above
                self._count(error)
        try:
            if run is not None:
                run.finish()
        except Exception as error:  # as above
            self._count(error)

    def _count(self, error: Exception) -> None:
        self.failures += 1
        if self.failures == 1 and not self._left.is_set():
            said = " ".join(f"{type(error).__name__}: {error}".split())
            runtime.logger.warning("wandb: %s; the training goes on without it", said)


def _start(wandb: Any, options: dict[str, Any], patience: float) -> Any:
    wanted = {
        "silent": True,
        "console": "off",
        "login_timeout": 1,
        "init_timeout": 3 * patience,
        "finish_timeout": patience,
        "save_code": False,
        "disable_code": True,
        "disable_git": True,
        "x_disable_meta": True,
    }
    known = wandb.Settings.model_fields
    settings = wandb.Settings(**{key: value for key, value in wanted.items() if key in known})
    run = wandb.init(**options, settings=settings)
    for name in ("train/*", "valid/*"):
        run.define_metric(name, step_metric="step")
    run.define_metric("valid/auc", step_metric="step", summary="max")
    runtime.logger.info("wandb: %s", run.url if options["mode"] == "online" else run.dir)
    return run


def _log(run: Any, prefix: str, record: dict[str, Any]) -> None:
    figures = {f"{prefix}/{k}": v for k, v in record.items() if k not in ("event", "step")}
    run.log(figures | {"step": record["step"]})
    if prefix == "valid" and record["best_step"] == record["step"]:
        run.summary.update({"best/step": record["step"], "best/auc": record["auc"]})
