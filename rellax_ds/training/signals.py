"""Stopping in good order: a signal, a STOP file or a lost parent becomes one agreed flag.

One rank hears of a stop before the others do, so the flag is agreed on by all ranks before anyone
acts on it. The handler only sets the flag and may fire twice. The file exists because a launcher
that receives a signal gives its ranks 30 seconds, while a file gives them all the time they need.
"""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING, Any

from rellax_ds import runtime
from rellax_ds.engine.watchdog import Launcher

if TYPE_CHECKING:
    from pathlib import Path
    from types import FrameType

    from rellax_ds.engine.processes import Processes

STOP_FILE = "STOP"
"""Name of the file, in the stage's running folder, that asks a training to stop."""

EXIT_STOPPED = 143
"""Exit status of a training that was asked to stop and committed a checkpoint."""


class StopRequest:
    """Whether the job was asked to stop; a context manager that owns the signal handlers."""

    def __init__(self, processes: Processes, stop_file: Path) -> None:
        """Watch for SIGTERM, SIGINT and `stop_file`.

        Args:
            processes: The ranks that agree on the flag.
            stop_file: Looked for by the first rank of each host.
        """
        self.reason = ""
        self._processes = processes
        self._stop_file = stop_file
        self._launcher = Launcher()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; a collective."""
        return self._processes.any(self._asked())

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name

    def _asked(self) -> bool:
        if not self.reason and runtime.local_rank() == 0 and self._stop_file.exists():
            self.reason = f"{self._stop_file.name} file"
        if not self.reason and runtime.launched() and self._launcher.gone():
            self.reason = "loss of the launcher"
        return bool(self.reason)
