"""HBM passes of eager PyTorch, counted at true size without computing anything.

Tensors have shapes and no data, so a layer of any size runs on any machine; a dispatch mode adds up
what each operator must read and write. Views and allocations are free, an operator in place reads
and writes its target, and what the bare frozen linear does itself is subtracted. That counts every
operator as one kernel that reads its inputs once: the ideal of eager execution, which caches can
still improve on between two operators.

One pass P is one read or one write of a 16-bit tensor [T, d].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import peft
import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from collections.abc import Callable

TOKENS, RANK, DROPOUT = 8192, 16, 0.05
WIDTHS = (4096, 5120, 8192)

_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


@dataclass(frozen=True)
class Operator:
    """One executed operator: its name, bytes it reads and bytes it writes."""

    name: str
    read: int
    written: int


class Traffic(TorchDispatchMode):
    """Records the operators that run inside it, views and allocations left out."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[Operator] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and not func.is_view and name not in _FREE:
            written = sum(map(num_bytes, tensors_of(out)))
            read = 0 if name.endswith("_like") else sum(map(num_bytes, tensors_of((args, kwargs))))
            self.operators.append(Operator(name, read, written))
        return out

    @property
    def bytes(self) -> int:
        """Bytes read and written so far."""
        return sum(each.read + each.written for each in self.operators)


def num_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the elements of a tensor."""
    return tensor.numel() * tensor.element_size()


def tensors_of(tree: Any) -> list[torch.Tensor]:
    """Tensors among the leaves of nested arguments."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def one_pass(tokens: int, width: int) -> int:
    """P: bytes of a 16-bit tensor [T, d]."""
    return tokens * width * 2


def bare_bytes(tokens: int, width: int) -> int:
    """Compulsory traffic of the frozen linear, forward and backward: x, W, y and dy, W, dx."""
    return 2 * (2 * one_pass(tokens, width) + 2 * width * width)


class NativeDropout(nn.Module):
    """Dropout as the fused operator a GPU runs; shape-only tensors would take it apart."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Dropped and rescaled x, with a mask of a byte per element kept for the backward."""
        return torch.native_dropout(x, self.p, True)[0]


def peft_layer(
    width: int, rank: int, dropout_p: float, dtype: torch.dtype, adapter_dtype: torch.dtype
) -> nn.Module:
    """PEFT's own LoRA layer on a frozen square linear without bias, on the meta device."""
    base = nn.Linear(width, width, bias=False, dtype=dtype, device="meta").requires_grad_(False)
    config = peft.LoraConfig(r=rank, lora_alpha=rank, lora_dropout=dropout_p)
    layer = LoraLinear(base, "default", config=config, r=rank, lora_alpha=rank)
    layer.lora_A.to(adapter_dtype)
    layer.lora_B.to(adapter_dtype)
    if dropout_p:
        layer.lora_dropout["default"] = NativeDropout(dropout_p)
    return layer


def count(
    run: Callable[[torch.Tensor], torch.Tensor], tokens: int, width: int, device: str = "meta"
) -> tuple[list[Operator], list[Operator]]:
    """Operators of forward and of backward of `run` on a bfloat16 input [T, d] with gradient."""
    x = torch.empty(tokens, width, dtype=torch.bfloat16, device=device, requires_grad=True)
    upstream = torch.empty(tokens, width, dtype=torch.bfloat16, device=device)
    with Traffic() as forward:
        y = run(x)
    with Traffic() as backward:
        y.backward(upstream)
    return forward.operators, backward.operators


def extra_passes(operators: list[Operator], tokens: int, width: int) -> float:
    """Passes of forward and backward together beyond those of the bare linear."""
    total = sum(each.read + each.written for each in operators)
    return (total - bare_bytes(tokens, width)) / one_pass(tokens, width)


def peft_passes(
    width: int,
    adapter_dtype: torch.dtype,
    dropout_p: float = DROPOUT,
    tokens: int = TOKENS,
    rank: int = RANK,
) -> float:
    """Extra passes of PEFT's LoRA layer on a bfloat16 linear."""
    layer = peft_layer(width, rank, dropout_p, torch.bfloat16, adapter_dtype)
    forward, backward = count(layer, tokens, width)
    return extra_passes(forward + backward, tokens, width)
