"""The ranks of a training job and the few things they tell each other.

One process without a launcher is a job of one rank and takes the same path, so nothing downstream
asks whether it is distributed. What rank 0 does alone (files, decisions) goes through
`from_rank_zero`: the others wait for its result or its error, so an error is never raised on one
rank while the rest hang in a collective.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed

from rellax_ds import runtime
from rellax_ds.errors import KernelUnavailableError, RellaxError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")

_MARGIN_SECONDS = 60  # the watchdog, which can say who is missing, comes before the group's timeout
_OP = "deepspeed_shm_comm"
_STALE_LOCK_SECONDS = 600


class Processes:
    """The group of ranks this process belongs to.

    Attributes:
        rank: This process, from 0.
        world_size: Number of ranks.
        device: Where this rank computes.
        doing: What this rank is busy with, in words.
        beats: Grows with every collective and every `at`; ranks run the same code, so the smallest
            is the rank the others wait for.
    """

    def __init__(self, device: torch.device) -> None:
        """Read rank and size from the initialised group; use `start_processes` instead."""
        self.rank = torch.distributed.get_rank()
        self.world_size = torch.distributed.get_world_size()
        self.device = device
        self.doing = "its start"
        self.beats = 0

    def at(self, doing: str) -> None:
        """Say what this rank does next; a sign of progress for the watchdog."""
        self.doing = doing
        self.beats += 1

    @property
    def first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return self.sum([float(flag)])[0] > 0

    def all(self, flag: bool) -> bool:
        """Whether the flag is set on every rank."""
        return not self.any(not flag)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sum over the ranks, in float64."""
        self.beats += 1
        if self.world_size == 1:
            return [float(value) for value in values]
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(tensor)
        return [float(value) for value in tensor.tolist()]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank; for small picklable values."""
        self.beats += 1
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value)
        return values

    def broadcast(self, value: T) -> T:
        """Rank 0's value on every rank."""
        self.beats += 1
        if self.world_size == 1:
            return value
        values = [value if self.first else None]
        torch.distributed.broadcast_object_list(values, src=0, device=self.device)
        return values[0]  # type: ignore[return-value]

    def from_rank_zero(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0; every rank returns its result, or raises its error.

        Raises:
            RellaxError: What `work` raised on rank 0; likewise an OSError.
        """
        result: T | None = None
        error: Exception | None = None
        if self.first:
            try:
                result = work()
            except (RellaxError, OSError) as caught:
                error = caught
        result, error = self.broadcast((result, error))
        if error is not None:
            raise error
        return result  # type: ignore[return-value]

    def barrier(self) -> None:
        """Wait for every rank."""
        self.beats += 1
        if self.world_size > 1:
            torch.distributed.barrier()

    def close(self) -> None:
        """Leave the group; a single process keeps its own for the next use."""
        if self.world_size > 1:
            self.barrier()
            torch.distributed.destroy_process_group()


def start_processes(hang_timeout: float = 1800.0) -> Processes:
    """Join the launched job, or form a group of one; gloo on CPU, nccl on GPUs.

    Args:
        hang_timeout: Seconds to wait for the other ranks, here and in any later collective.

    Raises:
        KernelUnavailableError: DeepSpeed cannot build the collective it needs on CPU.
        RellaxError: The ranks did not find each other.
    """
    runtime.prepare_engine(cuda=torch.cuda.is_available())
    runtime.prepare_network()
    _warn_of_build()
    with contextlib.redirect_stdout(sys.stderr):
        import deepspeed
        from deepspeed.accelerator import get_accelerator

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # DeepSpeed calls torch functions by names torch is about to retire, on every step
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        name = get_accelerator().device_name()
        device = torch.device(name if name == "cpu" else f"{name}:{runtime.local_rank()}")
        if name != "cpu":
            get_accelerator().set_device(runtime.local_rank())
        if not runtime.launched() and not torch.distributed.is_initialized():
            torch.distributed.init_process_group(
                get_accelerator().communication_backend_name(),
                store=torch.distributed.HashStore(),  # type: ignore[attr-defined]
                rank=0,
                world_size=1,
            )
        if not deepspeed.comm.is_initialized():
            try:
                deepspeed.init_distributed(
                    timeout=datetime.timedelta(seconds=hang_timeout + _MARGIN_SECONDS),
                    verbose=False,
                    auto_mpi_discovery=False,
                )
            except torch.distributed.DistError as error:
                raise RellaxError(
                    f"rank {runtime.rank()} of {runtime.world_size()} did not meet the others: "
                    f"{' '.join(str(error).split())[:240]}; start every host with the same master "
                    "address and port, and let them reach each other (docs/distributed.md)"
                ) from error
            except (RuntimeError, OSError) as error:
                raise _build_error(error) from error
    processes = Processes(device)
    if device.type == "cpu" and runtime.launched():
        processes.barrier()  # every rank of this host has mapped every buffer
        runtime.forget_shared_memory()
    return processes


def _shared_memory_op() -> Path:
    """Folder in which DeepSpeed's shared-memory collective is built, once per torch version."""
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory(_OP, verbose=False))


def _warn_of_build() -> None:
    if torch.cuda.is_available() or runtime.rank() > 0:
        return
    folder = _shared_memory_op()
    lock = folder / "lock"
    if lock.is_file() and time.time() - lock.stat().st_mtime > _STALE_LOCK_SECONDS:
        runtime.logger.warning(
            "%s is left from an interrupted build; remove it if this start does not go on", lock
        )
    if not (folder / f"{_OP}.so").is_file():
        runtime.logger.info(
            "train: DeepSpeed builds its shared-memory collective once (about a minute)"
        )


def _build_error(error: Exception) -> Exception:
    text = str(error)
    if _OP not in text and "ninja" not in text.lower() and "compil" not in text.lower():
        return error
    lines = [line for line in text.splitlines() if "error:" in line or "not found" in line]
    reason = (lines or text.strip().splitlines() or [type(error).__name__])[0].strip()
    return KernelUnavailableError(
        "DeepSpeed cannot build its shared-memory collective, which it needs on CPU: "
        f"{reason[:200]}; install g++ and ninja, then run "
        "`python -m rellax_ds.engine.launch --warm`"
    )
