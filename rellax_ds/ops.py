"""The one door to the CFLoRA operator: picks a compute path once, says which and why, and calls it.

A caller states the operation, never the kernel. The choice is made at the first call and is the
only global state of the package; a test or a benchmark may set it with `use`. Asking for a path
this machine lacks is an error, not a silent fall back, so a measured speed always belongs to the
path that was named.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Protocol

from rellax_ds import runtime
from rellax_ds.errors import ConfigError, KernelUnavailableError

if TYPE_CHECKING:
    import torch

PATHS = ("reference", "composable", "cpu", "cublas", "triton")
"""Names of all designed compute paths; `_MODULES` holds those that exist."""

_MODULES = {"reference": "rellax_ds.kernels.reference"}


class CFLoraDelta(Protocol):
    """Signature every compute path implements."""

    def __call__(
        self,
        x: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        gates: torch.Tensor | None,
        scaling: float,
        dropout_p: float = 0.0,
        training: bool = False,
    ) -> torch.Tensor:
        """Compute the update; see `cflora_delta`."""
        ...


_chosen: tuple[str, CFLoraDelta] | None = None


def available() -> tuple[str, ...]:
    """Names of the compute paths this build has."""
    return tuple(path for path in PATHS if path in _MODULES)


def use(path: str) -> None:
    """Take a compute path by name for the rest of the process.

    Raises:
        ConfigError: The name is unknown.
        KernelUnavailableError: The path is not part of this build.
    """
    global _chosen
    if path not in PATHS:
        raise ConfigError(f"unknown compute path '{path}'; choose one of {', '.join(PATHS)}")
    if path not in _MODULES:
        raise KernelUnavailableError(
            f"compute path '{path}' is not available here; available: {', '.join(available())}"
        )
    _chosen = (path, importlib.import_module(_MODULES[path]).cflora_delta)


def chosen() -> str:
    """Name of the compute path in use; chooses now if no call has been made yet."""
    return _resolve()[0]


def _resolve() -> tuple[str, CFLoraDelta]:
    if _chosen is None:
        use("reference")
        runtime.logger.info(
            "CFLoRA compute path: reference (plain torch; the only path of this build)"
        )
    assert _chosen is not None
    return _chosen


def cflora_delta(
    x: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    gates: torch.Tensor | None,
    scaling: float,
    dropout_p: float = 0.0,
    training: bool = False,
) -> torch.Tensor:
    """Low-rank update `scaling * (dropout(x) A^T) G B^T` of a frozen layer, one gate per sample
    (ReLLaX, CFLoRA).

    Args:
        x: Layer input [B, L, d_in].
        A: Down factor [r, d_in].
        B: Up factor [d_out, r].
        gates: Per-sample gates [B, r, r] in the row convention (M = G^T); None is plain LoRA.
        scaling: alpha / r.
        dropout_p: Drop rate on the input of A.
        training: Whether dropout is active.

    Returns:
        The update [B, L, d_out], to be added to the frozen layer's output.

    Raises:
        ConfigError: The gates do not belong to this input or this rank.
    """
    if gates is not None and (x.dim() != 3 or gates.shape != (x.shape[0], A.shape[0], A.shape[0])):
        raise ConfigError(
            f"gates of shape {tuple(gates.shape)} do not fit an input of shape {tuple(x.shape)} "
            f"and rank {A.shape[0]}; expected [batch, rank, rank] and [batch, tokens, width]"
        )
    return _resolve()[1](x, A, B, gates, scaling, dropout_p, training)
