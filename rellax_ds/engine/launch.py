"""Start the ranks of a training on this machine, and build what DeepSpeed compiles once.

DeepSpeed's own launcher starts the ranks; it is always told their number, because on CPU it would
count sockets otherwise. It runs in a session of its own: a Ctrl-C or SIGTERM reaches only us, and
we pass it on as a STOP file, which leaves the ranks all the time a checkpoint needs. Its exit
status proves nothing (a killed launcher reports success): callers look for the committed artefact.

    python -m rellax_ds.engine.launch --warm
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import torch

from rellax_ds import runtime
from rellax_ds.engine.watchdog import ORPHAN_SECONDS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_MODULE = "rellax_ds.cli"
_STRAGGLER_SECONDS = ORPHAN_SECONDS + 5  # ranks that can leave by themselves do so before


def launch_ranks(num_processes: int, arguments: list[str], stop_file: Path) -> int:
    """Run `rellax ARGUMENTS` on several ranks of this machine and wait for them.

    Args:
        num_processes: Ranks to start; the cores are shared out evenly among them.
        arguments: Arguments of the `rellax` command, for example `["train", "--recipe", ...]`.
        stop_file: Created when this process is asked to stop; the ranks watch for it.

    No rank is left when this returns: those that outlive their launcher get the time to leave in
    good order, then SIGKILL.

    Returns:
        The launcher's exit status; a hint, not a proof of success.
    """
    cuda = torch.cuda.is_available()
    runtime.prepare_engine(cuda=cuda)
    threads = max(1, runtime.num_cpus() // num_processes)
    environment = runtime.rank_environment(threads, cuda)
    command = [
        *(_launcher_with_devices if cuda else _launcher)(num_processes),
        *("--master_port", str(_free_port())),
        *("--module", "--no_local_rank", "--quiet"),
        *(_MODULE, *arguments),
    ]
    stop_file.unlink(missing_ok=True)
    process = subprocess.Popen(
        command, env=environment, stdout=sys.stderr.fileno(), start_new_session=True
    )
    with _stop_by_file(stop_file):
        try:
            return process.wait()
        finally:
            _end_stragglers(process.pid)


def _launcher_with_devices(num_processes: int) -> list[str]:
    """DeepSpeed's runner, which knows which GPUs it may give to the ranks."""
    return [
        *(sys.executable, "-m", "deepspeed.launcher.runner"),
        *("--num_accelerators", str(num_processes)),
        *("--hostfile", os.devnull),
    ]


def _launcher(num_processes: int) -> list[str]:
    """What the runner starts on this machine; without devices to hand out, it has nothing to add
    but seconds.
    """
    world = json.dumps({"localhost": list(range(num_processes))})
    return [
        *(sys.executable, "-u", "-m", "deepspeed.launcher.launch"),
        f"--world_info={base64.urlsafe_b64encode(world.encode()).decode()}",
        "--master_addr=127.0.0.1",
    ]


def warm() -> None:
    """Build and load the collective DeepSpeed compiles on CPU, so that no later start waits."""
    from rellax_ds.engine.processes import start_processes

    start_processes()


@contextlib.contextmanager
def _stop_by_file(stop_file: Path) -> Iterator[None]:
    """Turn SIGINT and SIGTERM into the STOP file while the ranks run."""

    def handle(_number: int, _frame: Any) -> None:
        stop_file.parent.mkdir(parents=True, exist_ok=True)
        stop_file.touch()

    numbers = (signal.SIGINT, signal.SIGTERM)
    main = threading.current_thread() is threading.main_thread()
    previous = {number: signal.signal(number, handle) for number in numbers} if main else {}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _end_stragglers(group: int) -> None:
    """Wait until the launcher's process group is empty, and end what is left of it after a while.

    A launcher that was killed leaves its ranks behind, and a stopped one hears no SIGTERM.
    """
    deadline = time.monotonic() + _STRAGGLER_SECONDS
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(0.1)
        os.killpg(group, signal.SIGKILL)
        runtime.logger.warning("train: ranks outlived their launcher and were killed")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    if sys.argv[1:] != ["--warm"]:
        sys.exit("usage: python -m rellax_ds.engine.launch --warm")
    runtime.prepare()
    warm()
