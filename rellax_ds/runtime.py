"""Rank, device, seeds, logging and progress: where the process meets its surroundings.

Environment variables are read here and nowhere else. Nothing happens at import; entry points call
`prepare()` once.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import hashlib
import importlib.metadata
import logging
import os
import platform
import random
import resource
import secrets
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rellax_ds.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

logger = logging.getLogger("rellax_ds")

_PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "deepspeed",
    "ray",
    "webdataset",
    "numpy",
    "pyarrow",
    "polars",
)

_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of a named interface
_PR_SET_PDEATHSIG = 1  # Linux: the signal a process gets when its parent ends
_ENDS_WITH = "RELLAX_ENDS_WITH"  # process whose end is this one's, see `detached_environment`
_SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray in the driver of a submitted job


def prepare(verbose: bool = False) -> None:
    """Set the process up: log format, masked secrets, thread policy, and the guards of libraries
    that read the environment.

    Called by entry points before heavy imports; safe to call twice.

    Raises:
        SystemExit: The process that this one was to end with is gone (status 143).
    """
    from rellax_ds import redaction

    _end_with_parent()
    level = logging.DEBUG if verbose else logging.INFO if rank() == 0 else logging.WARNING
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logger.setLevel(level)
    logger.addFilter(redaction.SECRETS)
    guard_environment()


def guard_environment() -> None:
    """Put the guards into this process's environment; what the user has set stays.

    Must come before anything imports Ray, which reads its authentication mode when imported.
    """
    if not ray_address() and "ray" not in sys.modules:
        _guard_local_ray()
    for name, value in guarded_environment().items():
        os.environ.setdefault(name, value)


def guarded_environment() -> dict[str, str]:
    """Variables that entry points and child processes run under, unless the user has set them."""
    return {
        "WDS_SECURE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_WAIT_POLICY": "passive",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_IGNORE_UNHANDLED_ERRORS": "1",  # of workers that fail beside the one we report
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "WANDB_ERROR_REPORTING": "false",
    }


def secure_webdataset() -> None:
    """Make sure that webdataset, which unpickles and runs commands named by its data otherwise, is
    imported in its secure mode; call before it is imported.

    Raises:
        ConfigError: The environment asks for the other mode, or it was imported in it before.
    """
    mode = os.environ.setdefault("WDS_SECURE", "1")
    utils = sys.modules.get("webdataset.utils")
    if mode != "1" or not getattr(utils, "enforce_security", True):
        raise ConfigError(
            f"WDS_SECURE is {mode!r}, or was not 1 when webdataset was imported: shards are written"
            " in its secure mode only; set it to 1 or unset it"
        )


def prepare_engine(cuda: bool) -> None:
    """Set what DeepSpeed reads from the environment; call before it is imported.

    Args:
        cuda: Whether this machine has a usable GPU; without one DeepSpeed is told so instead of
            guessing. What DeepSpeed compiles goes into our cache, by versions, and this Python's
            folder goes first on the path: two versions of ninja undo each other's builds.
    """
    tag = f"python{platform.python_version()}-torch{importlib.metadata.version('torch')}"
    extensions = cache_dir() / "extensions" / f"{tag}-{'cuda' if cuda else 'cpu'}"
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(extensions))
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")
    folder = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", os.defpath)
    if path.split(os.pathsep)[0] != folder:
        os.environ["PATH"] = folder + os.pathsep + path


def prepare_network() -> None:
    """Let gloo use the interface that leads to the first host, unless the user has chosen one.

    By itself gloo takes the address that this host's name stands for, which often is the loopback
    or one the other hosts cannot reach.
    """
    address = os.environ.get("MASTER_ADDR")
    if address and "GLOO_SOCKET_IFNAME" not in os.environ:
        name = _interface_towards(address)
        if name is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = name


def _interface_towards(address: str) -> str | None:
    """Name of the interface whose first IPv4 address leads to `address` (Linux)."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # nothing is sent
            own = socket.inet_aton(probe.getsockname()[0])
            for _, name in socket.if_nameindex():
                request = struct.pack("256s", name.encode()[:15])
                with contextlib.suppress(OSError):  # an interface without an IPv4 address
                    if fcntl.ioctl(probe, _SIOCGIFADDR, request)[20:24] == own:
                        return name
    except OSError:
        return None
    return None


def forget_shared_memory() -> None:
    """Take the name of this rank's buffer in DeepSpeed's CPU collective off /dev/shm.

    The ranks that have mapped it keep it until they end. DeepSpeed leaves the file, 66 MiB of
    memory a rank, behind on every start; call it when all ranks have mapped it.
    """
    parts = (os.getuid(), os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], rank())
    name = "_".join(map(str, ("deepspeed_allreduce_buffer", *parts)))
    (Path("/dev/shm") / name).unlink(missing_ok=True)


def launcher_process() -> int | None:
    """Process id of the `rellax` command that launched this rank, if one did."""
    found = os.environ.get("RELLAX_LAUNCHER_PID", "")
    return int(found) if found.isdigit() else None


def rank() -> int:
    """Rank of this process in its job; 0 outside a distributed launch."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Rank of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Number of processes of the job; 1 outside a distributed launch."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched() -> bool:
    """Whether a distributed launcher started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def cache_dir() -> Path:
    """Folder for downloaded and converted assets: RELLAX_CACHE, else the user's cache folder."""
    chosen = os.environ.get("RELLAX_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "rellax-ds"


def default_work_dir(name: str) -> Path:
    """Folder of a run whose user named none: `work/NAME`, in a submitted Ray job `~/work/NAME`.

    A submitted job runs in a temporary copy of the checkout, which Ray deletes with what lies in
    it.
    """
    submitted = _SUBMITTED in os.environ
    return (Path.home() if submitted else Path()) / "work" / name


def child_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment for a child process of ours: this one's, the guards, and `extra`."""
    return {**guarded_environment(), **os.environ, **(extra or {})}


def travelling_environment() -> dict[str, str]:
    """What a run on another node takes along of this process's environment: where the assets are,
    and threads of a process, one unless the user has said otherwise.

    No secrets: Ray shows a task's arguments to whoever may look at its cluster.
    """
    kept = {name: os.environ[name] for name in ("RELLAX_CACHE",) if name in os.environ}
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")} | kept


def detached_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Environment for a child of a Ray worker that has no part in the worker's cluster.

    Address, job, token and whatever else Ray tells its workers stay behind, so the child starts a
    Ray of its own. The child ends with this process.
    """
    package = str(Path(__file__).resolve().parent.parent)
    path = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = child_environment(
        {"PYTHONPATH": os.pathsep.join(path), _ENDS_WITH: str(os.getpid()), **extra}
    )
    kept = {"RAY_TMPDIR", *guarded_environment()}
    return {
        name: value
        for name, value in environment.items()
        if not name.startswith("RAY_") or name in kept
    }


def _end_with_parent() -> None:
    """Have the kernel send SIGTERM when the process that started this one ends, if that process
    wants it so (Linux; elsewhere nothing happens).

    A worker that Ray or the kernel kills cannot pass anything on.
    """
    parent = os.environ.pop(_ENDS_WITH, None)
    if parent is None:
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if str(os.getppid()) != parent:
        sys.exit(128 + signal.SIGTERM)


def rank_environment(threads: int, cuda: bool) -> dict[str, str]:
    """Environment for the ranks this process launches; what the user has set stays.

    Args:
        threads: Threads of each rank.
        cuda: Whether they compute on GPUs. On CPUs nothing is compiled by torch, and a start that
            does not load its compiler is two seconds shorter.
    """
    package = str(Path(__file__).resolve().parent.parent)
    path = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = child_environment(
        {"PYTHONPATH": os.pathsep.join(path), "RELLAX_LAUNCHER_PID": str(os.getpid())}
    )
    compiler = {} if cuda else {"TORCHDYNAMO_DISABLE": "1"}
    return {"OMP_NUM_THREADS": str(threads)} | compiler | environment


def environment_values(wanted: Callable[[str], bool]) -> list[str]:
    """Values of the environment variables whose name is `wanted`."""
    return [value for name, value in os.environ.items() if wanted(name)]


def ray_address() -> str | None:
    """Address of the Ray cluster the user or `ray job submit` points at, if any."""
    return os.environ.get("RAY_ADDRESS")


def _guard_local_ray() -> None:
    """Give a cluster of our own a token of its own; Ray would otherwise write one into the home
    folder, which changes how clusters the user starts later behave.
    """
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def num_cpus() -> int:
    """CPU cores this process may use; RELLAX_NUM_CPUS may make them fewer."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    given = os.environ.get("RELLAX_NUM_CPUS", "")
    return min(cores, int(given)) if given.isdigit() and int(given) else cores


def stable_seed(*parts: object) -> int:
    """A 63-bit seed from any values, the same on every machine and Python version."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def seed_everything(*parts: object) -> int:
    """Seed Python, NumPy and torch from `parts`; returns the seed."""
    import numpy
    import torch

    seed = stable_seed(*parts)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    return seed


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def release_memory() -> None:
    """Give freed heap back to the operating system, as far as its C library can (glibc)."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def versions() -> dict[str, str]:
    """Python and library versions that a manifest records."""
    from rellax_ds import __version__

    found = {"rellax_ds": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def source_commit() -> str | None:
    """Commit of the checkout this code runs from, with `+` when the tree differs; None outside
    git.
    """
    root = Path(__file__).resolve().parent.parent
    git = ["git", "-C", str(root)]
    try:
        if subprocess.run(
            [*git, "ls-files", "--error-unmatch", "setup.py"], capture_output=True
        ).returncode:
            return None
        commit = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        dirty = subprocess.run(
            [*git, "status", "--porcelain"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if dirty.strip() else "")


class Progress:
    """A progress bar on a terminal and one plain line every few seconds elsewhere; rank 0 only.

    Rate and time left are computed here so that both forms show the same figures.
    """

    def __init__(
        self, label: str, total: int, unit: str, interval: float = 10.0, done: int = 0
    ) -> None:
        """Start counting; `total` in `unit`s, at most one plain line per `interval` seconds.

        Work that was `done` before counts as finished, but not towards the rate.
        """
        self.label, self.total, self.unit, self.interval = label, total, unit, interval
        self.done = self._before = done
        self._start = time.monotonic()
        self._said = self._start
        self._bar: Any = None
        self._task: Any = None
        self._shown = rank() == 0 and logger.isEnabledFor(logging.INFO)
        if self._shown and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
            )
            self._bar = RichProgress(*columns, console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task(label, total=total, completed=done, note="")

    @property
    def rate(self) -> float:
        """Units a second since the start."""
        return (self.done - self._before) / max(time.monotonic() - self._start, 1e-9)

    def advance(self, count: int = 1, note: str = "") -> None:
        """Add finished units; `note` is shown beside the rate."""
        self.done += count
        text = ", ".join(part for part in (note, f"{self.rate:.1f} {self.unit}/s") if part)
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, note=text)
            return
        now = time.monotonic()
        if self._shown and (now - self._said >= self.interval or self.done >= self.total):
            self._said = now
            left = (self.total - self.done) / max(self.rate, 1e-9)
            logger.info(
                "%s %d/%d %s, %s, ETA %.0f s",
                self.label,
                self.done,
                self.total,
                self.unit,
                text,
                left,
            )

    def close(self) -> None:
        """Take the bar off the terminal."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> Progress:
        """Use as a context manager."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close the bar also when the work fails."""
        self.close()
