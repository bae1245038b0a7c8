"""Frozen linear layers on the CPU through oneDNN where MKL would leave half the machine idle.

A step of LoRA is almost only products with frozen weights, and torch gives float32 products to MKL,
which uses AVX-512 on Intel's CPUs and AVX2 on all others; oneDNN, which torch carries too, uses
what the CPU has. On such a machine these layers are computed by oneDNN, forward and backward, in
the same float32. Nothing is patched: the products are taken over by torch's own function mode,
inside one forward only, and the weight is used in place in both directions, so no copy of it is
kept. The rule looks at the CPU and never at a clock: a resumed run computes the bits of the run
that was not interrupted.
"""

from __future__ import annotations

import contextlib
import functools
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from rellax_ds import runtime

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_MIN_ROWS = 16
"""Below this a product is a few dot products, where starting oneDNN costs more than it saves."""


def frozen_products() -> contextlib.AbstractContextManager[Any]:
    """Context in which frozen linear layers take the faster product of this machine.

    `torch.backends.mkldnn.flags(enabled=False)` switches it off, as it does the rest of oneDNN.
    """
    if not torch.backends.mkldnn.enabled or torch.compiler.is_compiling() or not onednn_pays():
        return contextlib.nullcontext()
    return FrozenProducts()


@functools.cache
def onednn_pays() -> bool:
    """Whether oneDNN's float32 products beat the ones torch uses here; logged once."""
    if not (
        torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        and cpu_vendor() not in ("GenuineIntel", "")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    ):
        return False
    runtime.logger.info(
        "frozen layers: oneDNN (this CPU has AVX-512, and MKL uses it on Intel's CPUs only)"
    )
    return True


def cpu_vendor() -> str:
    """Name of the CPU's maker as the CPU gives it, for example `AuthenticAMD`; empty if unknown."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("vendor_id"):
                return line.partition(":")[2].strip()
    return ""


class FrozenProducts(TorchFunctionMode):
    """Takes over `F.linear` for float32 CPU weights without a gradient; all else passes."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Compute `func`, a frozen linear layer by oneDNN."""
        if func is F.linear and not kwargs and _fits(*args):
            x, weight, bias = (*args, None)[:3]
            return FrozenLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


class FrozenLinear(torch.autograd.Function):
    """y = x W^T + b with W and b constant; the gradient is dy W, and of x nothing is kept.

    The parameter itself is saved, never a view of it, because under ZeRO-3 it is gathered again
    for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """[..., d_out] of x [..., d_in], W [d_out, d_in] and b [d_out] or None."""
        ctx.save_for_backward(weight)
        return _product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        """Gradient of x."""
        if not ctx.needs_input_grad[0]:
            return None, None, None
        (weight,) = ctx.saved_tensors
        return _product(dy, weight.t(), None), None, None


def _fits(x: Any, weight: Any, bias: Any = None) -> bool:
    return (
        isinstance(x, torch.Tensor)
        and x.device.type == "cpu"
        and x.dtype is weight.dtype is torch.float32
        and not weight.requires_grad
        and (bias is None or not bias.requires_grad)
        and weight.dim() == 2
        and x.numel() >= _MIN_ROWS * weight.shape[1]
        and not torch.is_autocast_enabled("cpu")
    )


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    made = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return cast("torch.Tensor", made)
