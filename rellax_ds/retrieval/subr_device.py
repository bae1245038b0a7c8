"""The same search on an accelerator: half-precision products propose, exact arithmetic decides.

A GPU multiplies half-precision matrices many times faster than double ones. So a block's
similarities are first taken from vectors rounded to half, accumulated in float32, and the best K
and a margin are kept. These few are scored again exactly, as on the CPU. The error of the first
pass has a bound; a row whose kept scores do not clear it, which takes many near ties, is scored
exactly as a whole. The result is therefore the CPU's, event for event.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import torch

from rellax_ds.retrieval.similarity import exact_cosine

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Ints = NDArray[np.int64]

_BLOCK_ROWS = 1024
_MARGIN = 34


class DeviceSearch:
    """Vectors on a device, and `retrieve` on them."""

    def __init__(self, vectors: torch.Tensor, device: str) -> None:
        """Move the vectors.

        Args:
            vectors: Quantised item vectors, float64 [num_items, d], see `similarity.quantise`.
            device: A torch device.
        """
        self._exact = vectors.to(device)
        self._half = self._exact.half()
        # Rounding to half moves a product of unit vectors by at most 2^-10, accumulation in float32
        # by d 2^-24; the rest covers numbers below half's normal range.
        self._error = 1.05 * 2**-10 + vectors.shape[1] * 2**-23

    def retrieve(
        self,
        event_item: NDArray[np.integer],
        target_item: NDArray[np.integer],
        history_start: Ints,
        history_end: Ints,
        num_retrieved: int,
    ) -> tuple[Ints, Ints, Floats]:
        """See `subr.retrieve`."""
        counts = np.minimum(history_end - history_start, num_retrieved)
        offsets = np.concatenate([[0], np.cumsum(counts)])
        events = np.empty(offsets[-1], np.int64)
        similarity = np.empty(offsets[-1], np.float32)
        order = np.lexsort((history_end, history_start))
        starts = history_start[order]
        bounds = np.flatnonzero(np.diff(starts, prepend=-1, append=-1))
        for lower, upper in itertools.pairwise(bounds):
            for first in range(lower, upper, _BLOCK_ROWS):
                rows = order[first : min(first + _BLOCK_ROWS, upper)]
                length = history_end[rows] - starts[lower]
                history = self._items(event_item[starts[lower] : starts[lower] + length[-1]])
                column, value = self._block(
                    self._items(target_item[rows]), history, length, num_retrieved
                )
                # Columns are ascending and the missing ones of a short history come last.
                present = np.arange(column.shape[1]) < counts[rows, None]
                place = (offsets[rows, None] + np.arange(column.shape[1]))[present]
                events[place] = starts[lower] + column[present]
                similarity[place] = value[present]
        return offsets, events, similarity

    def _items(self, items: NDArray[np.integer]) -> torch.Tensor:
        return torch.from_numpy(items.astype(np.int64)).to(self._exact.device)

    def _block(
        self, targets: torch.Tensor, history: torch.Tensor, length: Ints, k: int
    ) -> tuple[Ints, Floats]:
        """Columns and similarity [rows, min(k, width)] of the best of a block."""
        width = history.numel()
        visible = torch.from_numpy(length).to(targets.device)
        k, kept = min(k, width), min(k + _MARGIN, width)
        rough = _product(self._half[targets], self._half[history])
        hidden = torch.arange(width, device=targets.device) >= visible[:, None]
        top = rough.masked_fill_(hidden, -torch.inf).topk(kept, dim=1)
        column, value = self._decide(targets, history, visible, top.indices, k)
        if kept < width:
            bar = top.values[:, k - 1] - 2 * self._error
            unsure = (top.values[:, -1] >= bar).nonzero().flatten()
            everything = torch.arange(width, device=targets.device)
            for row in torch.split(unsure, 64):
                column[row], value[row] = self._decide(
                    targets[row], history, visible[row], everything.expand(len(row), -1), k
                )
        return column.cpu().numpy(), value.cpu().numpy()

    def _decide(
        self,
        targets: torch.Tensor,
        history: torch.Tensor,
        visible: torch.Tensor,
        candidates: torch.Tensor,
        k: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The k best candidates by exact similarity, of equals the later, in ascending order."""
        latest_first = candidates.sort(dim=1, descending=True).values
        pairs = self._exact[history[latest_first]] @ self._exact[targets].unsqueeze(2)
        score = exact_cosine(pairs.squeeze(2))
        score.masked_fill_(latest_first >= visible[:, None], -torch.inf)
        best = score.sort(dim=1, descending=True, stable=True).indices[:, :k]
        column = latest_first.gather(1, best).sort(dim=1)
        return column.values, score.gather(1, best).gather(1, column.indices)


def _product(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Product of half-precision vectors, accumulated and returned in float32."""
    if queries.is_cuda:
        return torch.mm(queries, keys.T, out_dtype=torch.float32)
    return queries.float() @ keys.float().T
