"""The CFLoRA operator in plain torch: what every other path must equal.

Written as the formula reads and differentiated by autograd, so it shares no backward code with the
paths it judges; in float64 it can be checked by finite differences. The scale is applied to the
rank-r product, and the 1 / (1 - p) of dropout to x, in the type of x.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from rellax_ds.kernels.philox import Dropout, keep_mask

if TYPE_CHECKING:
    from rellax_ds.kernels.rows import Rows


def update(
    x: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    G: torch.Tensor | None,
    rows: Rows,
    scaling: float,
    dropout: Dropout | None = None,
    module: int = 0,
) -> torch.Tensor:
    """Low-rank update s (dropout(x) A^T) G B^T with one gate per sample.

    Args:
        x: Layer input [T, d_in].
        A: Down factor [r, d_in].
        B: Up factor [d_out, r].
        G: Gates [S, r, r], or None for the identity.
        rows: Owner of each row; rows of no sample get a zero update.
        scaling: s = alpha / r.
        dropout: Dropout on the input of A, or None.
        module: Place of this module in a stacked call.

    Returns:
        The update [T, d_out] in the type of x.
    """
    if dropout is not None:
        x = x * _keep(x, dropout, module) * dropout.scale
    hidden = F.linear(x, A.to(x.dtype))
    ids = rows.ids(x.device).long()
    if G is not None:
        padded = torch.cat([G.to(x.dtype), G.new_zeros(1, *G.shape[1:], dtype=x.dtype)])
        hidden = torch.bmm(hidden.unsqueeze(1), padded[ids]).squeeze(1)
    hidden = torch.where((ids >= 0)[:, None], hidden, hidden.new_zeros(()))
    return F.linear(hidden * scaling, B.to(x.dtype))


def _keep(x: torch.Tensor, dropout: Dropout, module: int) -> torch.Tensor:
    seed, stream = int(dropout.seed), dropout.streams[module]
    rows, columns = x.shape
    return keep_mask(seed, rows, columns, dropout.threshold, stream, x.device)
