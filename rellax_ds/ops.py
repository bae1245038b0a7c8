"""The one door to the CFLoRA operator: picks a compute path, says once which and why, and calls it.

A caller states the operation, never the kernel. Without a choice each call takes the best path for
its tensors, and never fails for want of one. A path asked for by name either runs or is an error,
not a silent fall back, so a measured speed always belongs to the path that was named.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from rellax_ds import runtime
from rellax_ds.errors import ConfigError, KernelUnavailableError
from rellax_ds.kernels import compiled, reference, tuning
from rellax_ds.kernels.composable import arithmetic
from rellax_ds.kernels.function import Call, CFLora, Path, Tensors
from rellax_ds.kernels.philox import Dropout, draw_seed, threshold_of
from rellax_ds.kernels.rows import Rows

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PATHS = ("reference", "composable", "cpu", "cublas", "triton")
"""Names of the compute paths, from the oracle to the fastest."""

_CLASSES = {
    "cpu": ("rellax_ds.kernels.cpu", "CpuPath"),
    "cublas": ("rellax_ds.kernels.launch", "CublasPath"),
    "triton": ("rellax_ds.kernels.launch", "TritonPath"),
}
_CONV1D = ("transformers.pytorch_utils", "Conv1D")
_MAX_RANK = 64


@dataclass(frozen=True)
class Dense:
    """A frozen dense layer a path may compute: weight [d_out, d_in], bias [d_out] or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None


@dataclass(frozen=True)
class Factors:
    """Low-rank factors of one module.

    Attributes:
        A: Down factor [r, d_in].
        B: Up factor [d_out, r].
        gates: [S, r, r] in the row convention (M = G^T), or None for M = I.
        scaling: s = alpha / r.
    """

    A: torch.Tensor
    B: torch.Tensor
    gates: torch.Tensor | None = None
    scaling: float = 1.0


_asked: str | None = None


def use(path: str | None) -> None:
    """Take a compute path by name for every later call of this process; None chooses per call.

    Raises:
        ConfigError: The name is unknown.
        KernelUnavailableError: The path cannot run on this machine; the message says why.
    """
    global _asked
    if path is not None:
        reason = _missing(path)
        if reason:
            raise KernelUnavailableError(
                f"compute path '{path}' is not available: {reason}; available here: "
                f"{', '.join(available())}"
            )
    _asked = path


@contextlib.contextmanager
def using(path: str | None) -> Iterator[None]:
    """`use` within a block."""
    previous = _asked
    use(path)
    try:
        yield
    finally:
        use(previous)


def available() -> tuple[str, ...]:
    """Names of the compute paths this machine can run."""
    return tuple(path for path in PATHS if not _missing(path))


def chosen() -> str:
    """Name of the path asked for, or `auto`."""
    return _asked or "auto"


def cflora(
    x: torch.Tensor,
    bases: Sequence[Dense | nn.Module],
    factors: Sequence[Factors],
    rows: Rows | None = None,
    *,
    dropout_p: float = 0.0,
    training: bool = False,
    share_dropout: bool = False,
    seed: torch.Tensor | None = None,
    path: str | None = None,
) -> tuple[torch.Tensor, ...]:
    """Frozen layers that share an input, each with a low-rank update gated per sample.

    y = W x + bias + s B M(h) A dropout(x) with M = G^T (ReLLaX, CFLoRA).

    Args:
        x: Input [..., d_in].
        bases: The frozen layers, one per module; a module that `as_dense` cannot read is
            called normally, with its hooks, on x flattened to [T, d_in].
        factors: A, B, gates and scale of each.
        rows: Owner of each of the T rows of x flattened to [T, d_in]; by default a padded batch
            [S, L, d_in], or one sample where x has fewer dimensions.
        dropout_p: Drop rate on the input of A.
        training: Whether dropout is active.
        share_dropout: Use one mask for all modules instead of one each.
        seed: int64 [1] on the device of x; by default drawn from torch's generator, so that
            checkpointing draws the same again.
        path: Compute path of this call; by default what `use` set, or the best for these tensors.

    Returns:
        One output [..., d_out] per module.

    Raises:
        ConfigError: Shapes do not fit together.
        KernelUnavailableError: The path asked for cannot compute this call.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    threshold = _threshold(dropout_p) if training else 0
    if torch.compiler.is_compiling():
        return _compiled(x, bases, factors, rows, threshold, share_dropout, seed)
    rows = _default_rows(x) if rows is None else rows
    _check(x, bases, factors, rows)
    streams = (0,) * len(bases) if share_dropout else tuple(range(len(bases)))
    dropout = None
    if threshold:
        dropout = Dropout(draw_seed(x.device) if seed is None else seed, threshold, streams)
    layers = [as_dense(base) for base in bases]
    name, dense = _choose(path or _asked, x, layers, factors)
    if name == "reference":
        return _reference(x, bases, factors, rows, dropout)
    flat = x.reshape(-1, x.shape[-1])
    arguments: list[torch.Tensor | None] = []
    for base, layer, factor in zip(bases, layers, factors, strict=True):
        if dense and layer is not None:
            arguments += [layer.weight, layer.bias]
        else:
            arguments += [_base_output(base, flat), None]
        arguments += [factor.A, factor.B, factor.gates]
    scalings = tuple(factor.scaling for factor in factors)
    call = Call(_path(name, x), rows, scalings, dropout, dense)
    outputs: Tensors = CFLora.apply(call, flat, *arguments)  # type: ignore[no-untyped-call]
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)


def as_dense(base: Dense | nn.Module) -> Dense | None:
    """The layer as weights a path may read itself, or None where it must be called.

    It must be called if it is not a plain `nn.Linear` or transformers' `Conv1D`, whose weight is
    [d_in, d_out], has hooks, is trained, or is partitioned by ZeRO-3, where the weight exists only
    while the layer runs.
    """
    if isinstance(base, nn.Module):
        kind = type(base)
        transposed = (kind.__module__, kind.__name__) == _CONV1D
        if (kind is not nn.Linear and not transposed) or base._forward_hooks:
            return None
        if base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
            return None
        if "forward" in base.__dict__ or hasattr(base.weight, "ds_id"):
            return None
        bias = cast("torch.Tensor | None", base.bias)
        base = Dense(base.weight.t() if transposed else base.weight, bias)
    tensors = [t for t in (base.weight, base.bias) if t is not None]
    if any(t.requires_grad or hasattr(t, "ds_id") or not t.is_floating_point() for t in tensors):
        return None
    return base


def _choose(
    asked: str | None,
    x: torch.Tensor,
    layers: Sequence[Dense | None],
    factors: Sequence[Factors],
) -> tuple[str, bool]:
    """Path of this call and whether it computes the frozen layers itself."""
    dense = all(layer is not None and layer.weight.dtype == x.dtype for layer in layers)
    if asked is None:
        name, reason = _automatic(x, dense, factors)
        _announce(name, reason)
        return name, dense and name != "composable"
    _require(asked, x, dense, factors)
    return asked, asked not in ("reference", "composable")


def _automatic(x: torch.Tensor, dense: bool, factors: Sequence[Factors]) -> tuple[str, str]:
    if not dense:
        return "composable", "the frozen layer must be called normally"
    if x.device.type == "cpu" and not _missing("cpu"):
        return "cpu", "tensors on a CPU"
    if x.device.type == "cuda" and x.dtype in (torch.bfloat16, torch.float16):
        reason = _missing("triton")
        rank = max(factor.A.shape[0] for factor in factors)
        if rank > _MAX_RANK:
            reason = f"rank above {_MAX_RANK}"
        if reason:
            return "composable", reason
        widest = max(factor.B.shape[0] for factor in factors)
        return tuning.preferred(x, widest, rank), "16-bit tensors on this GPU"
    return "composable", f"{x.dtype} tensors on {x.device.type}"


def _require(asked: str, x: torch.Tensor, dense: bool, factors: Sequence[Factors]) -> None:
    reason = _missing(asked)
    if not reason and asked not in ("reference", "composable"):
        if not dense:
            reason = "the frozen layer must be called normally (ZeRO-3, hooks, quantised or cast)"
        elif asked == "cpu" and x.device.type != "cpu":
            reason = f"the tensors are on {x.device}"
        elif asked != "cpu" and max(factor.A.shape[0] for factor in factors) > _MAX_RANK:
            reason = f"its rank is at most {_MAX_RANK}"
    if reason:
        raise KernelUnavailableError(
            f"compute path '{asked}' cannot compute this layer: {reason}; use 'composable'"
        )


@functools.cache
def _announce(name: str, reason: str) -> None:
    runtime.logger.info("CFLoRA compute path: %s (%s)", name, reason)


def _missing(path: str) -> str:
    """Why this machine cannot run a path; empty where it can."""
    if path not in PATHS:
        raise ConfigError(f"unknown compute path '{path}'; choose one of {', '.join(PATHS)}")
    if path not in _CLASSES:
        return ""
    try:
        module = importlib.import_module(_CLASSES[path][0])
    except ImportError as error:
        return str(error)
    return str(module.unavailable()) if hasattr(module, "unavailable") else ""


@functools.cache
def _instance(path: str) -> Path:
    module, name = _CLASSES[path]
    return cast("Path", getattr(importlib.import_module(module), name)())


def _path(name: str, x: torch.Tensor) -> Path:
    return arithmetic(x.device.type) if name == "composable" else _instance(name)


def _compiled(
    x: torch.Tensor,
    bases: Sequence[Dense | nn.Module],
    factors: Sequence[Factors],
    rows: Rows | None,
    threshold: int,
    share: bool,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """The call inside `torch.compile`: frozen layers in the graph, low-rank terms opaque."""
    layout = compiled.layout_of(rows, x)
    flat = x.reshape(-1, x.shape[-1])
    if seed is None:
        seed = draw_seed(x.device) if threshold else torch.zeros(1, dtype=torch.int64)
    outputs = []
    for m, (base, f) in enumerate(zip(bases, factors, strict=True)):
        y = _call(base, flat)
        stream = 0 if share else m
        y = compiled.update(y, flat, f.A, f.B, f.gates, seed, layout, f.scaling, threshold, stream)
        outputs.append(y.view(*x.shape[:-1], y.shape[-1]))
    return tuple(outputs)


def _reference(
    x: torch.Tensor,
    bases: Sequence[Dense | nn.Module],
    factors: Sequence[Factors],
    rows: Rows,
    dropout: Dropout | None,
) -> tuple[torch.Tensor, ...]:
    flat = x.reshape(-1, x.shape[-1])
    outputs = []
    for m, (base, f) in enumerate(zip(bases, factors, strict=True)):
        update = reference.update(flat, f.A, f.B, f.gates, rows, f.scaling, dropout, m)
        y = _call(base, flat) + update
        outputs.append(y.view(*x.shape[:-1], y.shape[-1]))
    return tuple(outputs)


def _call(base: Dense | nn.Module, x: torch.Tensor) -> torch.Tensor:
    if isinstance(base, nn.Module):
        return cast("torch.Tensor", base(x))
    return nn.functional.linear(x, base.weight, base.bias)


def _base_output(base: Dense | nn.Module, flat: torch.Tensor) -> torch.Tensor:
    """Output [T, d_out] of a base that may be overwritten: a copy where it is a view or where the
    layer that made it may have kept it for its own backward pass.
    """
    y = _call(base, flat)
    fresh = y.grad_fn is None and not y.requires_grad
    product = type(y.grad_fn).__name__ in ("AddmmBackward0", "MmBackward0")
    return y if (fresh or product) and not y._is_view() else y.clone()


def _default_rows(x: torch.Tensor) -> Rows:
    if x.dim() == 3:
        return Rows.padded(x.shape[0], x.shape[1])
    return Rows.padded(1, x.numel() // max(x.shape[-1], 1))


def _threshold(p: float) -> int:
    try:
        return threshold_of(p)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _check(
    x: torch.Tensor,
    bases: Sequence[Dense | nn.Module],
    factors: Sequence[Factors],
    rows: Rows,
) -> None:
    if not bases or len(bases) != len(factors):
        raise ConfigError(f"{len(bases)} layers and {len(factors)} sets of factors; give one each")
    tokens = x.numel() // max(x.shape[-1], 1)
    if rows.tokens != tokens:
        raise ConfigError(f"the rows describe {rows.tokens} tokens, the input has {tokens}")
    for factor in factors:
        rank, width = factor.A.shape
        if width != x.shape[-1] or factor.B.shape[1] != rank:
            raise ConfigError(
                f"factors {tuple(factor.A.shape)} and {tuple(factor.B.shape)} do not fit an input "
                f"of width {x.shape[-1]}; expected [rank, width] and [width out, rank]"
            )
        wanted = (rows.samples, rank, rank)
        if factor.gates is not None and factor.gates.shape != wanted:
            raise ConfigError(
                f"gates of shape {tuple(factor.gates.shape)} do not fit {rows.samples} samples "
                f"and rank {rank}; expected {wanted}"
            )
