"""The CFLoRA operator in plain torch: what every faster path must equal.

Shapes: x [B, L, d_in], A [r, d_in], B [d_out, r], gates [B, r, r] with the row convention S = H G,
delta [B, L, d_out]. The scale is applied once, to the rank-r product, so A, B and the gates keep
their own meaning and no pass over a [B, L, d_out] tensor is spent on it; the 1 / (1 - p) of dropout
rides on it. Gradients come from autograd, which makes float64 gradcheck possible.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

_LEVELS = 1 << 16


def cflora_delta(
    x: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    gates: torch.Tensor | None,
    scaling: float,
    dropout_p: float = 0.0,
    training: bool = False,
) -> torch.Tensor:
    """Low-rank update `scaling * (dropout(x) A^T) G B^T` with one gate G per sample.

    Args:
        x: Layer input [B, L, d_in]; without gates any leading shape.
        A: Down factor [r, d_in].
        B: Up factor [d_out, r].
        gates: [B, r, r], or None for the identity, which skips the product.
        scaling: alpha / r.
        dropout_p: Drop rate on the input of A, in training only; realised in steps of 2^-16.
        training: Whether dropout is active.

    Returns:
        The update [B, L, d_out] in the type of x.
    """
    threshold = round(dropout_p * _LEVELS) if training else 0
    if threshold:
        x = x * _keep(x, threshold)
        scaling = scaling * _LEVELS / (_LEVELS - threshold)
    hidden = F.linear(x, A)
    if gates is not None:
        hidden = torch.matmul(hidden, gates)
    return F.linear(hidden * scaling, B)


def _keep(x: torch.Tensor, threshold: int) -> torch.Tensor:
    """Mask of x, true with probability 1 - threshold / 2^16.

    A 16-bit lane decides per element, four to a random word: on a CPU several times cheaper than
    one float draw each, which costs as much as the rest of the low-rank path.
    """
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device=x.device)
    lanes = words.random_(-(1 << 63), None).view(torch.int16)[: x.numel()]
    return (lanes >= threshold - _LEVELS // 2).view(x.shape)
