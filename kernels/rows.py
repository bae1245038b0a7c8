"""Which sample each token row belongs to: what a padded batch and a packed sequence have in common.

Built once per micro-batch on the host and shared by all layers. The kernels see a sample only
through the tables made here, so no path needs to know how a batch was laid out.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

Run = tuple[int, int, int]
"""First row, number of rows, sample; the sample is -1 for rows that belong to none."""


class Rows:
    """Owner of each of T token rows; equal adjacent owners form a run, a sample may own several.

    Attributes:
        tokens: T.
        samples: S, the number of gates; a sample may own no row.
        runs: Non-empty runs in the order of their rows; together they cover all T rows.
        uniform_length: L where T = S * L and row t belongs to sample t // L, else None.
        table: The runs as int64 [n, 3] on the CPU.
    """

    def __init__(self, runs: Sequence[Run], samples: int) -> None:
        self.runs = tuple((int(a), int(n), int(s)) for a, n, s in runs if n)
        self.samples = int(samples)
        self.tokens = sum(count for _, count, _ in self.runs)
        position = 0
        for first, count, sample in self.runs:
            if first != position or not -1 <= sample < samples:
                raise ValueError(
                    f"run ({first}, {count}, {sample}): runs must follow each other from row 0 and "
                    f"name samples below {samples}"
                )
            position += count
        self.uniform_length = self._uniform_length()
        self.table = torch.tensor(self.runs, dtype=torch.int64).reshape(-1, 3)
        self._ids: dict[torch.device, torch.Tensor] = {}
        self._by_sample: dict[tuple[int, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}
        self._tiles: dict[tuple[int, torch.device], torch.Tensor] = {}

    @staticmethod
    @functools.lru_cache(maxsize=64)
    def padded(samples: int, length: int) -> Rows:
        """Rows of a batch [S, L, d] flattened to [S * L, d]; the same object for equal arguments,
        so all layers of a step share its tables.
        """
        return Rows([(s * length, length, s) for s in range(samples)], samples)

    @classmethod
    def from_lengths(cls, lengths: Sequence[int]) -> Rows:
        """Rows of samples packed one after the other; a length may be 0."""
        runs, position = [], 0
        for sample, length in enumerate(lengths):
            runs.append((position, int(length), sample))
            position += int(length)
        return cls(runs, len(lengths))

    @classmethod
    def from_ids(cls, ids: torch.Tensor, samples: int | None = None) -> Rows:
        """Rows by the sample id of each, integer [T]; -1 belongs to no sample.

        The ids are read on the host: pass a CPU tensor to avoid a device synchronisation.

        Args:
            ids: Owner of each row.
            samples: S; by default one more than the largest id.

        Raises:
            ValueError: An id is below -1 or not below `samples`.
        """
        ids = ids.detach().flatten().cpu()
        if samples is None:
            samples = int(ids.max()) + 1 if ids.numel() else 0
        owners, counts = torch.unique_consecutive(ids, return_counts=True)
        firsts = counts.cumsum(0) - counts
        runs = zip(firsts.tolist(), counts.tolist(), owners.tolist(), strict=True)
        return cls(list(runs), samples)

    def ids(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Owner of each row, int32 [T]; cached per device."""
        key = torch.device(device)
        if key not in self._ids:
            owners = torch.tensor([run[2] for run in self.runs], dtype=torch.int32)
            counts = torch.tensor([run[1] for run in self.runs], dtype=torch.int64)
            self._ids[key] = owners.repeat_interleave(counts).to(key)
        return self._ids[key]

    def tiles(self, block: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Tile table int32 [n, 3] of (first row, number of rows, sample); cached per block.

        A tile has at most `block` rows and never straddles two runs, so nothing is padded in
        memory.
        """
        key = (block, torch.device(device))
        if key not in self._tiles:
            table = [
                (first + offset, min(block, count - offset), sample)
                for first, count, sample in self.runs
                for offset in range(0, count, block)
            ]
            tensor = torch.tensor(table, dtype=torch.int32).reshape(-1, 3)
            self._tiles[key] = tensor.to(key[1])
        return self._tiles[key]

    def tiles_by_sample(
        self, block: int, device: torch.device | str = "cpu"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tiles grouped by sample: int32 tile numbers in the order of their rows, and int32 offsets
        [S + 1] of each sample's share; cached per block.
        """
        key = (block, torch.device(device))
        if key not in self._by_sample:
            owners = self.tiles(block)[:, 2].long()
            order = torch.argsort(owners, stable=True)
            first = int((owners < 0).sum())
            counts = torch.bincount(owners[owners >= 0], minlength=self.samples)
            offsets = torch.zeros(self.samples + 1, dtype=torch.int64)
            torch.cumsum(counts, 0, out=offsets[1:])
            tensors = (order[first:].int(), offsets.int())
            self._by_sample[key] = (tensors[0].to(key[1]), tensors[1].to(key[1]))
        return self._by_sample[key]

    def _uniform_length(self) -> int | None:
        if not self.samples or len(self.runs) != self.samples:
            return None
        length = self.runs[0][1]
        uniform = all(
            count == length and sample == index
            for index, (_, count, sample) in enumerate(self.runs)
        )
        return length if uniform else None
