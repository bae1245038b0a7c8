"""Exact cosine similarity of items, and a cache of it for the items most events are of.

Results must be the same to the last bit for any partition, block, thread or machine, and the
rounding of a floating-point product depends on the block's shape. So unit vectors are rounded to
multiples of 2^-26 and multiplied in float64: by Cauchy-Schwarz every partial sum is a multiple of
2^-52 below two, every operation is exact, and the order of summation cannot matter. The exact
product is then rounded once, to float32, and that is the similarity. The first rounding moves a
cosine by less than float32 arithmetic would.

A log repeats its items: a pair of popular items is met by thousands of samples. `SimilarityCache`
holds the similarity of all pairs of the most frequent items, made once and shared by all workers
through a memory-mapped file; rare items are multiplied when they are met. Its size is bounded, and
it is never larger than the number of pairs the log asks for, so cost stays linear in scored pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Ints = NDArray[np.int64]

MAX_CACHED_ITEMS = 8192
"""Items in the cache at most: 256 MiB of similarities, and places that fit 16 bits."""

_STEPS = float(2**26)
_TILE_ROWS = 512


def quantise(vectors: Floats) -> torch.Tensor:
    """Unit vectors in multiples of 2^-26, float64 [num_items, d], whose products are exact."""
    whole = np.rint(vectors.astype(np.float64) * _STEPS)
    return torch.from_numpy(whole / _STEPS)


def cosine(queries: torch.Tensor, keys: torch.Tensor) -> Floats:
    """Similarity of quantised vectors.

    Args:
        queries: Float64 [n, d], see `quantise`.
        keys: Float64 [m, d].

    Returns:
        Float32 [n, m], each entry the exact product rounded once.
    """
    similarity: Floats = exact_cosine(queries @ keys.T).numpy()
    return similarity


def exact_cosine(products: torch.Tensor) -> torch.Tensor:
    """Float32 similarity of exact float64 products of quantised vectors."""
    # Adding zero turns -0, which a sum of products may leave, into the 0 it equals.
    return products.to(torch.float32).add_(0.0)


@dataclass(frozen=True)
class SimilarityCache:
    """Similarity of every pair of the C most frequent items.

    Attributes:
        place: int32 [num_items], row of an item in `cosine`, -1 for an item that is not cached. The
            most frequent item has row 0: columns that are read most lie side by side.
        cosine: Float32 [C, C].
    """

    place: NDArray[np.int32]
    cosine: Floats

    @classmethod
    def build(
        cls,
        vectors: torch.Tensor,
        event_item: NDArray[np.integer],
        num_pairs: int,
        limit: int = MAX_CACHED_ITEMS,
    ) -> SimilarityCache:
        """Cache the items that occur most often, ties to the smaller id.

        Args:
            vectors: Quantised item vectors [num_items, d].
            event_item: Item of every event.
            num_pairs: (target, behaviour) pairs that will be scored; more pairs than that are not
                cached.
            limit: C at most.
        """
        counts = np.bincount(event_item, minlength=len(vectors))
        size = min(limit, math.isqrt(num_pairs), int(np.count_nonzero(counts)))
        items = np.argsort(-counts, kind="stable")[:size]
        place = np.full(len(vectors), -1, np.int32)
        place[items] = np.arange(size, dtype=np.int32)
        chosen = vectors[torch.from_numpy(items)]
        square = torch.empty((size, size), dtype=torch.float32)
        for first in range(0, size, _TILE_ROWS):
            last = min(first + _TILE_ROWS, size)
            # Symmetric: the rows from `first` on are computed, the columns before are known.
            square[first:last, first:] = exact_cosine(chosen[first:last] @ chosen[first:].T)
            square[last:, first:last] = square[first:last, last:].T
        matrix: Floats = square.numpy()
        matrix.flags.writeable = False
        return cls(place, matrix)

    def save(self, folder: Path) -> None:
        """Write the two arrays into `folder`, for `load`."""
        np.save(folder / "cache_place.npy", self.place)
        np.save(folder / "cache_cosine.npy", self.cosine)

    @classmethod
    def load(cls, folder: Path) -> SimilarityCache:
        """Map the arrays that `save` wrote; processes of one machine share their memory."""
        matrix = np.asarray(np.load(folder / "cache_cosine.npy", mmap_mode="r"))
        return cls(np.load(folder / "cache_place.npy"), matrix)
